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
class Timetable:
    """A plan's calls along the way.

    Attributes:
        sign: 1 where timesteps grow, else -1: time is `sign * timestep`.
        times: of the plan's calls, float32 [calls], growing: calls at one timestep lie evenly between it and the next.
        computes: decisions, bool [calls].
        density: computed calls per call, float32 [calls]: their share among the calls nearby.
        again: how much later a call is that names the timestep of this one again, float32 [calls].
    """

    sign: int
    times: NDArray[np.float32]
    computes: NDArray[np.bool_]
    density: NDArray[np.float32]
    again: NDArray[np.float32]

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
        return cls(sign, times, np.array(plan.computes), np.array(_density(plan), np.float32), again)


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
