"""Forecasts: what a call that computes nothing gives, as weights of the outputs that were computed last.

A forecast says which weights, for which times. The same weights price a plan and run it, so that a search knows what it gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from .. import kinds
from ..errors import InputError

#: Which forecast: the order of the polynomial through the last outputs, or the name of one that another package brings.
Order = int | str

#: Polynomials are of this order at most: noise in the outputs is multiplied by about 2 ** order.
HIGHEST_ORDER = 2


class Forecast(Protocol):
    """Which computed outputs weigh how much; a module, or an object.

    Attributes:
        points: outputs that it looks at, at most; as many are kept of each sample.
    """

    @property
    def points(self) -> int: ...

    def weights(self, times: Sequence[float], at: float) -> Sequence[float]:
        """Weights of the last computed outputs of one stream, for the call at `at`. Pure: plans are priced by it.

        Args:
            times: of these outputs, the latest first, all different: at least one, and at most `points`.
            at: the timestep of the call, past all of them; or the latest itself, for a call that repeats a timestep.

        Returns:
            A finite number for each.
        """
        ...


@dataclass(frozen=True)
class Polynomial:
    """The polynomial through the last outputs: TaylorSeer's forecast (arXiv 2503.06923) of a model's output."""

    order: int

    @property
    def points(self) -> int:
        return self.order + 1

    def weights(self, times: Sequence[float], at: float) -> Sequence[float]:
        return lagrange(times, at)


CONSTANT, LINE, PARABOLA = Polynomial(0), Polynomial(1), Polynomial(2)


@cache
def forecast_of(order: Order) -> Forecast:
    """The forecast that goes by an order, or by a name.

    Raises:
        InputError: there is none, or what there is says nothing of its points.
    """
    found: Forecast = kinds.find("forecasts", order if isinstance(order, str) else str(int(order)))
    points = getattr(found, "points", None)
    if type(points) is not int or points < 1 or not callable(getattr(found, "weights", None)):
        raise InputError(f"the forecast {order!r} has to have points, 1 or more of them, and weights(times, at)")
    return found


def forecast(past: Sequence[float], at: float, order: Order) -> list[tuple[int, float]]:
    """What a call that computes nothing gives: which computed outputs of its stream weigh how much.

    Args:
        past: timesteps of the computed calls of the stream so far, oldest first; at least one.
        at: the timestep of the call.
        order: see `Plan`.

    Returns:
        Pairs of a position in `past` and a weight, the latest output first.
    """
    points = points_in(past, order)
    return list(zip(points, weights_of(order, tuple(past[p] for p in points), at), strict=True))


def points_in(past: Sequence[float], order: Order) -> list[int]:
    """Positions of the outputs that a forecast looks at, the latest first: as many as it has points, or as there are.

    Of several at one time, as samplers of second order make them, the last one counts.
    """
    most = forecast_of(order).points
    points: list[int] = []
    for k in range(len(past) - 1, -1, -1):
        if all(past[k] != past[p] for p in points):
            points.append(k)
        if len(points) == most:
            break
    return points


def weights_of(order: Order, times: tuple[float, ...], at: float) -> Sequence[float]:
    """See `Forecast.weights`; what another package gives is looked at before it is used.

    Raises:
        InputError: it is not a finite number for each of the times.
    """
    found = forecast_of(order).weights(times, at)
    if isinstance(order, str) and (len(found) != len(times) or not all(math.isfinite(weight) for weight in found)):
        raise InputError(
            f"the forecast {order!r} gave the weights {list(found)} for the {len(times)} times {list(times)}"
        )
    return found


def lagrange(times: Sequence[float], at: float) -> list[float]:
    """Weights of values at `times`, all different, in the polynomial through them at `at` (Lagrange's form)."""
    found = []
    for i, own in enumerate(times):
        weight = 1.0
        for j, other in enumerate(times):
            if i != j:
                weight *= (at - other) / (own - other)
        found.append(weight)
    return found
