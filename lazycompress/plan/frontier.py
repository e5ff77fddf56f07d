"""What compute buys, as a calibration prices it: no call of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .calibration import Calibration
from .plan import Plan
from .search import Guards, plans_for, predict

#: Shares of the calls.
SHARES = (0.2, 0.25, 0.34, 0.4, 0.5, 0.6, 0.7, 0.85)


@dataclass(frozen=True)
class Point:
    """A plan, and the error it is priced at: mean over the images, and as a share of their mean square."""

    plan: Plan
    error: float
    relative: float


def frontier(
    calibration: Calibration, shares: Sequence[float] = SHARES, *, guards: Guards | None = None, seed: int = 0
) -> list[Point]:
    """The best plans found at these shares of a calibration's own calls, in the order of the shares.

    Raises:
        InputError: see `plan_for`.
    """
    found = []
    for share in shares:
        (plan,) = plans_for(calibration, share, guards=guards, seed=seed)
        error = float(predict(calibration, plan).mean())
        found.append(Point(plan, error, error / max(float(calibration.image.mean()), 1e-300)))
    return found
