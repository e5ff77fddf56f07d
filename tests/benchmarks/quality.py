"""What compute buys: error to the dense images and Frechet distance against computed MACs, for every method at hand.

`python -m tests.benchmarks.quality [--model dit flow] [--seeds 0 1 2] [--images 128] [--write docs/quality.md]`

Same noise for all; 50 steps; two models: a DiT under DDIM, a rectified flow under Euler. `ours` is what the shipped recipes
learn by default, plans of whole calls, for each budget; `ours, branches` is one training of gates by branch at half the MACs, as
version 0.1 did by default, moved to the other budgets with `set_target`; their cost is counted. `MACs` are those of the whole
model over the whole loop. Published packages have to be brought to the budget by bisection: they, the paper's own training and
repeated outputs are run with the first seed. Seconds are processor time, on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import lazycompress
from lazycompress.integrations.digits.classifier import load_classifier
from lazycompress.integrations.digits.data import all_digits
from lazycompress.integrations.digits.flow import flow_sampler, load_flow
from lazycompress.integrations.digits.metrics import features, frechet_distance, mse_per_image
from lazycompress.integrations.digits.model import cycle_labels, digits_sampler, draw_noise, load_bundled
from lazycompress.lazy.model import LazyModule
from lazycompress.plan.learn import PlanReport
from lazycompress.plan.plan import even
from lazycompress.recipe_loading import load_recipe
from lazycompress.report import render
from lazycompress.runtime import LazyModel
from lazycompress.sampling import Sampler, build_sampler
from lazycompress.train.paper import set_threshold

from . import methods
from .methods import STEPS, NotAccepted, Run

TARGETS = (0.7, 0.5, 0.34, 0.25)
OTHER_STEPS = (20, 100)
#: Where the published packages are compared too.
FULL = 0.5


@dataclass(frozen=True)
class Case:
    """A model, its sampler, the recipe that trains it, and the modules that published hooks can take."""

    name: str
    build: Callable[[], nn.Module]
    sampler: Callable[[Tensor, Tensor, int], Sampler]
    recipe: str
    hooks: list[str]


CASES = {
    "dit": Case("DiT, DDIM", load_bundled, digits_sampler, "digits_dit.yaml", [r"transformer_blocks\.\d+\.(attn1|ff)"]),
    "flow": Case("RoPE + SwiGLU flow, Euler", load_flow, flow_sampler, "digits_flow.yaml", []),
}


@dataclass
class Row:
    model: str
    seed: int
    target: float
    method: str
    branches: float
    macs: float
    mean: float
    median: float
    p99: float
    frechet: float
    seconds: float


def one() -> float:
    return 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=128, help="fresh images per seed")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="rows as JSON, for resuming and --write")
    parser.add_argument("--write", type=Path, help="write the table and the plot from all rows in --out, run nothing")
    options = parser.parse_args()
    if options.write:
        from .quality_report import write

        write(options.out, options.write)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in options.model:
        for seed in options.seeds:
            path = options.out / f"{name}_{seed}.json"
            if path.exists():
                print(f"{path} is there: skipped")
                continue
            started = time.perf_counter()
            found = compare(CASES[name], seed, options.images)
            found["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{name}, seed {seed}: {time.perf_counter() - started:.0f} s")
            show(found)


def compare(case: Case, seed: int, images: int) -> dict[str, Any]:
    """All methods on one model with the noise of one seed."""
    model, classifier = case.build(), load_classifier()
    real = features(classifier, all_digits().images)
    noise = draw_noise(images, 10_000 + seed)
    rows: list[Row] = []
    notes: dict[str, str] = {}

    def sample(denoiser: Any, noise: Tensor, steps: int) -> Tensor:
        pairs = zip(noise.split(250), cycle_labels(len(noise)).split(250), strict=True)
        return torch.cat([case.sampler(x, y, steps)(denoiser) for x, y in pairs])

    dense = methods.timed(sample, model, noise, STEPS, one)
    base = frechet_distance(features(classifier, dense.images), real)
    cost: dict[str, dict[str, float]] = {}
    graph, cost["branches"] = train(case, model, {"units": "branches", "train.seed": seed})
    share = sum(branch.macs for branch in graph.branches) / graph.dense_macs
    timesteps = timesteps_of(case, STEPS)

    def add(
        method: str, target: float, make: Callable[[], Run], whole: bool = False, reference: Tensor | None = None
    ) -> None:
        try:
            run = make()
        except NotAccepted as reason:
            notes[method] = str(reason)
            return
        errors = mse_per_image(run.images, dense.images if reference is None else reference)
        macs = run.ratio if whole else run.ratio * share + 1 - share
        frechet = frechet_distance(features(classifier, run.images), real) / base
        rows.append(
            Row(
                case.name,
                seed,
                target,
                method,
                run.ratio,
                macs,
                float(errors.mean()),
                float(errors.median()),
                float(errors.quantile(0.99)),
                frechet,
                run.seconds,
            )
        )

    def ours(lazy: LazyModel | LazyModule, steps: int = STEPS) -> Run:
        lazy.reset()
        with lazycompress.image(lazy, timesteps=timesteps_of(case, steps)):
            return methods.timed(sample, lazy, noise, steps, lambda: lazy.summary().macs_ratio)

    def branches(lazy: LazyModel) -> Run:
        lazy.reset()
        return methods.timed(sample, lazy, noise, STEPS, lambda: lazy.summary().macs_ratio)

    def fewer(share_of_calls: float, steps: int = STEPS) -> Run:
        count = math.ceil(steps * share_of_calls - 1e-6)
        return methods.timed(sample, model, noise, count, lambda: count / steps)

    def evenly(target: float, order: int, times: Sequence[float] = timesteps) -> Run:
        return methods.planned(sample, model, noise, even(times, target, order))

    # What forecasts are worth is seen on one seed, and what the paper's own training gives.
    once = seed == 0
    if once:
        repeat, _ = train(case, model, {"units": "branches", "forecast": 0})
        paper, cost["paper"] = train(case, model, {"units": "branches", **PAPER})
    calibration = draw_noise(64, 20_000 + seed)
    for target in TARGETS:
        lazy, spent = train(case, model, {"target": target, "train.seed": seed})
        if target == FULL:
            half, cost["ours"] = lazy, spent
        add("ours", target, partial(ours, lazy), whole=True)
        add("fewer steps", target, partial(fewer, target), whole=True)
        for order, word in ((0, "repeating"), (1, "first order"), (2, "second order")):
            add(f"even calls, {word}", target, partial(evenly, target, order), whole=True)
        graph.set_target(target)
        add("ours, branches", target, partial(branches, graph))
        smooth = methods.smooth_cache(graph, sample, calibration, target)
        add("SmoothCache-style", target, partial(methods.follow, graph, sample, noise, smooth, 0))
        if not once:
            continue
        repeat.set_target(target)
        add("ours, branches, repeating", target, partial(branches, repeat))
        set_threshold(paper, training_sampler(case), target, 77 + seed)
        add("paper's training", target, partial(branches, paper))
        for order in (1, 2):
            add(
                f"diffusers TaylorSeer, order {order}",
                target,
                partial(methods.taylorseer, case.build, sample, noise, target, order, case.hooks),
            )
        if target != FULL:
            continue
        add(
            "diffusers first-block cache",
            target,
            partial(methods.first_block_cache, case.build, sample, noise, target),
        )
        for order, word in ((0, ""), (1, " + TaylorSeer")):
            add(
                f"cache-dit first block{word}",
                target,
                partial(methods.cache_dit_blocks, case.build, sample, noise, target, order),
            )
    for steps in OTHER_STEPS:
        other = methods.timed(sample, model, noise, steps, one).images
        moved = partial(add, target=FULL, whole=True, reference=other)
        moved(f"ours at {steps} steps, learned at {STEPS}", make=partial(ours, half, steps))
        moved(f"fewer than {steps} steps", make=partial(fewer, FULL, steps))
        for order, word in ((1, "first order"), (2, "second order")):
            moved(f"even calls at {steps} steps, {word}", make=partial(evenly, FULL, order, timesteps_of(case, steps)))
    return {
        "rows": [vars(row) for row in rows],
        "notes": notes,
        "dense": {"frechet": base, "seconds": dense.seconds},
        "cost": cost,
        "images": images,
    }


PAPER = {"train.method": "paper", "forecast": 0, "guards.max_reuse": 1000}


def train(case: Case, model: nn.Module, overrides: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """A lazy model, and what learning cost: processor seconds, and calls of the model in dense runs of what is learned on."""
    started = time.process_time()
    lazy = lazycompress.apply(model, case.recipe, overrides=overrides, progress=False)
    report = lazy.training_report
    calls = float(report.runs) if isinstance(report, PlanReport) else report.forwards / STEPS
    return lazy, {"seconds": time.process_time() - started, "runs": calls}


def training_sampler(case: Case) -> Sampler:
    sampling = load_recipe(case.recipe).sampling
    assert sampling is not None
    return build_sampler(sampling)


def timesteps_of(case: Case, steps: int) -> list[float]:
    seen: list[Tensor] = []

    def denoiser(**inputs: Any) -> Any:
        seen.append(inputs["timestep"][:1].float())
        zeros = torch.zeros_like(inputs["hidden_states"])
        return type("Output", (), {"sample": zeros})() if case.name == CASES["dit"].name else zeros

    _ = case.sampler(draw_noise(1), cycle_labels(1), steps)(denoiser)
    return [float(t) for t in torch.cat(seen)]


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['images']} images, {found['machine']}")
    for header in ("target", "method", "branches", "MACs", "mean MSE", "median", "99 %", "Frechet / dense", "CPU s"):
        table.add_column(header, justify="left" if header == "method" else "right")
    for row in found["rows"]:
        table.add_row(
            f"{row['target']}", row["method"], f"{row['branches']:.3f}", f"{row['macs']:.3f}", f"{row['mean']:.1e}",
            f"{row['median']:.1e}", f"{row['p99']:.1e}", f"{row['frechet']:.3f}", f"{row['seconds']:.1f}",
        )  # fmt: skip
    print(render(table), flush=True)
    for method, why in found["notes"].items():
        print(f"{method}: not run, {why}")
    print({method: {k: round(v, 2) for k, v in cost.items()} for method, cost in found["cost"].items()}, flush=True)


if __name__ == "__main__":
    main()
