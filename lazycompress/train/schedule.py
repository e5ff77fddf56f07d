"""Which decisions to take under a budget of MACs, chosen on first-order effects alone.

A schedule is bool [steps, branches], true where a branch reuses. Its predicted error is the robust mean over samples of the
mean over probes of (offset + sum of effects)^2: interactions between decisions, and the age that each reuse has in its
run, are part of the sum. Few images that tip over hold most of a plain mean, and no fixed schedule helps them, so errors far
above the typical one count logarithmically.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .forecast import forecast_weights
from .trajectory import Effects

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Limits:
    """Where a schedule may reuse at all.

    Attributes:
        allowed: bool [steps, branches].
        max_reuse: longest run of reuse of one output.
    """

    allowed: Bools
    max_reuse: int


class Planner:
    """Searches schedules on one set of effects.

    Args:
        effects: from `linearise`, joined over batches.
        macs: of each branch, any unit.
        limits: where reuse is allowed.
        order: of the polynomial through the last computations, along which what is reused goes on; 0 repeats the last one.
        scale: errors well above this count logarithmically; None takes four times the median error of the offset, or
            counts all errors as they are where the offset is zero (around the dense trajectory).
    """

    def __init__(
        self, effects: Effects, macs: list[int], limits: Limits, order: int = 0, scale: float | None = None
    ) -> None:
        samples, probes, steps, branches, ages = effects.effects.shape
        self.samples, self.probes = samples, probes
        table = effects.effects.permute(2, 3, 4, 0, 1).reshape(steps, branches, ages, samples * probes)
        self.table: Floats = table.double().numpy()
        self.offset: Floats = effects.offset.reshape(-1).double().numpy()
        self.cost: Floats = np.asarray(macs, dtype=np.float64) / (sum(macs) * steps)
        self.limits = limits
        self.order = order
        self.times: Floats = effects.times.numpy()
        self.shape = (steps, branches)
        typical = float(np.median(effects.offset.square().mean(dim=1).numpy()))
        self.scale = scale if scale is not None else (4 * typical if typical > 0 else np.inf)

    def macs_ratio(self, schedule: Bools) -> float:
        """Computed share of the branches' MACs."""
        return 1.0 - float((schedule * self.cost).sum())

    def error(self, projected: Floats) -> Floats:
        """Robust mean error of projected changes, [..., samples * probes] -> [...]."""
        squares = (projected.reshape(*projected.shape[:-1], self.samples, self.probes) ** 2).mean(axis=-1)
        if np.isfinite(self.scale):
            squares = np.log1p(squares / self.scale) * self.scale
        mean: Floats = squares.mean(axis=-1)
        return mean

    def predicted(self, schedule: Bools) -> float:
        """Predicted mean squared error of a schedule's images."""
        return float(self.error(self._total(schedule)))

    def fill(self, target: float, schedule: Bools | None = None) -> tuple[Bools, list[tuple[int, int]]]:
        """Add reuse where it costs least error per MAC, until the computed share is at most `target`.

        Returns:
            The schedule, and its new decisions (step, branch) in the order in which they were taken. It stays above the
            target where the limits leave nothing to add.
        """
        schedule = np.zeros(self.shape, dtype=bool) if schedule is None else schedule.copy()
        columns = np.stack([self.column(b, schedule[:, b]) for b in range(self.shape[1])])
        total = self.offset + columns.sum(axis=0)
        order: list[tuple[int, int]] = []
        # A change in one branch leaves the others' columns as they are: only its own candidates are made again.
        candidates = {b: self._flips(b, schedule[:, b], columns[b], to=True) for b in range(self.shape[1])}
        while self.macs_ratio(schedule) > target + 1e-9:
            base = self.error(total)
            best: tuple[float, int, int] | None = None
            for b, (steps, changes) in candidates.items():
                if not steps:
                    continue
                gain = (self.error(total + changes) - base) / self.cost[b]
                k = int(gain.argmin())
                if best is None or gain[k] < best[0]:
                    best = (float(gain[k]), b, steps[k])
            if best is None:
                break
            _, b, t = best
            schedule[t, b] = True
            order.append((t, b))
            column = self.column(b, schedule[:, b])
            total = total - columns[b] + column
            columns[b] = column
            candidates[b] = self._flips(b, schedule[:, b], column, to=True)
        return schedule, order

    def swap(self, target: float, schedule: Bools, rounds: int, shortlist: int = 40) -> Bools:
        """Exchange a reuse for another while that lowers the predicted error, at most `rounds` times."""
        schedule = schedule.copy()
        for _ in range(rounds):
            columns = np.stack([self.column(b, schedule[:, b]) for b in range(self.shape[1])])
            total = self.offset + columns.sum(axis=0)
            removed = self._all_flips(schedule, columns, to=False, total=total, shortlist=shortlist)
            added = self._all_flips(schedule, columns, to=True, total=total, shortlist=shortlist)
            best, chosen = float(self.error(total)) * (1 - 1e-9), None
            ratio = self.macs_ratio(schedule)
            for t_off, b_off, less in removed:
                # Flips in one run of one branch change each other; they are not tried together.
                fits = [
                    (t, b, more)
                    for t, b, more in added
                    if (b != b_off or abs(t - t_off) > self.limits.max_reuse)
                    and ratio + self.cost[b_off] - self.cost[b] <= max(target, ratio) + 1e-9
                ]
                if not fits:
                    continue
                errors = self.error(total + less + np.stack([more for _, _, more in fits]))
                k = int(errors.argmin())
                if errors[k] < best:
                    best, chosen = float(errors[k]), ((t_off, b_off), fits[k][:2])
            if chosen is None:
                break
            for t, b in chosen:
                schedule[t, b] = not schedule[t, b]
        return schedule

    def _total(self, schedule: Bools) -> Floats:
        columns = [self.column(b, schedule[:, b]) for b in range(self.shape[1])]
        total: Floats = self.offset + np.sum(columns, axis=0)
        return total

    def column(self, branch: int, decisions: Bools) -> Floats:
        """Projected change of the image by one branch's decisions, bool [steps]: [samples * probes]."""
        ages = run_lengths(decisions)
        computed = np.flatnonzero(ages == 0)
        column: Floats = self.table[computed, branch, 0].sum(axis=0)
        lazy = np.flatnonzero(ages)
        if lazy.size:
            for weights, points in forecast_weights(self.times, computed, lazy, self.order):
                column += weights @ self.table[lazy, branch, lazy - points]
        return column

    def _flips(self, branch: int, decisions: Bools, column: Floats, to: bool) -> tuple[list[int], Floats]:
        """Steps that may be flipped to `to`, and the change of the total that each brings, [steps, rows]."""
        steps, changes = [], []
        for t in np.flatnonzero(self.limits.allowed[:, branch] & (decisions != to)):
            flipped = decisions.copy()
            flipped[t] = to
            if run_lengths(flipped).max() > self.limits.max_reuse:
                continue
            steps.append(int(t))
            changes.append(self.column(branch, flipped) - column)
        return steps, np.stack(changes) if changes else np.zeros((0, column.size))

    def _all_flips(
        self, schedule: Bools, columns: Floats, to: bool, total: Floats, shortlist: int
    ) -> list[tuple[int, int, Floats]]:
        found = []
        for b in range(self.shape[1]):
            steps, changes = self._flips(b, schedule[:, b], columns[b], to)
            found += [(t, b, change) for t, change in zip(steps, changes, strict=True)]
        if not found:
            return []
        errors = self.error(total + np.stack([change for _, _, change in found]))
        costs = np.array([self.cost[b] for _, b, _ in found])
        # Per MAC: a cheap branch must not win the shortlist by its size alone.
        best = np.argsort((errors - float(self.error(total))) / costs)[:shortlist]
        return [found[k] for k in best]


def run_lengths(decisions: Bools) -> npt.NDArray[np.int64]:
    """How many steps ago the output in use was computed, per step: 0 where it is computed."""
    index = np.arange(len(decisions))
    last = np.maximum.accumulate(np.where(decisions, 0, index))
    return index - last
