"""Time to locate branches against the number of graph nodes: `python -m tests.benchmarks.locate_scaling`.

Prints milliseconds of CPU time for 2 to 60 blocks, the least of several interleaved runs, and how much faster than the node
count they grow; then the same for a text-to-image model of 19 two-stream and 38 single-stream blocks at real widths, on the
meta device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lazycompress.graph.branch import Branch
from lazycompress.graph.call import take_apart
from lazycompress.graph.capture import capture
from lazycompress.graph.locate import locate_branches
from tests.zoo.styles_parts import AdaBlock, ImageDenoiser, image_inputs

#: Most that the time per node at 60 blocks may be, relative to that at 2 blocks.
LIMIT = 1.2


def timings_of(sizes: Sequence[int], repeats: int = 12) -> list[tuple[float, int]]:
    """Least CPU seconds and number of nodes of an image model with each of these numbers of blocks."""
    captures = []
    for blocks in sizes:
        model = ImageDenoiser(AdaBlock, depth=blocks).eval().requires_grad_(False)
        captures.append(capture(model, take_apart(model, (), image_inputs(2, 0))))
    best = [float("inf")] * len(captures)
    for _ in range(repeats):
        for k, captured in enumerate(captures):
            start = time.process_time()
            locate_branches(captured.graph_module.graph, captured.batch)
            best[k] = min(best[k], time.process_time() - start)
    return [(seconds, len(c.graph_module.graph.nodes)) for seconds, c in zip(best, captures, strict=True)]


def growth(timings: list[tuple[float, int]]) -> float:
    """Time per node of the last timing relative to the first: 1 is linear."""
    (first, few), (last, many) = timings[0], timings[-1]
    return (last / many) / (first / few)


def large_model() -> tuple[nn.Module, dict[str, Any]]:
    """57 blocks at the widths of a 12-billion-parameter model, without storage, and inputs for 1024 x 1024 pixels."""
    from diffusers.models import transformers

    with torch.device("meta"):
        model = transformers.FluxTransformer2DModel(guidance_embeds=True).eval().requires_grad_(False)
        inputs: dict[str, Tensor] = {
            "hidden_states": torch.empty(2, 4096, 64),
            "encoder_hidden_states": torch.empty(2, 512, 4096),
            "pooled_projections": torch.empty(2, 768),
            "timestep": torch.empty(2),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
            "guidance": torch.empty(2),
        }
    return model, inputs


def locate_large() -> tuple[list[Branch], float, float, int]:
    """Branches of `large_model`, CPU seconds to capture and to locate, and the number of nodes."""
    model, inputs = large_model()
    start = time.process_time()
    captured = capture(model, take_apart(model, (), inputs))
    middle = time.process_time()
    branches = locate_branches(captured.graph_module.graph, captured.batch)
    return branches, middle - start, time.process_time() - middle, len(captured.graph_module.graph.nodes)


def main() -> None:
    """Print the table and the verdict."""
    torch.set_num_threads(1)
    sizes = (2, 4, 8, 16, 30, 60)
    timings = timings_of(sizes)
    print("blocks  nodes      ms  us/node")
    for blocks, (seconds, nodes) in zip(sizes, timings, strict=True):
        print(f"{blocks:6d} {nodes:6d} {seconds * 1e3:7.2f} {seconds / nodes * 1e6:8.2f}")
    ratio = growth(timings)
    print(f"growth against linear, 2 to 60 blocks: {ratio:.2f} (at most {LIMIT})")
    branches, captured, located, nodes = locate_large()
    print(
        f"57 blocks on the meta device: {len(branches)} branches, {sum(b.macs for b in branches) / 1e12:.2f} TMACs per sample;"
    )
    print(f"captured in {captured:.1f} s, located in {located:.2f} s, {nodes} nodes")


if __name__ == "__main__":
    main()
