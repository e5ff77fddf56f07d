"""Latency of 8-bit arithmetic and laziness, each alone and both together, against the dense float32 export.

`python -m tests.benchmarks.compose_latency [--shape B/2] [--format openvino onnx] [--batch 2] [--forecast 2]`

Shapes are those of DiT at 256 px with random weights. Gates have the form that training gives them, and every second call
reuses everything: "lazy half" is the mean of two calls. "dense int8" is what the runtime's own tools make of the dense file: NNCF
for OpenVINO, dynamic quantization for ONNX Runtime. Everything is measured in one run, in turn, and the smallest of several
timings counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import nncf
import onnxruntime as ort
import openvino as ov
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

import lazycompress
from lazycompress.compose.quantize import quantize
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.gates import Gates
from lazycompress.recipe import Quantize
from lazycompress.runtime import LazyModel

from .export_latency import SHAPES, Step, build, dense_step, inputs, make, measure
from .page import PAGE_HELP, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="B/2", choices=list(SHAPES))
    parser.add_argument("--forecast", type=int, default=2, help="order of the forecast")
    parser.add_argument("--format", nargs="+", default=["openvino", "onnx"], choices=["openvino", "onnx"])
    parser.add_argument("--batch", type=int, nargs="+", default=[2])
    parser.add_argument("--write", type=Path, help=PAGE_HELP)
    options = parser.parse_args()
    with written(options.write, "compose_latency"):
        run(options)


def run(options: argparse.Namespace) -> None:
    model = build(*SHAPES[options.shape])
    plain, small = (every_second_call(make(model, options.forecast)) for _ in range(2))
    started = time.perf_counter()
    print(
        quantize(small, sampler, Quantize(subset_size=4)), f"{time.perf_counter() - started:.0f} s in all", flush=True
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for format in options.format:
            steps: dict[str, Step] = {
                "dense f32": dense_step(model, format, folder),
                "dense int8": dense_int8(model, format, folder),
            }
            for label, lazy in (("f32", plain), ("int8", small)):
                path = lazycompress.export(lazy, folder / f"{format}_{label}", format=format, check=False)
                runner: Any = OpenVINORunner(path) if format == "openvino" else OnnxRunner(path)
                steps[f"lazy half {label}"] = lambda b, t, runner=runner: two_calls(runner, b, t)
            for batch in options.batch:
                best = measure(steps, batch)
                best |= {label: seconds / 2 for label, seconds in best.items() if label.startswith("lazy half")}
                for label, seconds in best.items():
                    print(
                        f"{format:9} batch {batch}: {label:15} {seconds * 1e3:8.1f} ms, dense f32 takes "
                        f"{best['dense f32'] / seconds:5.2f} times that; {seconds / best['dense int8']:.3f} of dense int8",
                        flush=True,
                    )


def every_second_call(lazy: LazyModel) -> LazyModel:
    """Gates that reuse everything at even timesteps and nothing at odd ones."""
    names, widths = [branch.name for branch in lazy.branches], [branch.width for branch in lazy.branches]
    gates = Gates(names, widths, torch.arange(1000)).like(order=int(lazy.gates.order), static=1)
    with torch.no_grad():
        gates.bias.fill_(-10.0)
        gates.bias[:, ::2] = 10.0
    lazy.set_gates(gates)
    return lazy


def two_calls(runner: Any, batch: int, timestep: int) -> None:
    """One call that computes and one that reuses, later than those of any larger `timestep`."""
    for now in (2 * timestep - 801, 2 * timestep - 802):
        runner(**inputs(batch, now))


def sampler(model: Any) -> Tensor:
    """Four calls of one image: random weights need no more to be quantized."""
    for timestep in (900, 700, 500, 300):
        found = model(**inputs(2, timestep))
    sample: Tensor = found.sample
    return sample


def dense_int8(model: nn.Module, format: str, folder: Path) -> Step:
    if format == "onnx":
        path = folder / "dense_int8.onnx"
        quantize_dynamic(
            folder / "dense.onnx", path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        session = ort.InferenceSession(str(path))
        return lambda b, t: session.run(None, {name: value.numpy() for name, value in inputs(b, t).items()})
    example = inputs(2, 500)
    dynamic = {name: {0: torch.export.Dim.AUTO} for name in example}
    dense = ov.convert_model(torch.export.export(model, (), example, dynamic_shapes=dynamic))
    data = [[value.numpy() for value in inputs(2, t).values()] for t in (900, 700, 500, 300)]
    quantized = nncf.quantize(dense, nncf.Dataset(data), model_type=nncf.ModelType.TRANSFORMER, subset_size=4)
    compiled = ov.Core().compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    return lambda b, t: request.infer([value.numpy() for value in inputs(b, t).values()])


if __name__ == "__main__":
    main()
