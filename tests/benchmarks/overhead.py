"""What laziness costs beside the model, in torch: calls that compute against the plain module, and calls that are skipped.

`python -m tests.benchmarks.overhead [--shape S/2 B/2] [--batch 2] [--repeats 12]`

Shapes are those of DiT at 256 pixels with random weights. "module" runs the user's own module by a plan of whole calls, "graph"
is what `units: branches` runs. All are called in turn with the same inputs, images after one another; the median of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lazycompress.lazy.calls import Reader
from lazycompress.lazy.engine import Engine
from lazycompress.lazy.model import LazyModule
from lazycompress.plan.plan import even

from .export_latency import SHAPES, build, force, inputs, make
from .page import PAGE_HELP, written

#: Of an image; every second call computes.
STEPS = 8
TIMES = [900.0 - 100 * step for step in range(STEPS)]

#: Images before those that count.
FIRST = 2


def lazy_module(model: nn.Module) -> LazyModule:
    return LazyModule(model, Engine(Reader.of(model), even(TIMES, 0.5, order=2)))


def image(call: Callable[..., Any], batch: int) -> tuple[list[float], list[Tensor]]:
    """Seconds of each call of one image, and the latents that went in."""
    given = inputs(batch, 0)
    latents, seconds = given["hidden_states"], []
    seen = []
    for timestep in TIMES:
        now = given | {"hidden_states": latents, "timestep": torch.full((batch,), int(timestep))}
        begun = time.perf_counter()
        output = call(**now, return_dict=False)[0]
        seconds.append(time.perf_counter() - begun)
        seen.append(latents)
        latents = latents - 0.05 * output[:, : latents.shape[1]]
    return seconds, seen


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    for shape in options.shape:
        model = build(*SHAPES[shape])
        module, graph = lazy_module(model), make(model, 2)
        for batch in options.batch:
            found: dict[str, list[float]] = {"plain": [], "module, computing": [], "module, skipped": []}
            found |= {"graph, computing": [], "graph, all reused": []}
            for number in range(options.repeats + FIRST):
                kept = found if number >= FIRST else {name: [] for name in found}
                kept["plain"] += image(model, batch)[0][1:]
                seconds = image(module, batch)[0]
                kept["module, computing"] += seconds[2::2]  # the first call has an image to begin
                kept["module, skipped"] += seconds[1::2]
                for name, share in (("graph, computing", 0.0), ("graph, all reused", 1.0)):
                    force(graph, share)
                    kept[name] += image(graph, batch)[0][1:]
            base = median(found["plain"])
            for name, seconds in found.items():
                print(
                    f"{shape:4} batch {batch}: {name:20} {median(seconds) * 1e3:9.2f} ms  {median(seconds) / base:.4f} of plain"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["S/2", "B/2"], choices=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[2])
    parser.add_argument("--repeats", type=int, default=12, help="images of each that count")
    parser.add_argument("--write", type=Path, metavar="PAGE", help=PAGE_HELP)
    options = parser.parse_args()
    torch.set_num_threads(2)
    with written(options.write, "overhead"):
        run(options)


if __name__ == "__main__":
    main()
