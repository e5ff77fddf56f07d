"""A plan: which calls of one image compute, and what the others give.

A call that computes nothing gives a forecast of the model's output, from the last computed ones of its image: one tensor in
place of every branch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import InputError
from .forecasts import HIGHEST_ORDER, Order, forecast, forecast_of, points_in


@dataclass(frozen=True)
class Plan:
    """Which calls of one image compute.

    Attributes:
        timesteps: of the calls, in their order; samplers of second order name one twice.
        computes: one for each call; the first of each stream is true.
        order: of the forecast's polynomial, 0 (the last output again), 1 or 2; or the name of a forecast of another package.
        streams: a number for each call. Calls of one image under different conditions, as guidance in two calls makes them,
            differ in it; a call is forecast from computed ones of its own stream. Left out, all calls are of stream 0.
        fitted: for each call the weights of the outputs that it is forecast from, the latest first, where they were fitted (see
            `fit`); nothing where the call computes, or the polynomial counts.

    Raises:
        InputError: the lengths differ, a timestep or a weight is not finite, the first call does not compute, or there is no such
            forecast.
    """

    timesteps: tuple[float, ...]
    computes: tuple[bool, ...]
    order: Order = 2
    streams: tuple[int, ...] = ()
    fitted: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if len(self.timesteps) != len(self.computes) or not self.timesteps:
            raise InputError(
                f"a plan has a decision for each timestep: there were {len(self.timesteps)} timesteps and "
                f"{len(self.computes)} decisions"
            )
        if not all(math.isfinite(t) for t in self.timesteps):
            raise InputError("a plan's timesteps are finite numbers; one was not")
        if not self.computes[0]:
            raise InputError("the first call of a plan computes: there is nothing to forecast from before it")
        if isinstance(self.order, str):
            _ = forecast_of(self.order)
        elif self.order not in range(HIGHEST_ORDER + 1):
            raise InputError(f"a plan's forecast has order 0, 1 or 2; there was {self.order!r}")
        if not self.streams:
            object.__setattr__(self, "streams", (0,) * len(self.timesteps))
        if len(self.streams) != len(self.timesteps):
            raise InputError(
                f"a plan has a stream for each timestep: there were {len(self.timesteps)} timesteps and "
                f"{len(self.streams)} streams"
            )
        for stream in set(self.streams):
            if not self.computes[self.streams.index(stream)]:
                raise InputError(
                    f"the first call of stream {stream} computes: there is nothing to forecast from before it"
                )
        if not self.fitted:
            object.__setattr__(self, "fitted", ((),) * len(self.timesteps))
        if len(self.fitted) != len(self.timesteps):
            raise InputError(
                f"a plan has fitted weights for each timestep or for none: there were {len(self.timesteps)} timesteps and "
                f"weights for {len(self.fitted)}"
            )
        if any(self.fitted):
            self._check_weights()

    def _check_weights(self) -> None:
        for call, (weights, points) in enumerate(zip(self.fitted, self._points, strict=True)):
            if not all(math.isfinite(weight) for weight in weights):
                raise InputError(f"a plan's weights are finite numbers; one of call {call + 1} was not")
            if weights and (self.computes[call] or len(weights) != len(points)):
                there = "computes" if self.computes[call] else f"is forecast from {len(points)} outputs"
                raise InputError(f"call {call + 1} of the plan {there}, and has {len(weights)} weights")

    @cached_property
    def _points(self) -> list[tuple[float, ...]]:
        """For each call the timesteps of the outputs that it is forecast from, the latest first."""
        past: dict[int, list[float]] = {}
        found = []
        for timestep, computes, stream in zip(self.timesteps, self.computes, self.streams, strict=True):
            own = past.setdefault(stream, [])
            found.append(tuple(own[k] for k in points_in(own, self.order)) if own else ())
            if computes:
                own.append(timestep)
        return found

    @cached_property
    def _by_times(self) -> dict[tuple[float, ...], tuple[float, ...]]:
        """Weights by the timestep of the call and those of the outputs."""
        calls = zip(self.timesteps, self._points, self.fitted, strict=True)
        return {(timestep, *points): weights for timestep, points, weights in calls if weights}

    def forecast(self, past: Sequence[float], at: float) -> list[tuple[int, float]]:
        """What a call gives that computes nothing, by a plan of one stream.

        The weights are those of the plan where the call and the outputs are; else the polynomial's.

        Args:
            past: timesteps of the computed calls so far, oldest first; at least one.
            at: the timestep of the call.

        Returns:
            Pairs of a position in `past` and a weight, the latest output first.
        """
        points = points_in(past, self.order)
        weights = self._by_times.get((at, *(past[k] for k in points)))
        return forecast(past, at, self.order) if weights is None else list(zip(points, weights, strict=True))

    @property
    def share(self) -> float:
        """Computed share of the calls, in (0, 1]."""
        return sum(self.computes) / len(self.computes)

    @property
    def polynomial(self) -> int:
        """The order of the forecast, for those who compute polynomials alone.

        Raises:
            InputError: it is none.
        """
        if isinstance(self.order, str):
            raise InputError(
                f"the plan forecasts by {self.order!r}, which only calls of the module itself do: graphs and files take "
                "forecasts of order 0, 1 and 2"
            )
        return self.order


def stream_of(plan: Plan, stream: int) -> Plan:
    """The calls of one stream of a plan; of its last one, if it has fewer."""
    stream = min(stream, max(plan.streams))
    places = [k for k, own in enumerate(plan.streams) if own == stream]
    return Plan(
        tuple(plan.timesteps[k] for k in places), tuple(plan.computes[k] for k in places), plan.order,
        fitted=tuple(plan.fitted[k] for k in places),
    )  # fmt: skip


def dense(timesteps: Sequence[float]) -> Plan:
    """The plan that computes everything."""
    return Plan(tuple(timesteps), (True,) * len(timesteps))


def even(timesteps: Sequence[float], share: float, order: Order = 2) -> Plan:
    """The plan that computes calls as evenly spread as they go, the first among them: at most `share` of them."""
    calls = len(timesteps)
    computed = max(1, math.floor(share * calls + 1e-9))
    chosen = {k * calls // computed for k in range(computed)}
    return Plan(tuple(timesteps), tuple(k in chosen for k in range(calls)), order)
