"""Forecasts fitted to a plan: weights of the computed outputs that leave the least error in the final latents.

A polynomial forecasts each call as if it stood alone. What counts is what all of them together do to the image: errors of calls
near in time add up, and may as well cancel. The error that a plan is priced at is quadratic in the weights of its forecasts, so
the best ones are found at once, by least squares (see `price`; `K` is the Gram matrix of the predictions):

    minimise  sum over windows r of v_r' K v_r  +  ridge  over the weights that make up v_r

Nothing new is computed or kept while sampling: as many outputs are looked at as the polynomial looks at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .calibration import Calibration
from .forecasts import forecast
from .plan import Plan
from .price import Pricing

#: Windows over the loop (see `price`), half as many as plans are searched with, and how much of each call's error is counted by
#: itself, as one that nothing cancels. Weights that are fitted make errors cancel, so they ask for another balance than a price:
#: the same plans with 3 and 0.05 in place of 6 and 0.2, at half, 0.34 and a quarter of 50 calls, on 128 fresh images of the
#: digits models, three seeds: errors of the DiT 14 percent lower, 3 higher, 5 lower; of the flow 24, 31 and 34 percent lower.
WINDOWS = 3
ALONE = 0.05

#: How firmly weights are held to the polynomial's, as a share of what they do to the error: for the calls of the calibration, and
#: for other ones, of which less is known.
SEEN, UNSEEN = 1e-6, 1e-3


@dataclass(frozen=True)
class _Part:
    """An output's part in the forecast of a call.

    Attributes:
        call: that is forecast.
        point: the call whose output it is.
        weight: number of the weight: calls that nothing but their stream tells apart have the same ones.
        polynomial: the weight in the polynomial.
    """

    call: int
    point: int
    weight: int
    polynomial: float


def fit(calibration: Calibration, plan: Plan, ridge: float = SEEN) -> Plan:
    """The plan with forecasts fitted to it.

    As it is stays one that repeats the last output (order 0), that goes by a forecast of another package, or that names a
    timestep twice.

    Args:
        calibration: for the plan's own calls.
        plan: of a polynomial.
        ridge: see `SEEN`.
    """
    if not plan.order or isinstance(plan.order, str) or not (parts := _parts(plan)):
        return plan
    calls, points, weights = (
        np.array(column) for column in zip(*((p.call, p.point, p.weight) for p in parts), strict=True)
    )
    pricing = Pricing.of(calibration, WINDOWS).mean()
    alone = np.diag(pricing.reacted)
    errors = np.concatenate([pricing.weighted * (1 - ALONE) ** 0.5, alone * ALONE**0.5])
    made = np.diag(np.array(plan.computes, dtype=np.float64))
    np.add.at(made, (calls, points), [part.polynomial for part in parts])
    left = (errors @ made - errors) @ pricing.gram
    each = errors[:, calls]
    member = np.zeros((len(parts), int(weights.max()) + 1))
    member[np.arange(len(parts)), weights] = 1.0
    effect = member.T @ ((each.T @ each) * pricing.gram[np.ix_(points, points)]) @ member
    slope = member.T @ (each * left[:, points]).sum(axis=0)
    size = np.sqrt(np.diag(effect).clip(0.0))
    size[size == 0] = 1.0
    change = np.linalg.solve(effect / np.outer(size, size) + ridge * np.eye(len(size)), -slope / size) / size
    found: list[list[float]] = [[] for _ in plan.timesteps]
    for part in parts:
        found[part.call].append(float(part.polynomial + change[part.weight]))
    return replace(plan, fitted=tuple(map(tuple, found)))


def _parts(plan: Plan) -> list[_Part]:
    """Of all calls that are forecast; none if a stream names a timestep twice."""
    found: list[_Part] = []
    numbers: dict[tuple[float, ...], int] = {}
    for stream in sorted(set(plan.streams)):
        own = [k for k, other in enumerate(plan.streams) if other == stream]
        if len({plan.timesteps[k] for k in own}) < len(own):
            return []
        computed: list[int] = []
        for call in own:
            if plan.computes[call]:
                computed.append(call)
                continue
            past = [plan.timesteps[k] for k in computed]
            forecasts = forecast(past, plan.timesteps[call], plan.order)
            times = (plan.timesteps[call], *(past[position] for position, _ in forecasts))
            for k, (position, weight) in enumerate(forecasts):
                number = numbers.setdefault((k, *times), len(numbers))
                found.append(_Part(call, computed[position], number, weight))
    return found
