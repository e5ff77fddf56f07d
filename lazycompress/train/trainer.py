"""Stage 4, train: gates that meet a budget, judged by the final image, in the user's own sampling loop.

1. Around the dense trajectory, the effects of every decision are measured and a schedule is filled up to the target.
2. Around that schedule, the effects are measured again, with reuse as it really happens, and decisions are exchanged.
   A round is kept only if the true error on held-out noise fell.
3. The schedule becomes the gates' table: for how long an output keeps, per branch, on the sampler's own timesteps. The
   order in which decisions were taken is kept with it, so that `set_target` can move along the frontier afterwards.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, RecipeError
from ..gate import Gates
from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler
from .schedule import Bools, Limits, Planner, whole_steps
from .trajectory import Effects, linearise, run

_log = logging.getLogger(__name__)

PROBES = 1
ROUNDS = 2
RUNS = 8
SWAPS = 8

#: Budgets that a training of full effort leaves a schedule for, besides its own target.
FRONTIER = (0.85, 0.7, 0.5, 0.35, 0.25)

#: Whole-step schedules that are tried: how many steps are computed first, and how the others are spread, see `whole_steps`.
WHOLE = ((1, 0.65), (1, 0.8), (2, 0.8), (1, 1.0))


@dataclass
class TrainReport:
    """What training did.

    Attributes:
        target: asked-for computed share of the branches' MACs.
        macs_ratio: computed share of the schedule found.
        error: mean squared error of held-out final latents to the dense ones; median and 99th percentile too.
        forwards: model calls spent, a backward pass counted as two.
        seconds: wall time.
        history: error after each round.
        runs: sampling runs made, with or without gradients; 0 if training is not made of such.
    """

    target: float
    macs_ratio: float
    error: float
    median: float
    p99: float
    forwards: float
    seconds: float
    history: list[float] = field(default_factory=list)
    runs: int = 0

    def __str__(self) -> str:
        return (
            f"learned in {self.seconds:.0f} s ({self.forwards:.0f} forward passes): {self.macs_ratio:.1%} of the branch MACs "
            f"computed, error to dense {self.error:.1e} (median {self.median:.1e}, 99th percentile {self.p99:.1e})"
        )


def train_gates(lazy: LazyModel, sampler: Sampler, recipe: Recipe, *, progress: bool = True) -> TrainReport:
    """Learn the gates of a lazy model; its weights are left as they are.

    Args:
        lazy: the model; its gates are replaced.
        sampler: runs one denoising loop with the model it is given, with gradients, and returns the final latents
            [batch, ...]; it draws its noise from torch's global generator, which is restored afterwards.
        recipe: target, guards and training section.
        progress: show a progress bar.

    Raises:
        InputError: no gradient reaches the model through the sampler, or it makes a varying number of calls.
        RecipeError: a pattern of `guards.exclude` matches no branch, or the guards leave too little to reuse.
    """
    started = time.perf_counter()
    excluded = excluded_branches(lazy, recipe.guards.exclude)
    rounds = max(1, round(ROUNDS * recipe.train.effort))
    runs = max(1, round(RUNS * min(1.0, recipe.train.effort)))
    others = FRONTIER if recipe.train.effort >= 1.0 else ()
    seeds = iter(range(recipe.train.seed * 1_000_003 + 1, 2**62))
    generator_state = torch.get_rng_state()
    bar = tqdm(
        total=(rounds + 1) * runs + rounds + 2 + len(others), desc="learning gates", unit="run", disable=not progress
    )
    forwards = 0.0
    try:
        images: dict[int, Tensor] = {}
        noise = [next(seeds) for _ in range(runs)]

        def measure(schedule: Tensor | None) -> Effects:
            parts = []
            for seed in noise:
                parts.append(
                    linearise(
                        lazy, sampler, schedule, seed=seed, probes=PROBES, max_age=recipe.guards.max_reuse,
                        dense=images.get(seed),
                    )
                )  # fmt: skip
                if schedule is None:
                    images[seed] = parts[-1].final
                bar.update()
            return Effects.join(parts)

        lazy.gates.order.fill_(int(recipe.forecast))
        tell_calls_apart(lazy, sampler)
        effects = measure(None)
        forwards += effects.forwards
        limits = _limits(effects, recipe, excluded, len(lazy.branches))
        macs = [branch.macs for branch in lazy.branches]
        order = int(lazy.gates.order)
        planner = Planner(effects, macs, limits, order)
        fullest, preferred = planner.fill(0.0)
        least = planner.macs_ratio(fullest)
        if least > recipe.target + 0.02:
            raise RecipeError(
                f"target {recipe.target}: the guards leave at most {1 - least:.0%} of the branch MACs to reuse over "
                f"{effects.effects.shape[2]} steps; loosen guards (max_reuse, warmup_steps, last_steps, exclude)"
            )
        held_out = [next(seeds) for _ in range(2)]
        dense = [_seeded(lazy, sampler, None, seed) for seed in held_out]
        bar.update()

        def true_error(candidate: Bools) -> Tensor:
            images = [_seeded(lazy, sampler, torch.from_numpy(candidate), seed) for seed in held_out]
            pairs = zip(images, dense, strict=True)
            return torch.cat([(a - b).square().reshape(a.shape[0], -1).mean(dim=1) for a, b in pairs])

        def start(target: float) -> tuple[Bools, Tensor]:
            """The best of the schedules to start from: decisions one by one, and whole steps.

            First-order effects around the dense trajectory do not see that branches which are reused together do not react
            to each other; where that matters, whole steps are better.
            """
            found = [planner.swap(target, planner.fill(target)[0], rounds=100)]
            found += [s for s in (whole_steps(planner, target, *how) for how in WHOLE) if s is not None]
            errors = [true_error(candidate) for candidate in found]
            bar.update()
            best = min(range(len(found)), key=lambda k: _robust(errors[k], errors[0]))
            _log.debug("target %s: mean errors one by one, whole steps %s", target, [f"{e.mean():.1e}" for e in errors])
            return found[best], errors[best]

        schedule, errors = start(recipe.target)
        frontier = [start(t)[0] for t in others if t > least and abs(t - recipe.target) > 0.02]
        history = [float(errors.mean())]
        steps = len(effects.timesteps)
        forwards += steps * len(held_out) * (1 + (1 + len(frontier)) * (1 + len(WHOLE)))
        for _ in range(rounds):
            around = measure(torch.from_numpy(schedule))
            forwards += around.forwards + steps * len(held_out)
            local = Planner(around, macs, limits, order)
            candidate = local.swap(recipe.target, schedule, rounds=SWAPS)
            candidate_errors = true_error(candidate)
            bar.update()
            if _robust(candidate_errors, errors) < _robust(errors, errors):
                schedule, errors = candidate, candidate_errors
            history.append(float(errors.mean()))
            bar.set_postfix(error=f"{history[-1]:.1e}", macs=f"{planner.macs_ratio(schedule):.3f}")
    finally:
        bar.close()
        torch.set_rng_state(generator_state)
    taken = set(preferred)
    rest = [(int(t), int(b)) for t, b in np.argwhere(limits.allowed) if (int(t), int(b)) not in taken]
    gates = _gates_of(lazy, effects.times, [schedule, *frontier], [*preferred, *rest])
    gates.longest.fill_(recipe.guards.max_reuse)
    lazy.set_gates(gates)
    return TrainReport(
        recipe.target, planner.macs_ratio(schedule), float(errors.mean()), float(errors.median()),
        float(errors.quantile(0.99)), forwards, time.perf_counter() - started, history, (rounds + 1) * runs,
    )  # fmt: skip


def excluded_branches(lazy: LazyModel, patterns: list[str]) -> list[int]:
    """Numbers of the branches that names, or patterns that begin with `re:`, match.

    Raises:
        RecipeError: a pattern matches nothing, or is not a regular expression; says what there was.
    """
    names = [branch.name for branch in lazy.branches]
    found: set[int] = set()
    for pattern in patterns:
        try:
            expression = re.compile(pattern[3:] if pattern.startswith("re:") else re.escape(pattern))
        except re.error as error:
            raise RecipeError(f"guards.exclude: {pattern!r} is not a regular expression: {error}") from None
        matched = {i for i, name in enumerate(names) if expression.fullmatch(name)}
        if not matched:
            raise RecipeError(f"guards.exclude: {pattern!r} matches none of the branches {', '.join(names)}")
        found |= matched
    return sorted(found)


def _limits(effects: Effects, recipe: Recipe, excluded: list[int], branches: int) -> Limits:
    steps = len(effects.timesteps)
    allowed = np.tile(effects.may_reuse.numpy()[:, None], (1, branches))
    allowed[: recipe.guards.warmup_steps] = False
    allowed[max(0, steps - recipe.guards.last_steps) :] = False
    allowed[:, excluded] = False
    return Limits(allowed, recipe.guards.max_reuse)


def _seeded(lazy: LazyModel, sampler: Sampler, schedule: Tensor | None, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return run(lazy, sampler, schedule)


def _robust(errors: Tensor, reference: Tensor) -> float:
    scale = 4 * float(reference.median()) or 1.0
    return float(torch.log1p(errors / scale).mean())


def tell_calls_apart(lazy: LazyModel, sampler: Sampler) -> None:
    """Set the gates' phase if the sampler calls the model twice at a timestep, as second-order ones do."""
    tape: list[float] = []
    hook = lazy.register_forward_hook(lambda module, *_: tape.append(module.timestep) if module.context == 0 else None)
    torch.manual_seed(0)
    try:
        _ = run(lazy, sampler, None)
    finally:
        hook.remove()
    gaps = [abs(a - b) for a, b in pairwise(tape) if a != b]
    lazy.gates.direction.fill_(-1.0 if len(tape) > 1 and tape[-1] > tape[0] else 1.0)
    lazy.reset()
    lazy.gates.phase.fill_(min(gaps) / 2 if gaps and len(gaps) < len(tape) - 1 else 0.0)


