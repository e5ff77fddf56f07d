"""Schedules that reuse all branches at the same steps, planned on what that does to the model's output.

A branch's own effects are measured while all others compute, so they count what the later branches of the same call make of
its error. Branches that are reused too make nothing of it, and where all are, the model's output is forecast: a sum of such
effects says nothing about a call that is reused whole. The model's output in place of the branches is a unit of its own
(`Effects.whole`) for which sums are good again.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .schedule import Bools, Limits, Planner, run_lengths
from .trajectory import Effects

#: A computed step is exchanged for any reused one this near.
NEAR = 5

#: And for any other, among so many of each that are best by themselves.
BEST = 12

#: Exchanges that are made at most.
ROUNDS = 100


def is_whole(schedule: Bools) -> bool:
    """Whether all branches are reused, or none, at each step of a schedule [steps, branches]."""
    return bool((schedule.all(axis=1) == schedule.any(axis=1)).all())


def of_whole(effects: Effects, limits: Limits, order: int) -> Planner:
    """A planner with one column, the whole model; it may reuse where any branch may.

    Args:
        order: of the forecast; there is none where some branch may not be reused.
    """
    allowed: Bools = np.asarray(limits.allowed.any(axis=1, keepdims=True))
    order = order if is_whole(limits.allowed) else 0
    return Planner(replace(effects, effects=effects.whole), [1], replace(limits, allowed=allowed), order)


def steps_of(order: list[tuple[int, int]], limits: Limits) -> list[tuple[int, int]]:
    """Decisions (step, branch) of all branches, in the order of steps that a planner of the whole model took."""
    return [(step, int(branch)) for step, _ in order for branch in np.flatnonzero(limits.allowed[step])]


def together(planner: Planner, whole: Planner, target: float) -> Bools | None:
    """The schedule with the least predicted error among those that reuse all branches, or none, at each step.

    Args:
        planner: knows the branches' costs, and where each may reuse.
        whole: see `of_whole`.
        target: computed share of the branches' MACs, at most.

    Returns:
        Bool [steps, branches], or None if the limits allow no such schedule.
    """
    allowed = planner.limits.allowed
    gains = (allowed * planner.cost).sum(axis=1)
    steps = len(gains)
    if not gains.any():
        return None
    for count in range(math.ceil((1 - target) / float(gains.max()) - 1e-6), steps):
        single, _ = whole.fill(1 - count / steps)
        if whole.macs_ratio(single) > 1 - count / steps + 1e-6:
            return None
        schedule: Bools = exchanged(whole, single) & allowed
        if planner.macs_ratio(schedule) <= target + 1e-9:
            return schedule
    return None


def exchanged(whole: Planner, schedule: Bools) -> Bools:
    """Exchanges a computed step for a reused one while that lowers the predicted error; [steps, 1]."""
    decisions = schedule[:, 0].copy()
    allowed = whole.limits.allowed[:, 0]
    error = float(whole.error(whole.offset + whole.column(0, decisions)))
    for _ in range(ROUNDS):
        computed, reused = np.flatnonzero(allowed & ~decisions).tolist(), np.flatnonzero(decisions).tolist()
        best = [_best(whole, decisions, steps) for steps in (computed, reused)]
        pairs = [(c, r) for c in computed for r in reused if abs(c - r) <= NEAR or (c in best[0] and r in best[1])]
        candidates = [found for pair in pairs if (found := _flipped(whole, decisions, pair)) is not None]
        if not candidates:
            break
        errors = whole.error(whole.offset + np.stack([whole.column(0, candidate) for candidate in candidates]))
        k = int(errors.argmin())
        if errors[k] >= error * (1 - 1e-6):
            break
        decisions, error = candidates[k], float(errors[k])
    return decisions[:, None]


def _best(whole: Planner, decisions: Bools, steps: list[int]) -> set[int]:
    """The steps whose decisions are best changed, each by itself."""
    found = [(step, flipped) for step in steps if (flipped := _flipped(whole, decisions, (step,))) is not None]
    if not found:
        return set()
    errors = whole.error(whole.offset + np.stack([whole.column(0, flipped) for _, flipped in found]))
    return {found[k][0] for k in errors.argsort()[:BEST]}


def _flipped(whole: Planner, decisions: Bools, steps: tuple[int, ...]) -> Bools | None:
    """The decisions with those of some steps the other way round; None where an output would be reused for too long."""
    changed = decisions.copy()
    changed[list(steps)] = ~changed[list(steps)]
    return None if run_lengths(changed).max() > whole.limits.max_reuse else changed
