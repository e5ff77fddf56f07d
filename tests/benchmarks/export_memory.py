"""Memory and size of an export: peak memory in units of the weights, and the lazy file against the dense one.

`python -m tests.benchmarks.export_memory [--shape XL/2] [--format openvino onnx]`

Every figure comes from a process of its own, whose largest resident size is read when it ends. "base" imports everything and
builds nothing. Random weights in float32.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .export_latency import SHAPES
from .page import PAGE_HELP, written

_BASE = "import torch, lazycompress, openvino, onnx, onnxruntime, nncf, diffusers\n"

_BUILD = """
from tests.benchmarks.export_latency import SHAPES, build, inputs, make
model = build(*SHAPES[{shape!r}])
print("weights", sum(p.numel() * p.element_size() for p in model.parameters()))
"""

_LAZY = """
lazy = make(model, 2)
lazycompress.export(lazy, {folder!r} + "/lazy", format={format!r}, check=False)
"""

_DENSE = """
example = inputs(2, 500)
dynamic = {{name: {{0: torch.export.Dim.AUTO}} for name in example}}
program = torch.export.export(model, (), example, dynamic_shapes=dynamic)
import os
os.makedirs({folder!r} + "/dense")
if {format!r} == "openvino":
    openvino.save_model(openvino.convert_model(program), {folder!r} + "/dense/model.xml", compress_to_fp16=False)
else:
    torch.onnx.export(program, (), dynamo=True, verbose=False).save({folder!r} + "/dense/model.onnx", external_data=True)
"""

_RUN = """
import numpy
from lazycompress.export.{format}_runner import {runner}
from tests.benchmarks.export_latency import inputs
run = {runner}({folder!r} + "/lazy")
for t in (900, 899, 898):
    run(**inputs(2, t))
"""

_PEAK = """
import resource
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def measured(code: str, **values: Any) -> dict[str, int]:
    """Run a program in a process of its own; what it printed, and its peak memory in bytes."""
    text = (_BASE + code + _PEAK).format(**values) if values else _BASE + code + _PEAK
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    pairs = [line.split() for line in done.stdout.splitlines() if line.startswith(("weights ", "peak "))]
    return {name: int(number) for name, number in pairs}


def size(folder: Path) -> int:
    """Bytes of a model's files, without the card and the recorded calls."""
    return sum(p.stat().st_size for p in folder.iterdir() if not p.name.startswith(("lazycompress", "check")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="XL/2", choices=list(SHAPES))
    parser.add_argument("--format", nargs="+", default=["openvino", "onnx"], choices=["openvino", "onnx"])
    parser.add_argument("--write", type=Path, help=PAGE_HELP)
    options = parser.parse_args()
    with written(options.write, "export_memory"):
        run(options)


def run(options: argparse.Namespace) -> None:
    base = measured("")["peak"]
    print(f"base {base / 1e9:.2f} GB", flush=True)
    for format in options.format:
        with tempfile.TemporaryDirectory() as name:
            values = {"shape": options.shape, "folder": name, "format": format}
            lazy = measured(_BUILD + _LAZY, **values)
            dense = measured(_BUILD + _DENSE, **values)
            runner = "OpenVINORunner" if format == "openvino" else "OnnxRunner"
            running = measured(_RUN, runner=runner, **values)["peak"]
            weights = lazy["weights"]
            ours, theirs = size(Path(name) / "lazy"), size(Path(name) / "dense")
        print(
            f"{options.shape} {format}: weights {weights / 1e9:.2f} GB; peak memory {lazy['peak'] / weights:.2f} times the "
            f"weights ({(lazy['peak'] - base) / weights:.2f} above base), dense export {dense['peak'] / weights:.2f}; "
            f"file {ours / theirs:.4f} of the dense file; running at batch 2: {running / weights:.2f} times the weights",
            flush=True,
        )


if __name__ == "__main__":
    main()
