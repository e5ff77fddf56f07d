"""How long quantization takes as branches are added: one pass over the calibration set, whatever their number.

`python -m tests.benchmarks.compose_time [--layers 6 12] [--width 192] [--calls 8]`

A DiT of random weights with 64 tokens. Printed for each depth: branches, sampling runs, forward passes of the flat graph that
NNCF makes while it quantizes, and seconds; twice as many branches may take twice as long, not four times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nncf
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from lazycompress.compose.quantize import quantize
from lazycompress.recipe import Quantize
from lazycompress.runtime import LazyModel, wrap

from .page import PAGE_HELP, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--write", type=Path, help=PAGE_HELP)
    options = parser.parse_args()
    with written(options.write, "compose_time"):
        run(options)


def run(options: argparse.Namespace) -> None:
    for layers in options.layers:
        lazy, runs, passes = build(layers, options.width), [0], [0]
        started = time.perf_counter()
        with counted_passes(passes):
            quantize(lazy, sampler(options.calls, runs), Quantize(subset_size=options.calls))
        print(
            f"{len(lazy.branches)} branches: {runs[0]} sampling run of {options.calls} calls, NNCF reads {passes[0]} calls, "
            f"{time.perf_counter() - started:.1f} s",
            flush=True,
        )


def build(layers: int, width: int) -> LazyModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=layers,
        sample_size=16, patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    )  # fmt: skip
    return wrap(model.eval().requires_grad_(False), (), inputs(900))


def inputs(timestep: int) -> dict[str, Tensor]:
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(timestep))
    return {"hidden_states": noise, "timestep": torch.full((2,), timestep), "class_labels": torch.arange(2)}


def sampler(calls: int, runs: list[int]) -> Any:
    def run(model: Any) -> Tensor:
        runs[0] += 1
        for timestep in torch.linspace(980, 20, calls).int().tolist():
            found = model(**inputs(timestep))
        sample: Tensor = found.sample
        return sample

    return run


@contextmanager
def counted_passes(passes: list[int]) -> Iterator[None]:
    """Within the block, items that NNCF takes from a calibration set are counted."""
    original = nncf.Dataset.get_inference_data

    def counted(dataset: Any, indices: Any = None) -> Any:
        for item in original(dataset, indices):
            passes[0] += 1
            yield item

    nncf.Dataset.get_inference_data = counted
    try:
        yield
    finally:
        nncf.Dataset.get_inference_data = original


if __name__ == "__main__":
    main()
