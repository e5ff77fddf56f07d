"""Search for plans: thousands a second, priced by a calibration, without a call of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..errors import InputError
from .calibration import Calibration, Floats
from .fit import SEEN, UNSEEN, fit
from .forecasts import HIGHEST_ORDER, Order, forecast_of
from .move import Reach, moved
from .plan import Plan, even
from .price import Bools, Ints, Pricing

__all__ = ["Guards", "Reach", "least_share", "plan_for", "plans_for", "predict"]

#: Chains of each order that look at once.
CHAINS = 10

#: Exchanges that each chain tries.
ROUNDS = 1500

#: A chain begins by accepting what is worse by this factor's logarithm about as often as not; it ends with a hundredth.
HEAT = 0.5

#: Seconds that a search takes without a bar: with some fifty calls it takes a few, with a thousand a minute.
PATIENCE = 5.0

#: Exchanges with a call this near are tried most.
NEAR = 3


@dataclass(frozen=True)
class Guards:
    """What a plan has to keep to.

    Attributes:
        first, last: calls that compute at the beginning and at the end; of each stream the first one computes anyway.
        max_reuse: calls of a stream in a row that compute nothing, at most; more only where the target leaves no choice.
    """

    first: int = 1
    last: int = 0
    max_reuse: int = 8

    def keeps(self, plan: Plan) -> bool:
        """Whether a plan computes the calls at the ends."""
        return all(plan.computes[: self.first]) and all(plan.computes[len(plan.computes) - self.last :])

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0 or self.max_reuse < 1:
            raise InputError(
                f"guards: first and last are at least 0 and max_reuse at least 1; there were {self.first}, {self.last} "
                f"and {self.max_reuse}"
            )


def plan_for(
    calibration: Calibration,
    target: float,
    timesteps: Sequence[float] | None = None,
    *,
    streams: Sequence[int] | None = None,
    reach: Reach | None = None,
    orders: Sequence[Order] = (0, 1, 2),
    first: int = 1,
    last: int = 0,
    max_reuse: int = 8,
    seed: int = 0,
) -> Plan:
    """The best plan found that computes at most this share of the calls; never worse, as priced, than the even ones.

    Its forecasts are fitted to it, see `fit`.

    Args:
        calibration: of the model.
        target: share of the calls to compute, in (0, 1].
        timesteps: of the calls to plan; left out, those of the calibration. The first call of each stream computes.
        streams: of these calls; left out, all are of one stream, or those of the calibration if the timesteps are its own.
        reach: of the sampler that makes them, see `reach_of`; left out, that of the calibration, by step size.
        orders: forecasts to choose from, see `Plan.order`.
        first, last: calls that compute at the beginning and at the end.
        max_reuse: calls in a row (of a stream) that compute nothing, at most; more only where the target leaves no choice.
        seed: of the search; the same arguments give the same plan.

    Raises:
        InputError: a target outside (0, 1], timesteps that are not finite, or guards that the target does not leave room for.
    """
    there = moved(calibration, timesteps, streams, reach)
    guards = Guards(first, last, max_reuse)
    ridge = SEEN if there.timesteps == calibration.timesteps else UNSEEN
    if there.timesteps != calibration.timesteps:
        # What the last output again costs where calls are further apart is not priced well: too low.
        orders = [order for order in orders if order != 0] or orders
    found = plans_for(there, target, orders=orders, guards=guards, count=len(orders), seed=seed)
    found += [plan for plan in evens(there, target, orders) if guards.keeps(plan)]
    return min((fit(there, plan, ridge) for plan in found), key=lambda plan: float(predict(there, plan).mean()))


def computed_of(target: float, streams: Sequence[int]) -> int:
    """How many of the calls of these streams a share of them is: no more than it, but one step."""
    steps = Steps.of(streams)
    return max(1, math.floor(target * steps.count + 1e-9)) * steps.size


def least_share(streams: Sequence[int], guards: Guards) -> float:
    """The share of the calls that always compute: the first of each stream, and those of the guards."""
    steps = Steps.of(streams)
    return float(steps.of_any(_fixed(np.array(streams, dtype=np.int64), guards)).mean())


@dataclass(frozen=True, eq=False)
class Steps:
    """Calls that are decided alike. Of guidance in calls that take turns these are the calls of one step.

    Its output is made of all of them: forecasts of the same age leave an error of one kind in it, and others one of each.

    Attributes:
        of_call: the step of each call, int64 [T].
        size: calls of each.
        streams: of the steps, where each is one call; else all are of one, int64 [count].
    """

    of_call: Ints
    size: int
    streams: Ints

    @staticmethod
    def of(streams: Sequence[int]) -> Steps:
        """Where a stream comes again a step begins. Steps of different sizes are not told from each other: each call is one.

        Raises:
            InputError: there are no calls.
        """
        if not len(streams):
            raise InputError("plans are for one timestep or more")
        seen: set[int] = set()
        found: list[int] = []
        for stream in streams:
            begins = not seen or stream in seen
            seen = {stream} if begins else seen | {stream}
            found.append((found[-1] if found else -1) + begins)
        sizes = np.bincount(found)
        if sizes.min() < sizes.max() or sizes[0] == 1:
            return Steps(np.arange(len(found)), 1, np.array(streams, dtype=np.int64))
        return Steps(np.array(found), int(sizes[0]), np.zeros(len(sizes), dtype=np.int64))

    @property
    def count(self) -> int:
        return len(self.streams)

    def of_any(self, calls: Bools) -> Bools:
        """Which steps have any of these calls."""
        return np.asarray(np.bincount(self.of_call, calls, self.count) > 0)


def predict(calibration: Calibration, plan: Plan, *, reach: Reach | None = None) -> Floats:
    """Mean squared error of the final latents that a plan is priced at, for each image of the calibration: float64 [B]."""
    return Pricing.of(moved(calibration, plan.timesteps, plan.streams, reach)).plan(plan)


def plans_for(
    calibration: Calibration,
    target: float,
    *,
    orders: Sequence[Order] = (0, 1, 2),
    guards: Guards | None = None,
    count: int = 1,
    seed: int = 0,
) -> list[Plan]:
    """The best plans found for a calibration's own calls, each different in a few calls at least.

    The best one comes first, then the best of each other order, then the others, best first.

    Args:
        calibration, target, orders, seed: see `plan_for`.
        guards: that the plans keep to.
        count: plans to give, at most.
    """
    if not 0 < target <= 1:
        raise InputError(f"target is a share of the calls, above 0 and at most 1; there was {target!r}")
    named = [order for order in orders if isinstance(order, str)]
    if not orders or not set(orders) <= {*range(HIGHEST_ORDER + 1), *named}:
        raise InputError(f"orders of the forecast are 0, 1 and 2; there were {list(orders)}")
    for name in named:
        _ = forecast_of(name)
    guards = guards or Guards()
    streams = np.array(calibration.streams, dtype=np.int64)
    steps = Steps.of(calibration.streams)
    computed = computed_of(target, calibration.streams) // steps.size
    fixed = steps.of_any(_fixed(streams, guards))
    if fixed.sum() > computed:
        raise InputError(
            f"target {target:g} leaves {computed * steps.size} of {len(streams)} calls to compute, and "
            f"{fixed.sum() * steps.size} have to (first "
            f"{guards.first}, last {guards.last}, {len(set(calibration.streams))} streams): raise the target"
        )
    pricing = Pricing.of(calibration).mean()
    rng = np.random.default_rng(seed)
    found: list[tuple[float, Order, Bools]] = []
    for order in sorted(set(orders), key=str):
        (like,) = evens(calibration, target, (order,))
        start = _begin(steps.of_any(np.array(like.computes)), computed, fixed)
        found += [(error, order, plan) for error, plan in _Search(pricing, order, fixed, steps, guards, rng).run(start)]
    found.sort(key=lambda entry: entry[0])
    first = {id(next(entry for entry in found if entry[1] == order)) for order in set(orders)}
    found.sort(key=lambda entry: id(entry) not in first)  # stable: each part stays in its order
    chosen: list[tuple[float, Order, Bools]] = []
    for entry in found:
        if all((entry[2] != other[2]).sum() > 2 for other in chosen if other[1] == entry[1]):
            chosen.append(entry)
        if len(chosen) == count:
            break
    return [
        Plan(calibration.timesteps, tuple(bool(c) for c in plan[steps.of_call]), order, calibration.streams)
        for _, order, plan in chosen
    ]


def evens(calibration: Calibration, target: float, orders: Sequence[Order] = (0, 1, 2)) -> list[Plan]:
    """Even plans of a calibration's calls, at most at this share, one for each order: every stream by itself."""
    found = []
    for order in orders:
        computes = np.zeros(len(calibration.streams), dtype=bool)
        for stream in set(calibration.streams):
            own = np.flatnonzero(np.array(calibration.streams) == stream)
            computes[own] = even([float(k) for k in own], target).computes
        found.append(Plan(calibration.timesteps, tuple(bool(c) for c in computes), order, calibration.streams))
    return found


