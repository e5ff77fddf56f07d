"""How long an export takes as blocks are added: whole calls as one `If`, and each branch as one of its own.

`python -m tests.benchmarks.export_time [--calls 57] [--branches 12 24] [--format openvino onnx]`

A Flux transformer of tiny width and random weights: a third of its blocks has two streams, the others one, as in the 19 and 38
of the full model. Processor time of everything: locating the branches, tracing, converting, writing, and checking the file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import lazycompress
from lazycompress.runtime import wrap
from tests.export_models import alike, lively

from .page import PAGE_HELP, written


def build(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=blocks // 3, num_single_layers=blocks - blocks // 3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 8, 32, generator=generator),
        "pooled_projections": torch.randn(2, 32, generator=generator),
        "timestep": torch.full((2,), 1.0),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "guidance": torch.full((2,), 3.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, nargs="*", default=[57], help="blocks of models that skip whole calls")
    parser.add_argument("--branches", type=int, nargs="*", default=[12, 24], help="blocks of models that skip branches")
    parser.add_argument("--format", nargs="+", default=["openvino", "onnx"], choices=["openvino", "onnx"])
    parser.add_argument("--write", type=Path, help=PAGE_HELP)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with written(options.write, "export_time"):
        for blocks in options.calls:
            measure(blocks, "whole calls", options.format)
        for blocks in options.branches:
            measure(blocks, "branches", options.format)


def measure(blocks: int, units: str, formats: list[str]) -> None:
    times = torch.linspace(1, 0.05, 20)
    started = time.process_time()
    gates = lively(times, spread=0.0) if units == "branches" else alike(times)
    lazy = wrap(build(blocks), (), inputs(), gates)
    prepared = time.process_time() - started
    print(f"{blocks} blocks: {len(lazy.branches)} branches located in {prepared:.1f} s", flush=True)
    for format in formats:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            lazycompress.export(lazy, Path(folder) / "out", format=format)
        seconds = time.process_time() - started
        print(f"{blocks} blocks, {units}, {format:8}: {seconds:.1f} s, {seconds / blocks:.2f} s a block", flush=True)


if __name__ == "__main__":
    main()
