"""A plan as text: what it computes, and what a calibration expects of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .calibration import Calibration
from .move import moved
from .plan import Plan, stream_of
from .search import evens, predict

#: Steps in a line.
_LINE = 50


@dataclass(frozen=True)
class Priced:
    """A plan, and what is expected of it. Errors are mean squares, as shares of the images' own.

    Attributes:
        relative: error of the plan.
        even: error of the best even plan that computes as much.
    """

    plan: Plan
    relative: float
    even: float


def priced(calibration: Calibration, plan: Plan) -> Priced:
    """What a calibration expects of a plan, without a call of the model."""
    size = max(float(calibration.image.mean()), 1e-300)
    there = moved(calibration, plan.timesteps, plan.streams)
    orders = (plan.order,) if isinstance(plan.order, str) else (0, 1, 2)
    even = min(float(predict(there, other).mean()) for other in evens(there, plan.share, orders))
    return Priced(plan, float(predict(calibration, plan).mean()) / size, even / size)


def drawn(price: Priced) -> str:
    """Lines: how much is computed, which steps are (a block) and which are not (a dot), and what that costs."""
    plan = price.plan
    order = f"order {plan.order}" if isinstance(plan.order, int) else repr(plan.order)
    lines = [f"{sum(plan.computes)} of {len(plan.computes)} calls computed ({plan.share:.1%}), forecasts of {order}"]
    for stream in sorted(set(plan.streams)):
        own = stream_of(plan, stream)
        if len(set(plan.streams)) > 1:
            lines.append(f"pass {stream + 1} of each step")
        lines += _rows(own)
    lines.append(f"expected error {price.relative:.1e} of the images' size, of an even plan {price.even:.1e}")
    return "\n".join(lines)


def _rows(plan: Plan) -> Iterator[str]:
    """Of one pass: the timesteps at both ends, and a mark for each step between them."""
    marks = ["█" if computes else "·" for computes in plan.computes]
    for begin in range(0, len(marks), _LINE):
        part = plan.timesteps[begin : begin + _LINE]
        yield f"{part[0]:>10g} {''.join(marks[begin : begin + _LINE])} {part[-1]:g}"
