"""Size of a file with 4-bit weights against the dense float32 file.

`python -m tests.benchmarks.compose_size [--shape B/2] [--format openvino onnx] [--recipe lazy_dit_int4.yaml]`

Shapes are those of DiT at 256 px with random weights; weights are stored as the recipe says, or quantized if it has no section
`weights`. Branches have 4 bits with a scale for each group, all other layers 8.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import lazycompress
from lazycompress.compose.quantize import compress_weights, quantize
from lazycompress.recipe_loading import load_recipe

from .compose_latency import sampler
from .export_latency import SHAPES, build, make
from .export_memory import size
from .page import PAGE_HELP, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["B/2"], choices=list(SHAPES))
    parser.add_argument("--format", nargs="+", default=["openvino", "onnx"], choices=["openvino", "onnx"])
    parser.add_argument("--recipe", nargs="+", default=["lazy_dit_int4.yaml"])
    parser.add_argument("--write", type=Path, help=PAGE_HELP)
    options = parser.parse_args()
    with written(options.write, "compose_size"):
        run(options)


def run(options: argparse.Namespace) -> None:
    for shape in options.shape:
        model = build(*SHAPES[shape])
        dense = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        for name in options.recipe:
            lazy, recipe = make(model, 2), load_recipe(name)
            if recipe.weights is not None:
                print(f"{shape} {name}: {compress_weights(lazy, sampler, recipe.weights)}", flush=True)
            elif recipe.quantize is not None:
                few = recipe.quantize.model_copy(update={"subset_size": 4})
                print(f"{shape} {name}: {quantize(lazy, sampler, few)}", flush=True)
            for format in options.format:
                with tempfile.TemporaryDirectory() as folder:
                    bytes_ = size(lazycompress.export(lazy, Path(folder) / "out", format=format, check=False))
                print(
                    f"{shape} {name} {format}: {bytes_ / 1e6:.1f} MB, {bytes_ / dense:.4f} of the {dense / 1e6:.1f} MB of "
                    "the dense model's weights in float32",
                    flush=True,
                )


if __name__ == "__main__":
    main()
