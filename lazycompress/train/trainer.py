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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, RecipeError
from ..gates import Gates
from ..noise import own_noise
from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler
from .budget import Budget
from .changing import Changing, listed
from .checkpoint import Checkpoint, about
from .distributed import Group
from .memory import check_memory
from .runs import Judged, Progress, Runs, progress_bar
from .schedule import Bools, Limits, Planner
from .trajectory import Effects, run
from .whole import exchanged, is_whole, of_whole, steps_of

_log = logging.getLogger(__name__)

PROBES = 1
ROUNDS = 2
RUNS = 8
SWAPS = 8
HELD_OUT = 2

#: Budgets that a training of full effort leaves a schedule for, besides its own target.
FRONTIER = (0.85, 0.7, 0.5, 0.35, 0.25)

#: Schedules that are tried before the rounds: decisions one by one, and whole steps.
STARTS = 2


@dataclass
class TrainReport:
    """What training did.

    Attributes:
        target: asked-for computed share of the branches' MACs, the first of a list.
        macs_ratio: computed share of the schedule found.
        error: mean squared error of held-out final latents to the dense ones; median and 99th percentile too.
        relative: the mean error as a share of the variance of the dense latents: 1 is as far away as another image.
        forwards: model calls spent, a backward pass counted as two.
        seconds: wall time.
        history: error after each round.
        runs: sampling runs made, with or without gradients; 0 if training is not made of such.
        frontier: computed shares of the schedules that `set_target` starts from, the one in force first.
        unfrozen: mean error of the gates that a static schedule was frozen from, on the same noise as `error`; None if it
            was not.
    """

    target: float
    macs_ratio: float
    error: float
    median: float
    p99: float
    relative: float
    forwards: float
    seconds: float
    history: list[float] = field(default_factory=list)
    runs: int = 0
    frontier: list[float] = field(default_factory=list)
    unfrozen: float | None = None

    @staticmethod
    def of(target: float, judged: Judged, **rest: Any) -> TrainReport:
        """A report of held-out images.

        Raises:
            RecipeError: they are not of finite numbers.
        """
        errors = judged.errors
        if not bool(errors.isfinite().all()):
            raise RecipeError(
                f"target {target}: with so much reuse the final latents are no longer finite; raise target, or lower "
                "guards.max_reuse or forecast"
            )
        mean, median, p99 = float(errors.mean()), float(errors.median()), float(errors.quantile(0.99))
        return TrainReport(target=target, error=mean, median=median, p99=p99, relative=judged.relative, **rest)

    def __str__(self) -> str:
        frozen = "" if self.unfrozen is None else f"; frozen from gates with error {self.unfrozen:.1e}"
        return (
            f"learned in {self.seconds:.0f} s ({self.forwards:.0f} forward passes): {self.macs_ratio:.1%} of the branch MACs "
            f"computed, error to dense {self.relative:.1e} of the latents' variance ({self.error:.1e}, median {self.median:.1e}, "
            f"99th percentile {self.p99:.1e}){frozen}"
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
        InputError: no gradient reaches the model through the sampler, it makes a varying number of calls, none of its calls
            goes on from another, or its run does not fit into memory.
        RecipeError: a pattern of `guards.exclude` matches no branch, there is no branch of a kind in
            `guards.kind_targets`, or the guards leave too little to reuse.
    """
    started = time.perf_counter()
    effort = _Effort.of(recipe)
    excluded = excluded_branches(lazy, recipe.guards.exclude)
    budgets = [Budget.of(lazy.branches, target, recipe.guards.kind_targets) for target in recipe.targets]
    group = Group.find()
    with own_noise(), progress_bar(effort.total(len(budgets)), "run", progress and group.main) as bar:
        if (int(lazy.gates.order), int(lazy.gates.static)) != (recipe.polynomial, 1):
            # Of the form that they will have: static gates read no streams for scores that nobody asks for here.
            lazy.set_gates(lazy.gates.like(order=recipe.polynomial, static=1))
        calls = tell_calls_apart(lazy, sampler)
        check_memory(lazy, sampler, recipe, sum(map(len, calls)), group)
        checkpoint = Checkpoint(recipe.train.checkpoint, about(lazy, recipe, calls[0]), group.main)
        runs = Runs(
            lazy, sampler, recipe, group, steps=len(calls[0]), checkpoint=checkpoint, advance=bar.advance,
        )  # fmt: skip
        search = _Search(lazy, recipe, runs, effort, excluded, bar)
        found = [search.find(budget) for budget in budgets]
        others = [search.start(budget)[0] for budget in search.beside(budgets)]
        schedules = [schedule for schedule, _, _ in found] + others
        gates = _gates_of(lazy, search.times, schedules, search.order(schedules[0]))
    gates.longest.fill_(recipe.guards.max_reuse)
    lazy.set_gates(gates)
    _, errors, history = found[0]
    ratios = [search.planner.macs_ratio(schedule) for schedule in schedules]
    return TrainReport.of(
        recipe.targets[0],
        Judged(errors, runs.variance(search.held_out)),
        macs_ratio=ratios[0],
        forwards=runs.forwards,
        seconds=time.perf_counter() - started,
        history=history,
        runs=effort.linearised(len(budgets)),
        frontier=ratios,
    )


@dataclass(frozen=True)
class _Effort:
    """How many sampling runs training may make.

    Attributes:
        rounds: of effects around the schedule, for each target.
        runs: with gradients, in each round and before the first.
        held_out: runs that judge a schedule.
        others: targets besides the recipe's.
    """

    rounds: int
    runs: int
    held_out: int
    others: tuple[float, ...]

    @staticmethod
    def of(recipe: Recipe) -> _Effort:
        effort = recipe.train.effort
        apart = [t for t in FRONTIER if all(abs(t - other) > 0.02 for other in recipe.targets)]
        return _Effort(
            max(1, round(ROUNDS * effort)),
            max(1, round(RUNS * min(1.0, effort))),
            HELD_OUT,
            tuple(apart) if effort >= 1.0 else (),
        )

    def linearised(self, targets: int) -> int:
        """Sampling runs with gradients."""
        return (1 + self.rounds * targets) * self.runs

    def total(self, targets: int) -> int:
        """All sampling runs, at most."""
        judged = 1 + (targets + len(self.others)) * STARTS + targets * self.rounds
        return self.linearised(targets) + judged * self.held_out


class _Search:
    """Finds schedules for budgets around one dense trajectory, each judged by the final image."""

    def __init__(
        self, lazy: LazyModel, recipe: Recipe, runs: Runs, effort: _Effort, excluded: list[int], bar: Progress
    ) -> None:
        seeds = iter(range(recipe.train.seed * 1_000_003 + 1, 2**62))
        self.recipe = recipe
        self.runs = runs
        self.effort = effort
        self.bar = bar
        self.noise = [next(seeds) for _ in range(effort.runs)]
        self.held_out = [next(seeds) for _ in range(effort.held_out)]
        effects = runs.effects(None, self.noise, probes=PROBES)
        self.times = effects.times
        self.limits = _limits(effects, recipe, excluded, len(lazy.branches))
        self.branches = lazy.branches
        self.macs = [branch.macs for branch in lazy.branches]
        self.forecast = int(lazy.gates.order)
        self.planner = Planner(effects, self.macs, self.limits)
        self.whole = of_whole(effects, self.limits, self.forecast)
        self.fullest, self.preferred = runs.group.same(self.planner.fill(0.0))

    def order(self, schedule: Bools) -> list[tuple[int, int]]:
        """All that may be reused (call, branch), the safest first: by whole steps if the schedule is made of them."""
        preferred = self.preferred
        if is_whole(schedule):
            preferred = self.runs.group.same(steps_of(self.whole.fill(0.0)[1], self.limits))
        taken = set(preferred)
        rest = [(int(t), int(b)) for t, b in np.argwhere(self.limits.allowed) if (int(t), int(b)) not in taken]
        return [*preferred, *rest]

    def beside(self, budgets: list[Budget]) -> list[Budget]:
        """Budgets besides the recipe's that the guards and the kinds' shares leave in reach."""
        found = []
        for target in self.effort.others:
            try:
                budget = Budget.of(self.branches, target, self.recipe.guards.kind_targets)
            except RecipeError:
                continue
            if not budget.out_of_reach(self.planner, self.fullest, tolerance=0.0):
                found.append(budget)
        return found

    def find(self, budget: Budget) -> tuple[Bools, Tensor, list[float]]:
        """A schedule, its errors on held-out noise, and their mean after each round.

        Raises:
            RecipeError: the guards leave too little to reuse.
        """
        short = budget.out_of_reach(self.planner, self.fullest)
        if short:
            raise RecipeError(
                f"target {budget.target}: the guards leave {short} to reuse over "
                f"{len(self.times)} steps; loosen guards (max_reuse, warmup_steps, last_steps, exclude)"
            )
        schedule, errors = self.start(budget)
        history = [float(errors.mean())]
        for _ in range(self.effort.rounds):
            around = self.runs.effects(schedule, self.noise, probes=PROBES)
            candidate = self.runs.group.same(self._better(budget, schedule, around))
            (candidate_errors,) = self.runs.errors([candidate], self.held_out)
            if _robust(candidate_errors, errors) < _robust(errors, errors):
                schedule, errors = candidate, candidate_errors
            history.append(float(errors.mean()))
            self.show(schedule, errors)
        return schedule, errors, history

    def _better(self, budget: Budget, schedule: Bools, around: Effects) -> Bools:
        """Exchanges that pay by the effects around a schedule."""
        if self.forecast and is_whole(schedule):
            whole = of_whole(around, self.limits, self.forecast)
            return np.repeat(exchanged(whole, schedule[:, :1]), schedule.shape[1], axis=1)
        return budget.swap(Planner(around, self.macs, self.limits), schedule, SWAPS)

    def start(self, budget: Budget) -> tuple[Bools, Tensor]:
        """The best of the schedules to start from, with its errors: decisions one by one, and whole steps.

        Where the guards keep some branch out, or kinds have budgets of their own, nothing is forecast, and decisions one by one
        may be better; else whole steps are, see `train.whole`.
        """
        found = [budget.swap(self.planner, budget.fill(self.planner), rounds=100)]
        whole = budget.together(self.planner, self.whole)
        found += [] if whole is None else [whole]
        found = self.runs.group.same(found)
        errors = self.runs.errors(found, self.held_out)
        self.bar.advance((STARTS - len(found)) * len(self.held_out))
        best = min(range(len(found)), key=lambda k: _robust(errors[k], errors[0]))
        _log.debug("%s: mean errors one by one, whole steps %s", budget.target, [f"{e.mean():.1e}" for e in errors])
        self.show(found[best], errors[best])
        return found[best], errors[best]

    def show(self, schedule: Bools, errors: Tensor) -> None:
        relative = Judged(errors, self.runs.variance(self.held_out)).relative
        self.bar.show(error=f"{relative:.1e}", skipped=f"{1 - self.planner.macs_ratio(schedule):.1%}")


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


def _robust(errors: Tensor, reference: Tensor) -> float:
    scale = 4 * float(reference.median()) or 1.0
    return float(torch.log1p(errors / scale).mean())


def tell_calls_apart(lazy: LazyModel, sampler: Sampler) -> list[list[float]]:
    """Set the gates' phase if the sampler calls the model twice at a timestep, as second-order ones do.

    Returns:
        The timesteps of a sampling run's calls, a list for each state that takes turns (guidance in two calls).

    Raises:
        InputError: no call goes on from another: the timestep does not move, or something else begins a new image each time.
    """
    tapes: dict[int, list[float]] = {}
    changing = Changing(lazy)

    def after(module: LazyModel, args: Any, kwargs: Any, output: Any) -> None:
        tapes.setdefault(module.context, []).append(module.timestep)
        changing.see(args, kwargs)

    hook = lazy.register_forward_hook(after, with_kwargs=True)
    torch.manual_seed(0)
    try:
        _ = run(lazy, sampler, None)
    finally:
        hook.remove()
    changing.check(list(tapes.values()))
    tape = tapes.get(0, [])
    gaps = [abs(a - b) for a, b in pairwise(tape) if a != b]
    lazy.gates.direction.fill_(-1.0 if len(tape) > 1 and tape[-1] > tape[0] else 1.0)
    lazy.reset()
    lazy.gates.phase.fill_(min(gaps) / 2 if gaps and len(gaps) < len(tape) - 1 else 0.0)
    return list(tapes.values()) or [[]]


def clock_times(lazy: LazyModel, timesteps: list[float]) -> list[float]:
    """The times of calls as the gates' clock has them: a second call at one timestep is later, see `Gates.phase`."""
    later = float(lazy.gates.direction) * float(lazy.gates.phase)
    again = [False, *(before == now for before, now in pairwise(timesteps))]
    return [time - later * second for time, second in zip(timesteps, again, strict=True)]


def _gates_of(lazy: LazyModel, times: Tensor, schedules: list[Bools], order: list[tuple[int, int]]) -> Gates:
    """Gates that follow the first of some schedules [calls, branches] and know the others.

    `order` is all that may be reused (call, branch), the safest first.
    """
    rises = bool(times[-1] > times[0])
    phase = float(lazy.gates.phase)
    steps = times[1:] - times[:-1]
    if not bool((steps > 0).all() if rises else (steps < 0).all()):
        raise InputError(f"the sampler's timesteps neither rise nor fall: {listed(times.tolist())}")
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
