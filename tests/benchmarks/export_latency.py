"""Latency of exported files against the dense export: nothing, half, and everything reused, by forced decisions.

`python -m tests.benchmarks.export_latency [--shape B/2] [--format openvino onnx] [--precision f32] [--batch 2 8] [--forecast 2]`
`make bench-export` runs all shapes, formats, precisions and batches.

Shapes are those of DiT-S/2, DiT-B/2 and DiT-XL/2 at 256 pixels, with random weights; they cost the same. Gates are static, as
training makes them. Everything of a shape is measured in one run, in turn, and the smallest of several timings counts.

"nothing", "all" and "half of the steps" reused are of gates that decide all branches alike, as training leaves them; half of the
steps is the mean of two calls, one that computes and one that does not. "half lazy" is a batch of which one half of the samples
goes on with its image and reuses everything, while the other half begins another image and computes everything. "half of the
blocks" reuses every second block in each call, and with `--by-branch` nothing, all and half lazy are measured once more for files
with a branch for each gate. Peak memory is that of the process.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

import lazycompress
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.runtime import LazyModel, wrap

from .page import PAGE_HELP, written

#: Layers, heads, width of a head.
SHAPES = {"S/2": (12, 6, 64), "B/2": (12, 12, 64), "XL/2": (28, 16, 72)}

#: Timings of each step, the first ones left out; fewer where steps are slow.
REPEATS, LEAST, FIRST, SECONDS = 10, 5, 2, 60.0

Step = Callable[[int, int], object]


def build(layers: int, heads: int, head: int) -> nn.Module:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def inputs(batch: int, timestep: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "hidden_states": torch.randn(batch, 4, 32, 32, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "class_labels": torch.arange(batch),
    }


def make(model: nn.Module, forecast: int) -> LazyModel:
    """A lazy model with gates as training makes them."""
    lazy = wrap(model, (), inputs(2, 500))
    lazy.set_gates(lazy.gates.like(order=forecast, static=1))
    return lazy


def force(lazy: LazyModel, share: float, by_branch: bool = False) -> None:
    """Let a share of the blocks reuse always, the others never; `by_branch` with gates that do not all agree."""
    with torch.no_grad():
        for i in range(len(lazy.branches)):
            block = i // 2
            lazy.gates.bias[i] = 10.0 if int((block + 1) * share) > int(block * share) else -10.0
        if by_branch and lazy.gates.together:
            lazy.gates.bias[0] += 1.0


def mixed_inputs(batch: int, timestep: int) -> dict[str, torch.Tensor]:
    """Calls in which the first half of the samples goes on with its image and the second half begins another each time."""
    found = inputs(batch, timestep)
    found["class_labels"][batch // 2 :] += timestep % 2 + 1
    return found


def dense_step(model: nn.Module, format: str, folder: Path, precision: str = "f32") -> Step:
    example = inputs(2, 500)
    program = torch.export.export(
        model, (), example, dynamic_shapes={name: {0: torch.export.Dim.AUTO} for name in example}
    )
    if format == "openvino":
        compiled = ov.Core().compile_model(ov.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": precision})
        request = compiled.create_infer_request()
        return lambda b, t: request.infer([value.numpy() for value in inputs(b, t).values()])
    path = folder / "dense.onnx"
    exported: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=list(example))
    exported.save(path, external_data=True)
    session = ort.InferenceSession(str(path))
    return lambda b, t: session.run(None, {name: value.numpy() for name, value in inputs(b, t).items()})


def eager_step(model: nn.Module) -> Step:
    def step(batch: int, timestep: int) -> object:
        with torch.no_grad():
            return model(**inputs(batch, timestep))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["B/2"], choices=list(SHAPES))
    parser.add_argument("--format", nargs="+", default=["openvino", "onnx"], choices=["openvino", "onnx"])
    parser.add_argument("--precision", nargs="+", default=["f32"], choices=["f32", "bf16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--forecast", type=int, default=2, help="order of the forecast")
    parser.add_argument("--by-branch", action="store_true", help="files with a branch for each gate, too")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timings of each step, where steps are not slow")
    parser.add_argument("--least", type=int, default=LEAST, help="timings of each step, however slow")
    parser.add_argument(
        "--gates-alone", action="store_true", help="only the dense file and the lazy one that reuses nothing"
    )
    parser.add_argument("--write", type=Path, help=PAGE_HELP)
    options = parser.parse_args()
    with written(options.write, "export_latency"):
        run(options)


def run(options: argparse.Namespace) -> None:
    for shape in options.shape:
        model = build(*SHAPES[shape])
        lazy = make(model, options.forecast)
        share = sum(branch.macs for branch in lazy.branches) / lazy.dense_macs
        print(f"{shape}: {len(lazy.branches)} branches hold {share:.1%} of the MACs", flush=True)
        for format in options.format:
            for precision in options.precision:
                if format == "onnx" and precision != "f32":
                    continue  # ONNX Runtime computes in float32 on CPUs
                with tempfile.TemporaryDirectory() as name:
                    compare(model, lazy, shape, format, precision, Path(name), options)
                gc.collect()


def compare(
    model: nn.Module,
    lazy: LazyModel,
    shape: str,
    format: str,
    precision: str,
    folder: Path,
    options: argparse.Namespace,
) -> None:
    """One file format and precision: dense, and lazy files that differ in what they reuse."""
    steps: dict[str, Step] = {"dense": dense_step(model, format, folder, precision)}
    if precision == "f32" and not options.gates_alone:
        steps["torch eager"] = eager_step(model)
    kinds = [("nothing reused", 0.0, False)]
    if not options.gates_alone:
        kinds += [("all reused", 1.0, False), ("half of the blocks", 0.5, False)]
    if options.by_branch:
        kinds += [("nothing, by branch", 0.0, True), ("all, by branch", 1.0, True)]
    for label, reused, apart in kinds:
        force(lazy, reused, apart)
        path = lazycompress.export(lazy, folder / label.replace(" ", "_"), format=format, check=False)
        runner: Any
        if format == "openvino":
            runner = OpenVINORunner(path, config={"INFERENCE_PRECISION_HINT": precision})
        else:
            runner = OnnxRunner(path)
        steps[label] = lambda b, t, runner=runner: runner(**inputs(b, t))
        if reused == 1.0:
            twin = runner.twin()
            steps[label.replace("all", "half lazy").replace(" reused", "")] = lambda b, t, runner=twin: runner(
                **mixed_inputs(b, t)
            )
    for batch in options.batch:
        report(f"{shape:4} {format:8} {precision:4} batch {batch}", steps, batch, options.repeats, options.least)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{shape:4} {format:8} {precision:4} peak memory of all of it so far {peak:.2f} GiB", flush=True)


def measure(steps: dict[str, Step], batch: int, repeats: int = REPEATS, least: int = LEAST) -> dict[str, float]:
    """Seconds of one step each, the smallest of several: all in turn.

    A step comes twice and the second time counts: threads of the one before it spin for a while, and take its cores.
    """
    times: dict[str, list[float]] = {label: [] for label in steps}
    started = time.perf_counter()
    for number in range(repeats + FIRST):
        if number >= FIRST + least and time.perf_counter() - started > SECONDS:
            break
        for label, step in steps.items():
            step(batch, 900 - 2 * number)
            before = time.perf_counter()
            step(batch, 899 - 2 * number)
            times[label].append(time.perf_counter() - before)
    return {label: float(np.min(values[FIRST:])) for label, values in times.items()}


def report(title: str, steps: dict[str, Step], batch: int, repeats: int, least: int) -> None:
    best = measure(steps, batch, repeats, least)
    if "all reused" in best:
        best["half of the steps"] = (best["nothing reused"] + best["all reused"]) / 2
    for label, seconds in best.items():
        line = f"{title}: {label:21} {seconds * 1e3:8.1f} ms  {seconds / best['dense']:.3f} of dense"
        base = "nothing, by branch" if label.endswith("by branch") else "nothing reused"
        print(line + f", {seconds / best[base]:.3f} of {base}", flush=True)


if __name__ == "__main__":
    main()
