"""What compute buys: error to the dense images and Frechet distance against computed MACs, for every method at hand.

`python -m tests.benchmarks.quality [--model dit flow] [--seeds 0 1 2] [--images 128] [--write docs/quality.md]`

Same noise for all; 50 steps; two models: a DiT under DDIM, a rectified flow under Euler. `ours` is one training at half the
MACs, moved to the other budgets with `set_target`; its cost is counted. `MACs` are those of the whole model over the
whole loop, `branches` those of the branches alone: the budget is on the latter. Published packages have to be brought to the
budget by bisection: they are run with the first seed, at half the MACs. Seconds are processor time, on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
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
from lazycompress.recipe_loading import load_recipe
from lazycompress.report import render
from lazycompress.runtime import LazyModel
from lazycompress.sampling import Sampler, build_sampler
from lazycompress.train.paper import set_threshold
from lazycompress.train.trainer import PROBES
from lazycompress.train.trajectory import linearise

from . import methods
from .methods import STEPS, NotAccepted, Run

TARGETS = (0.7, 0.5, 0.35, 0.25)
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
    parser.add_argument(
        "--cost", action="store_true", help="measure only the cost of training, again, for the rows in --out"
    )
    options = parser.parse_args()
    if options.write:
        from .quality_report import write

        write(options.out, options.write)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.cost:
        for name in options.model:
            measure_cost(CASES[name], sorted(options.out.glob(f"{name}_*.json")))
        return
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
    lazy, cost = train(case, model, {"train.seed": seed})
    share = sum(branch.macs for branch in lazy.branches) / lazy.dense_macs

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

    def ours(lazy: LazyModel, steps: int = STEPS) -> Run:
        lazy.reset()
        return methods.timed(sample, lazy, noise, steps, lambda: lazy.summary().macs_ratio)

    def fewer(share_of_macs: float, steps: int = STEPS) -> Run:
        count = math.ceil(steps * share_of_macs - 1e-6)
        return methods.timed(sample, model, noise, count, lambda: count / steps)

    # What forecasts are worth is seen on one seed.
    repeat = train(case, model, {"forecast": 0})[0] if seed == 0 else None
    paper, paper_cost = train(case, model, {**PAPER, "train.seed": seed})
    calibration = draw_noise(64, 20_000 + seed)
    for target in TARGETS:
        lazy.set_target(target)
        add("ours", target, partial(ours, lazy))
        add("fewer steps", target, partial(fewer, rows[-1].macs), whole=True)
        if repeat is not None:
            repeat.set_target(target)
            add("ours, repeating", target, partial(ours, repeat))
        set_threshold(paper, training_sampler(case), target, 77 + seed)
        add("paper's training", target, partial(ours, paper))
        smooth = methods.smooth_cache(lazy, sample, calibration, target)
        add("SmoothCache-style", target, partial(methods.follow, lazy, sample, noise, smooth, 0))
        uniform = methods.every(lazy, target)
        for order, word in ((0, "repeating"), (1, "first order"), (2, "second order")):
            add(f"every k-th step, {word}", target, partial(methods.follow, lazy, sample, noise, uniform, order))
        add("every k-th step, output forecast", target, partial(methods.forecast_whole, lazy, sample, noise, uniform))
        if target != FULL or seed:
            continue
        for order in (1, 2):
            add(
                f"diffusers TaylorSeer, order {order}",
                target,
                partial(methods.taylorseer, case.build, sample, noise, target, order, case.hooks),
            )
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
    lazy.set_target(0.5)
    for steps in OTHER_STEPS:
        other = methods.timed(sample, model, noise, steps, one).images
        lazy.set_target(0.5)
        add(f"ours, {steps} steps, as trained", 0.5, partial(ours, lazy, steps), reference=other)
        add(f"fewer than {steps} steps", 0.5, partial(fewer, rows[-1].macs, steps), whole=True, reference=other)
        lazy.set_target(0.5, timesteps_of(case, steps))
        add(f"ours, {steps} steps, moved to 0.5", 0.5, partial(ours, lazy, steps), reference=other)
        add(f"fewer than {steps} steps, at 0.5", 0.5, partial(fewer, rows[-1].macs, steps), whole=True, reference=other)
    return {
        "rows": [vars(row) for row in rows],
        "notes": notes,
        "dense": {"frechet": base, "seconds": dense.seconds},
        "cost": {"ours": cost, "paper": paper_cost},
        "images": images,
    }


PAPER = {"train.method": "paper", "forecast": 0, "guards.max_reuse": 1000}


def train(case: Case, model: nn.Module, overrides: dict[str, Any]) -> tuple[LazyModel, dict[str, float]]:
    """A trained model, and what training cost: seconds, and forward passes per step of every sampling run it made."""
    started = time.process_time()
    lazy = lazycompress.apply(model, case.recipe, overrides={"units": "branches", **overrides}, progress=False)
    seconds = time.process_time() - started
    report = lazy.training_report
    by_time = per_step(case, model, lazy) if report.runs else float("nan")
    return lazy, {"seconds": seconds, "forwards": report.forwards, "per_step": by_time}


def per_step(case: Case, model: nn.Module, lazy: LazyModel) -> float:
    """Seconds that a training run takes per step, in units of a dense forward pass of the same batch."""
    sampler = training_sampler(case)
    dense = partial(sampler, model)
    training = partial(linearise, lazy, sampler, None, seed=0, probes=PROBES, max_age=lazy.recipe.guards.max_reuse)
    with torch.no_grad():
        base = least_seconds(dense)
    return least_seconds(training) / base


def least_seconds(work: Callable[[], object], times: int = 4) -> float:
    """Processor time of a call, the least of several."""
    seconds = []
    for _ in range(times):
        started = time.process_time()
        _ = work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def measure_cost(case: Case, rows: list[Path]) -> None:
    """What a step of a training run costs, measured apart: on a busy machine it comes out too high."""
    model = case.build()
    lazy = lazycompress.apply(
        model, case.recipe, overrides={"units": "branches", "train.enabled": False}, progress=False
    )
    lazy.set_gates(lazy.gates.like(order=lazy.recipe.polynomial, static=1))
    found = per_step(case, model, lazy)
    print(f"{case.name}: a step of a training run takes {found:.2f} times as long as a dense forward pass", flush=True)
    for path in rows:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept["cost"]["ours"]["per_step"] = found
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def training_sampler(case: Case) -> Sampler:
    sampling = load_recipe(case.recipe).sampling
    assert sampling is not None
    return build_sampler(sampling)


def timesteps_of(case: Case, steps: int) -> Tensor:
    seen: list[Tensor] = []

    def denoiser(**inputs: Any) -> Any:
        seen.append(inputs["timestep"][:1].float())
        zeros = torch.zeros_like(inputs["hidden_states"])
        return type("Output", (), {"sample": zeros})() if case.name == CASES["dit"].name else zeros

    _ = case.sampler(draw_noise(1), cycle_labels(1), steps)(denoiser)
    return torch.cat(seen)


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
