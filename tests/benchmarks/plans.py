"""Plans of whole calls: true error on fresh noise against even plans and fewer steps, at equal numbers of calls.

`python -m tests.benchmarks.plans [--model dit flow] [--seeds 0 1 2] [--images 128]`

One calibration and one judging for each target; what learning spent is in the report's line. 50 steps, one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from lazycompress.integrations.digits.flow import flow_sampler, load_flow
from lazycompress.integrations.digits.model import digits_sampler, load_bundled
from lazycompress.plan.judge import judge_against, refer
from lazycompress.plan.learn import learn_plan
from lazycompress.plan.record import calibrate
from lazycompress.plan.runs import noise_of
from lazycompress.plan.search import evens
from lazycompress.report import render
from lazycompress.sampling import Sampler

STEPS = 50
TARGETS = (0.7, 0.5, 0.34, 0.25)
BATCH = 32

MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[Tensor, Tensor, int], Sampler]]] = {
    "dit": (load_bundled, digits_sampler),
    "flow": (load_flow, flow_sampler),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=128, help="fresh images per seed")
    parser.add_argument("--targets", nargs="*", type=float, default=list(TARGETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.model:
        for seed in options.seeds:
            print(render(compare(name, seed, options.images, options.targets)), flush=True)


def compare(name: str, seed: int, images: int, targets: list[float]) -> Table:
    """Errors of one model's plans, learned with one seed, on noise of another."""
    build, sampler_of = MODELS[name]
    model = build()
    small, large = (partial(sample, sampler_of, count=count, steps=STEPS) for count in (BATCH, images))
    calibration = calibrate(model, small, read=read, seed=1000 * seed, progress=False)
    fresh = 50_000 + seed
    reference = refer(model, large, read=read, seeds=[fresh])
    dense = reference.finals[fresh]
    table = Table(title=f"{name}, seed {seed}, {images} images")
    for header in ("target", "plan", "calls", "mean", "median", "99 %"):
        table.add_column(header, justify="left" if header == "plan" else "right")

    def add(target: float, what: str, calls: int, errors: np.ndarray) -> None:
        values = (float(errors.mean()), float(np.median(errors)), float(np.quantile(errors, 0.99)))
        table.add_row(f"{target}", what, str(calls), *(f"{value:.1e}" for value in values))

    for target in targets:
        budget = 15 - calibration.calls / STEPS
        learned = learn_plan(
            model, small, target, read=read, calibration=calibration, seed=1000 * seed, budget=budget, progress=False
        )
        print(f"{name}: {learned.report}", flush=True)
        rows = [("ours", learned.plan)]
        rows += [(f"even, order {plan.order}", plan) for plan in evens(calibration, target)]
        for what, plan in rows:
            add(target, what, sum(plan.computes), judge_against(reference, model, large, plan).errors)
        fewer = sum(learned.plan.computes)
        with torch.no_grad(), noise_of(fresh):
            final = sample(sampler_of, model, count=images, steps=fewer).double()
        add(target, "fewer steps", fewer, (final - dense).flatten(1).square().mean(dim=1).numpy())
    return table


def sample(sampler_of: Callable[[Tensor, Tensor, int], Sampler], model: Any, *, count: int, steps: int) -> Tensor:
    """Images of new noise and labels from torch's global generator."""
    noise, labels = torch.randn(count, 1, 8, 8), torch.randint(0, 10, (count,))
    return sampler_of(noise, labels, steps)(model)


def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    return float(kwargs["timestep"][0])


if __name__ == "__main__":
    main()