def _fixed(streams: Ints, guards: Guards) -> Bools:
    """Calls that always compute."""
    calls = np.arange(len(streams))
    fixed = (calls < guards.first) | (calls >= len(streams) - guards.last)
    for stream in np.unique(streams):
        fixed[np.flatnonzero(streams == stream)[0]] = True
    return np.asarray(fixed)


def _begin(even: Bools, computed: int, fixed: Bools) -> Bools:
    """The steps of the even plan, with those that always compute, and as many as may be computed."""
    computes = even | fixed
    loose = np.flatnonzero(computes & ~fixed)
    excess = int(computes.sum()) - computed
    if excess > 0:
        computes[loose[np.linspace(0, len(loose) - 1, excess).round().astype(int)]] = False
    idle = np.flatnonzero(~computes)
    if excess < 0:
        computes[idle[np.linspace(0, len(idle) - 1, -excess).round().astype(int)]] = True
    return computes


class _Search:
    """Chains that exchange a computed step for another one, and by and by accept less of what is worse (annealing)."""

    def __init__(
        self, pricing: Pricing, order: Order, fixed: Bools, steps: Steps, guards: Guards, rng: np.random.Generator
    ) -> None:
        self._pricing, self._order, self._fixed, self._rng = pricing, order, fixed, rng
        self._of_call = steps.of_call
        self._own = [np.flatnonzero(steps.streams == stream) for stream in np.unique(steps.streams)]
        self._max_reuse = guards.max_reuse

    def run(self, start: Bools) -> list[tuple[float, Bools]]:
        """The best plan of each chain with its error."""
        plans = np.repeat(start[None], CHAINS, axis=0)
        if not (start & ~self._fixed).any() or start.all():
            return [(float(np.exp(self._log(plans[:1])[0])), start)]
        limit = np.maximum(self._longest(start[None])[0], self._max_reuse)
        cost = self._log(plans)
        best, best_cost = plans.copy(), cost.copy()
        bar = tqdm(range(ROUNDS), f"planning {len(self._of_call)} calls", delay=PATIENCE, leave=False, unit="round")
        for k in bar:
            tried = self._exchanged(plans)
            allowed = (self._longest(tried) <= limit).all(axis=1)
            new = self._log(tried)
            heat = HEAT * 0.01 ** (k / ROUNDS)
            with np.errstate(over="ignore"):
                taken = allowed & (self._rng.random(len(plans)) < np.exp(np.minimum(0.0, (cost - new) / heat)))
            plans[taken], cost[taken] = tried[taken], new[taken]
            better = cost < best_cost
            best[better], best_cost[better] = plans[better], cost[better]
            if k == ROUNDS // 2:  # chains that lag behind go on from the best
                behind = np.argsort(best_cost)[CHAINS // 2 :]
                plans[behind], cost[behind] = best[best_cost.argmin()], best_cost.min()
        return [(float(np.exp(c)), plan) for c, plan in zip(best_cost, best, strict=True)]

    def _log(self, plans: Bools) -> Floats:
        return np.asarray(np.log(self._pricing.error(plans[:, self._of_call], self._order) + 1e-300))

    def _exchanged(self, plans: Bools) -> Bools:
        """One computed call of each plan for one that was not: a near one, mostly."""
        many, calls = plans.shape
        chances = self._rng.random((2, many, calls))
        stops = np.where(plans & ~self._fixed, chances[0], -1.0).argmax(axis=1)
        away = np.abs(np.arange(calls)[None] - stops[:, None])
        near = (away <= NEAR) & (self._rng.random((many, 1)) < 0.7)
        starts = np.where(plans, -2.0, chances[1] + near).argmax(axis=1)
        tried = plans.copy()
        rows = np.arange(many)
        tried[rows, stops] = False
        tried[rows, starts] = True
        return tried

    def _longest(self, plans: Bools) -> Ints:
        """Calls in a row that compute nothing, the most of each stream: int64 [M, streams]."""
        found = []
        for own in self._own:
            position = np.arange(len(own))
            last = np.maximum.accumulate(np.where(plans[:, own], position, 0), axis=1)
            found.append((position - last).max(axis=1))
        return np.stack(found, axis=1)
