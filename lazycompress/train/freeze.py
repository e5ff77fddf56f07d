"""A static schedule from gates that look at the sample: at every step and branch, what most samples did.

The majority decision is the special case, at the budget that it happens to meet, of a rule that meets any budget: decisions
are taken in the order of the share of samples that reused. So a frozen model keeps its target, and can be moved to others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..errors import RecipeError
from ..noise import own_noise
from ..recipe import Recipe
from ..report import Usage
from ..runtime import LazyModel
from ..sampling import Sampler
from .budget import TOLERANCE
from .runs import errors_of_gates
from .schedule import Bools, run_lengths
from .trainer import TrainReport, _gates_of, clock_times

#: Sampling runs whose decisions are counted, and others that measure what freezing costs.
COUNTED = 4
JUDGED = 2


def freeze(lazy: LazyModel, sampler: Sampler, recipe: Recipe, report: TrainReport) -> TrainReport:
    """Put static gates in the place of the trained ones; says what that costs in quality.

    Returns:
        The report with the errors of the static gates on fresh noise, and of the trained ones on the same noise.

    Raises:
        RecipeError: the gates and guards reuse too little for a target.
    """
    first = recipe.train.seed * 1_000_003 + 500_001
    with own_noise():
        before = errors_of_gates(lazy, sampler, range(first, first + JUDGED))
        shares, times = _shares(lazy, sampler, range(first + JUDGED, first + JUDGED + COUNTED))
        macs = np.array([float(branch.macs) for branch in lazy.branches])
        schedules, order = [], _most_lazy_first(shares)
        for target in recipe.targets:
            schedules.append(_taken(order, shares.shape, macs / macs.sum(), target, recipe.guards.max_reuse))
        gates = _gates_of(lazy, times, schedules, order)
        gates.longest.fill_(min(recipe.guards.max_reuse, len(times)))
        lazy.set_gates(gates)
        judged = errors_of_gates(lazy, sampler, range(first, first + JUDGED))
    ratios = [1.0 - float((schedule * macs).sum() / macs.sum() / len(times)) for schedule in schedules]
    return TrainReport.of(
        report.target,
        judged,
        macs_ratio=ratios[0],
        forwards=report.forwards + len(times) * (COUNTED + 3 * JUDGED),
        seconds=report.seconds,
        history=[*report.history, float(judged.errors.mean())],
        runs=report.runs,
        frontier=ratios,
        unfrozen=float(before.errors.mean()),
    )


class _Counter(Usage):
    """Statistics that also keep the decisions of every call: its state, its time, and the share of samples that reused."""

    def __init__(self, lazy: LazyModel) -> None:
        super().__init__([branch.macs for branch in lazy.branches])
        self.lazy = lazy
        self.taken: list[tuple[int, float, Tensor]] = []

    def add(self, timestep: Tensor, lazy: Tensor) -> None:
        super().add(timestep, lazy)
        self.taken.append((self.lazy.context, float(timestep.max()), lazy.float().mean(dim=1).cpu()))


@contextmanager
def _counted(lazy: LazyModel) -> Iterator[_Counter]:
    usage, lazy.usage = lazy.usage, _Counter(lazy)
    try:
        yield lazy.usage
    finally:
        lazy.usage = usage
        lazy.reset()


def _shares(lazy: LazyModel, sampler: Sampler, seeds: Sequence[int]) -> tuple[np.ndarray, Tensor]:
    """Share of samples that reused, float64 [steps, branches], and the strictly monotonous times of the steps."""
    runs = []
    times: list[float] = []
    for seed in seeds:
        torch.manual_seed(seed)
        lazy.reset()
        with _counted(lazy) as counter, torch.no_grad():
            _ = sampler(lazy)
        contexts = sorted({context for context, _, _ in counter.taken})
        of_each = [torch.stack([s for context, _, s in counter.taken if context == c]) for c in contexts]
        runs += [shares for shares in of_each if len(shares) == len(of_each[0])]
        times = [time for context, time, _ in counter.taken if context == contexts[0]]
    return torch.stack(runs).double().mean(dim=0).numpy(), torch.tensor(clock_times(lazy, times), dtype=torch.float64)


def _most_lazy_first(shares: np.ndarray) -> list[tuple[int, int]]:
    """Decisions (step, branch) that some sample took, those that most samples took first."""
    flat = np.argsort(-shares, axis=None, kind="stable")
    found = [(int(k) // shares.shape[1], int(k) % shares.shape[1]) for k in flat]
    return [(t, b) for t, b in found if shares[t, b] > 0]


def _taken(
    order: list[tuple[int, int]], shape: tuple[int, ...], costs: np.ndarray, target: float, max_reuse: int
) -> Bools:
    """The first decisions of an order that meet a target, as bool [steps, branches]."""
    schedule: Bools = np.zeros(shape, dtype=bool)
    ratio = 1.0
    for t, b in order:
        if ratio <= target + 1e-9:
            break
        schedule[t, b] = True
        if run_lengths(schedule[:, b]).max() > max_reuse:
            schedule[t, b] = False
        else:
            ratio -= float(costs[b]) / shape[0]
    if ratio > target + TOLERANCE:
        raise RecipeError(
            f"target {target}: what these gates ever reuse leaves {ratio:.2f} of the branch MACs to compute; raise target, "
            "or set schedule: gates"
        )
    return schedule
