"""Lazy models under `torch.compile`: graph breaks, and time against eager: `python -m tests.benchmarks.compiled [--no-timing]`.

The bundled model, gates that compute every branch at every second step, decided by schedule (static) or by sample. A break
inside the network costs a return to Python at a branch; those outside are the bookkeeping of a call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lazycompress.gates import Gates
from lazycompress.graph.branch import Branch
from lazycompress.integrations.digits.model import load_bundled
from lazycompress.runtime import LazyModel, wrap

STEPS = 10


def make_gates(branches: list[Branch], static: bool = True) -> Gates:
    """Every branch computes at every second step; by sample, weights are there that add to each score."""
    gates = Gates([b.name for b in branches], [b.width for b in branches], torch.linspace(50, 950, STEPS))
    gates.order.fill_(1)
    schedule = torch.tensor([[(b + s) % 2 == 0 for s in range(STEPS)] for b in range(len(branches))])
    gates.follow(schedule, torch.ones_like(schedule))
    gates.static.fill_(int(static))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in () if static else gates.weights:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return gates


def compile_network(lazy: LazyModel, **options: Any) -> None:
    """Compile what a lazy model runs for calls like its example, without the bookkeeping around it, in place."""
    lazy.program(lazy.example).runs(lazy.gates).graph_module.compile(**options)


def breaks_of(lazy: LazyModel, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Graph breaks of one call under `torch.compile`: at branches of the network, and outside of it."""
    torch._dynamo.reset()
    with torch.no_grad():
        found: Any = torch._dynamo.explain(lazy)(**inputs)
    at_branch = 0
    for reason in found.break_reasons:
        at_branch += any("lazy_branch" in frame.filename for frame in reason.user_stack or ())
    return at_branch, found.graph_break_count - at_branch


def one_image(call: Callable[..., Any], batch: int) -> Tensor:
    """The last output of a loop over all steps."""
    latents = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(batch) % 10
    output = latents
    for timestep in torch.linspace(950, 50, STEPS):
        with torch.no_grad():
            output = call(hidden_states=latents, timestep=timestep.repeat(batch), class_labels=labels).sample
        latents = latents - 0.05 * output
    return output


def seconds_of(call: Callable[..., Any], batch: int, repeats: int = 5) -> float:
    """Least wall-clock seconds of one image, after one to warm up."""
    one_image(call, batch)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        one_image(call, batch)
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-timing", action="store_true", help="count breaks only; no C++ compiler is needed")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    model: nn.Module = load_bundled()
    batch = options.batch
    example = {
        "hidden_states": torch.randn(batch, 1, 8, 8),
        "timestep": torch.full((batch,), 950.0),
        "class_labels": torch.arange(batch) % 10,
    }
    print("gates      breaks at branches  breaks outside  ms/image eager  compiled  times faster")
    for static in (True, False):
        lazy = wrap(model, (), example, lambda branches, static=static: make_gates(branches, static))
        inside, outside = breaks_of(lazy, example)
        line = f"{'static' if static else 'by sample':10} {inside:18d} {outside:15d}"
        if not options.no_timing:
            lazy.reset()
            eager = seconds_of(lazy, batch)
            compile_network(lazy, fullgraph=static)
            lazy.reset()
            fast = seconds_of(lazy, batch)
            line += f" {eager * 1e3:15.0f} {fast * 1e3:9.0f} {eager / fast:13.2f}"
        print(line, flush=True)
    if not options.no_timing:
        eager = seconds_of(model, batch)
        fast = seconds_of(torch.compile(model), batch)
        print(f"{'dense':10} {0:18d} {0:15d} {eager * 1e3:15.0f} {fast * 1e3:9.0f} {eager / fast:13.2f}")


if __name__ == "__main__":
    main()
