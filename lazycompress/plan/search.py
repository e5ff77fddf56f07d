"""Search for plans: thousands a second, priced by a calibration, without a call of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .calibration import Calibration, Floats
from .plan import Plan

#: `reach(timesteps)`: how far an error of each call's output gets into the final latents, for these calls: float64 [T].
Reach = Callable[[Sequence[float]], Floats]


def plan_for(
    calibration: Calibration,
    target: float,
    timesteps: Sequence[float] | None = None,
    *,
    streams: Sequence[int] | None = None,
    reach: Reach | None = None,
    orders: Sequence[int] = (0, 1, 2),
    first: int = 1,
    last: int = 0,
    max_reuse: int = 8,
    seed: int = 0,
) -> Plan:
    """The best plan found that computes at most this share of the calls; never worse, as priced, than the even ones.

    Args:
        calibration: of the model.
        target: share of the calls to compute, in (0, 1].
        timesteps: of the calls to plan; left out, those of the calibration. The first call of each stream computes.
        streams: of these calls; left out, all are of one stream, or those of the calibration if the timesteps are its own.
        reach: of the sampler that makes them, see `reach_of`; left out, that of the calibration, by step size.
        orders: of the forecast, to choose from.
        first, last: calls that compute at the beginning and at the end.
        max_reuse: calls in a row (of a stream) that compute nothing, at most; more only where the target leaves no choice.
        seed: of the search; the same arguments give the same plan.

    Raises:
        InputError: a target outside (0, 1], timesteps that are not finite, or guards that the target does not leave room for.
    """
    raise NotImplementedError


def predict(calibration: Calibration, plan: Plan, *, reach: Reach | None = None) -> Floats:
    """Mean squared error of the final latents that a plan is priced at, for each image of the calibration: float64 [B]."""
    raise NotImplementedError
