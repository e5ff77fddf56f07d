"""Following a plan through one image: exactly where its timesteps come, by density where others do."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..plan.plan import Plan
from ..scopes import CLOSE

#: Makes the plan for other timesteps than those that were learned at.
Planner = Callable[[tuple[float, ...]], Plan]


def clock(timesteps: Sequence[float]) -> list[float]:
    """Strictly moving times for the calls of one image: equal timesteps lie evenly between their own and the next."""
    found: list[float] = []
    k = 0
    while k < len(timesteps):
        after = k
        while after < len(timesteps) and timesteps[after] == timesteps[k]:
            after += 1
        if after < len(timesteps):
            width = timesteps[after] - timesteps[k]
        else:
            width = (timesteps[k] - found[-1]) if found else -1.0
        found += [timesteps[k] + width * j / (after - k) for j in range(after - k)]
        k = after
    return found


@dataclass(frozen=True)
class Density:
    """How much of the calls a plan computes, as a function of time; for runs whose timesteps nobody knows beforehand."""

    times: tuple[float, ...]
    counts: tuple[float, ...]

    @classmethod
    def of(cls, plan: Plan) -> Density:
        """Of a plan, averaged over about as many calls as hold one that computes."""
        reach = max(1, round(1 / plan.share))
        shares = []
        for k in range(len(plan.computes)):
            near = plan.computes[max(0, k - reach) : k + reach + 1]
            shares.append(sum(near) / len(near))
        scale = plan.share * len(shares) / sum(shares)
        times, counts, total = clock(plan.timesteps), [], 0.0
        for share in shares:
            counts.append(total)
            total += min(1.0, share * scale)
        return cls(tuple(times), tuple(counts))

    def between(self, before: float, after: float) -> float:
        """Computed share of the calls between two times."""
        calls = abs(self._at(after, self._positions) - self._at(before, self._positions))
        computed = abs(self._at(after, self.counts) - self._at(before, self.counts))
        if calls < 1e-9:
            return self.counts[-1] / max(len(self.counts) - 1, 1)
        return min(1.0, computed / calls)

    @property
    def _positions(self) -> Sequence[float]:
        return range(len(self.times))

    def _at(self, time: float, values: Sequence[float]) -> float:
        sign = -1.0 if len(self.times) > 1 and self.times[-1] < self.times[0] else 1.0
        rising = [sign * t for t in self.times]
        k = min(max(bisect_right(rising, sign * time) - 1, 0), max(len(rising) - 2, 0))
        if len(rising) < 2:
            return float(values[0])
        share = (sign * time - rising[k]) / (rising[k + 1] - rising[k])
        return values[k] + min(max(share, 0.0), 1.0) * (values[k + 1] - values[k])


def in_turns(timesteps: Sequence[float], streams: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Timesteps and streams of the calls, if each of so many streams is called at each of the timesteps."""
    calls = [(t, stream) for t in timesteps for stream in range(streams)]
    return tuple(t for t, _ in calls), tuple(stream for _, stream in calls)


@dataclass
class Pace:
    """Where one image is in its plan.

    Attributes:
        plan: of one stream, for this image's own timesteps or the learned ones.
        calls: that the image has had.
        time: of the last of them: the plan's own timestep, not rounded as the call's may be, if it is the plan's.
    """

    plan: Plan
    calls: int = 0
    time: float = math.nan
    _exact: bool = True
    _credit: float = 0.0
    _clock: float = math.nan
    _density: Density | None = None

    def expects(self, timestep: float) -> bool:
        """Whether the plan's next call is at this timestep."""
        return self._exact and self.calls < len(self.plan.timesteps) and self._is_at(self.calls, timestep)

    def _is_at(self, call: int, timestep: float) -> bool:
        known = self.plan.timesteps
        return abs(known[call] - timestep) <= CLOSE * max(map(abs, known))

    def step(self, timestep: float) -> bool:
        """One call further, at `timestep`: whether it computes."""
        k, before = self.calls, self._clock
        self.calls += 1
        known = self.plan.timesteps
        self._exact = self._exact and k < len(known) and self._is_at(k, timestep)
        if self._exact:
            self.time = self._clock = known[k]
            return self.plan.computes[k]
        typical = (known[-1] - known[0]) / max(len(known) - 1, 1) or -1.0
        self.time = self._clock = timestep
        if k and (timestep - before) * typical <= 0:  # a second call at a timestep
            self._clock = before + typical / 2
        if k == 0:
            return True
        self._density = self._density or Density.of(self.plan)
        self._credit += self._density.between(before, self._clock)
        if self._credit < 1.0 - 1e-6:
            return False
        self._credit -= 1.0
        return True


def spread(plan: Plan, timesteps: Sequence[float]) -> Plan:
    """The plan for other timesteps that computes as densely, at each time, as `plan` does."""
    elsewhere = Plan(tuple(timesteps), (True,) * len(timesteps), plan.order)
    pace = Pace(plan, _exact=False)
    return replace(elsewhere, computes=tuple(pace.step(t) for t in clock(timesteps)))


def alike(plan: Plan, timesteps: Sequence[float]) -> bool:
    """Whether a plan is for these timesteps, but for rounding."""
    largest = max(map(abs, plan.timesteps))
    return len(timesteps) == len(plan.timesteps) and all(
        abs(a - b) <= CLOSE * largest for a, b in zip(plan.timesteps, timesteps, strict=True)
    )
