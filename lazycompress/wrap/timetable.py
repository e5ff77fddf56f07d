"""A plan as a file keeps it: what was planned at a time, and how densely, for schedules that the plan was not made for.

Time is counted along the way: the timestep itself where timesteps grow, else its negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..plan.plan import Plan


@dataclass(frozen=True)
class Fitted:
    """Forecasts with weights of their own, N of them. P outputs are looked at, the newest first.

    Attributes:
        times: of the calls, float32 [N].
        points: times of the outputs, float32 [N, P]; NaN where the image has none yet.
        weights: of the outputs, float32 [N, P]; zero where there are none.
        close: a call at most this far off is the one.
    """

    times: NDArray[np.float32]
    points: NDArray[np.float32]
    weights: NDArray[np.float32]
    close: float

    @classmethod
    def of(cls, plan: Plan, times: NDArray[np.float32], gap: float) -> Fitted:
        """Those of a plan, whose calls are at these times, the nearest two so far apart."""
        calls = [k for k, weights in enumerate(plan.fitted) if weights]
        depth = max((len(plan.fitted[k]) for k in calls), default=0)
        points = np.full((len(calls), depth), np.nan, np.float32)
        weights = np.zeros((len(calls), depth), np.float32)
        for row, call in enumerate(calls):
            own = plan.fitted[call]
            computed = np.flatnonzero(plan.computes[:call])[::-1][: len(own)]
            points[row, : len(own)], weights[row, : len(own)] = times[computed], own
        return cls(times[calls], points, weights, 0.01 * gap)


@dataclass(frozen=True)
class Timetable:
    """A plan's calls along the way.

    Attributes:
        sign: 1 where timesteps grow, else -1: time is `sign * timestep`.
        times: of the plan's calls, float32 [calls], growing: calls at one timestep lie evenly between it and the next.
        computes: decisions, bool [calls].
        density: computed calls per call, float32 [calls]: their share among the calls nearby.
        again: how much later a call is that names the timestep of this one again, float32 [calls].
        fitted: of the calls whose forecasts have weights of their own.
    """

    sign: int
    times: NDArray[np.float32]
    computes: NDArray[np.bool_]
    density: NDArray[np.float32]
    again: NDArray[np.float32]
    fitted: Fitted

    @property
    def share(self) -> float:
        """Computed share of the calls."""
        return float(self.computes.mean())

    @classmethod
    def of(cls, plan: Plan) -> Timetable:
        """The timetable of a plan.

        Raises:
            InputError: the plan's timesteps turn back, or come too close for float32.
        """
        sign = 1 if plan.timesteps[-1] > plan.timesteps[0] else -1
        way = [sign * t for t in plan.timesteps]
        for k, (a, b) in enumerate(pairwise(way)):
            if b < a:
                raise InputError(
                    f"a file follows timesteps that go one way; the plan's turn back after call {k}, from "
                    f"{plan.timesteps[k]} to {plan.timesteps[k + 1]}"
                )
        times = np.array(_spread(way), np.float32)
        if (np.diff(times) <= 0).any():
            raise InputError("two timesteps of the plan are the same number in float32: pass timesteps further apart")
        gaps = np.append(np.diff(times), np.diff(times)[-1:] if len(times) > 1 else 1.0)
        repeats = np.array([a == b for a, b in pairwise(way)] + [way[-2:-1] == way[-1:]])
        again = np.where(repeats, gaps, gaps / 2).astype(np.float32)
        fitted = Fitted.of(plan, times, float(np.diff(times).min(initial=np.inf)))
        return cls(sign, times, np.array(plan.computes), np.array(_density(plan), np.float32), again, fitted)


def _spread(way: Sequence[float]) -> list[float]:
    """Calls at one timestep, evenly between it and the next; the last ones as far apart as the calls before them."""
    found: list[float] = []
    groups = [(time, len(list(calls))) for time, calls in groupby(way)]
    for k, (time, calls) in enumerate(groups):
        gap = groups[k + 1][0] - time if k + 1 < len(groups) else time - found[-1] if found else 1.0
        found += [time + gap * j / calls for j in range(calls)]
    return found


def _density(plan: Plan) -> list[float]:
    """The computed share around each call, over about as many calls as hold one that computes."""
    reach = max(1, round(1 / plan.share))
    near = [plan.computes[max(0, k - reach) : k + reach + 1] for k in range(len(plan.computes))]
    shares = [sum(calls) / len(calls) for calls in near]
    scale = sum(plan.computes) / sum(shares)
    return [min(1.0, share * scale) for share in shares]
