"""How far an error of one call's output gets into the final latents, if the model does not react: of samplers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .calibration import Floats


def reach_of(scheduler: Any, timesteps: Sequence[float] | None = None) -> Callable[[Sequence[float]], Floats]:
    """The reach of a diffusers scheduler whose timesteps are set: for `plan_for(reach=...)`.

    Plays its `step` with outputs of zero, one of them changed at a time. The scheduler itself is left as it is.

    Args:
        scheduler: anything with `timesteps` and `step(output, timestep, sample)`.
        timesteps: to play; left out, the scheduler's own.

    Raises:
        InputError: the scheduler has no timesteps yet.
    """
    raise NotImplementedError
