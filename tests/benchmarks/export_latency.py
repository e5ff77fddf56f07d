"""Latency of exported files against the dense export: nothing, half, and everything reused, by forced decisions.

`python -m tests.benchmarks.export_latency [--layers 12] [--width 768] [--format openvino onnx] [--batch 2 8]`

The default is the shape of DiT-B/2 at 256 px with random weights; they cost the same. Everything is measured in one run, in
turn, and the smallest of several timings counts.
"""

from __future__ import annotations

import argparse
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

REPEATS = 6
Step = Callable[[int, int], object]


def build(layers: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=layers,
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


def force(lazy: LazyModel, share: float) -> None:
    """Let a share of the blocks reuse always, the others never."""
    with torch.no_grad():
        for i in range(len(lazy.branches)):
            block = i // 2
            lazy.gates.bias[i] = 10.0 if int((block + 1) * share) > int(block * share) else -10.0


def dense_step(model: nn.Module, format: str, folder: Path) -> Step:
    example = inputs(2, 500)
    program = torch.export.export(
        model, (), example, dynamic_shapes={name: {0: torch.export.Dim.AUTO} for name in example}
    )
    if format == "openvino":
        compiled = ov.Core().compile_model(ov.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        request = compiled.create_infer_request()
        return lambda b, t: request.infer([value.numpy() for value in inputs(b, t).values()])
    path = folder / "dense.onnx"
    exported: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=list(example))
    exported.save(path)
    session = ort.InferenceSession(str(path))
    return lambda b, t: session.run(None, {name: value.numpy() for name, value in inputs(b, t).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--format", nargs="+", default=["openvino", "onnx"], choices=["openvino", "onnx"])
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    options = parser.parse_args()
    model = build(options.layers, options.width)
    lazy = wrap(model, (), inputs(2, 500))
    share = sum(branch.macs for branch in lazy.branches) / lazy.dense_macs
    print(f"{len(lazy.branches)} branches hold {share:.1%} of the MACs")
    with tempfile.TemporaryDirectory() as name:
        for format in options.format:
            steps: dict[str, Step] = {"dense": dense_step(model, format, Path(name))}
            for label, reused in (("nothing", 0.0), ("half", 0.5), ("all", 1.0)):
                force(lazy, reused)
                folder = lazycompress.export(lazy, Path(name) / f"{format}_{label}", format=format)
                runner: Any = OpenVINORunner(folder) if format == "openvino" else OnnxRunner(folder)
                steps[f"{label} reused"] = lambda b, t, runner=runner: runner(**inputs(b, t))
            for batch in options.batch:
                report(format, batch, steps)


def measure(steps: dict[str, Step], batch: int) -> dict[str, float]:
    """Seconds of one step each, the smallest of several: all in turn."""
    times: dict[str, list[float]] = {label: [] for label in steps}
    for timestep in range(900, 900 - REPEATS - 2, -1):
        for label, step in steps.items():
            before = time.perf_counter()
            step(batch, timestep)
            times[label].append(time.perf_counter() - before)
    return {label: float(np.min(values[2:])) for label, values in times.items()}


def report(format: str, batch: int, steps: dict[str, Step]) -> None:
    best = measure(steps, batch)
    for label, seconds in best.items():
        print(
            f"{format:9} batch {batch}: {label:15} {seconds * 1e3:8.1f} ms  {seconds / best['dense']:.3f} of dense",
            flush=True,
        )


if __name__ == "__main__":
    main()