def _gates_of(lazy: LazyModel, times: Tensor, schedules: list[Bools], order: list[tuple[int, int]]) -> Gates:
    """Gates that follow the first of some schedules [calls, branches] and know the others.

    `order` is all that may be reused (call, branch), the safest first.
    """
    rises = bool(times[-1] > times[0])
    phase = float(lazy.gates.phase)
    steps = times[1:] - times[:-1]
    if not bool((steps > 0).all() if rises else (steps < 0).all()):
        raise InputError(
            f"the sampler's timesteps neither rise nor fall: {[round(t, 3) for t in times.tolist()[:6]]}, ..."
        )
    names, widths = [b.name for b in lazy.branches], [b.width for b in lazy.branches]
    gates = Gates(names, widths, times, -1 if rises else 1)
    gates.phase.fill_(phase)
    gates.order.copy_(lazy.gates.order.cpu())
    gates.static.fill_(1)
    for k, (t, b) in enumerate(order):
        gates.rank[b, t] = k
    tables = torch.stack([torch.from_numpy(schedule.T.copy()) for schedule in schedules])
    if not rises:
        tables, gates.rank = tables.flip(2), gates.rank.flip(1)
    gates.frontier = tables
    gates.follow(tables[0], gates.rank.isfinite())
    return gates.to(lazy.device)
