"""How far an error of one call's output gets into the final latents, if the model does not react: of samplers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..sampling import Sampler
from .calibration import Floats
from .mixing import mixing_of
from .runs import Reading
from .tape import Tape


def reach_of(scheduler: Any, timesteps: Sequence[float] | None = None) -> Callable[[Sequence[float]], Floats]:
    """The reach of a diffusers scheduler whose timesteps are set: for `plan_for(reach=...)`.

    Plays its `step` with outputs of zero, one of them changed at a time. The scheduler itself is left as it is.

    Args:
        scheduler: anything with `timesteps` and `step(output, timestep, sample)`.
        timesteps: that the model is told, in order, where they are others than the scheduler's own.

    Raises:
        InputError: the scheduler has no timesteps yet; or, of the function, that it is asked for others.
    """
    steps = getattr(scheduler, "timesteps", None)
    if steps is None or not len(steps):
        raise InputError(f"{type(scheduler).__name__} has no timesteps: call its set_timesteps first")
    told = [float(t) for t in (steps if timesteps is None else timesteps)]

    def sampler(model: Any) -> torch.Tensor:
        fresh = copy.deepcopy(scheduler)
        sample = torch.zeros(1, 1, 4, 4)  # of an affine sampler the noise does not matter, but for rounding
        scale = getattr(fresh, "scale_model_input", lambda value, timestep: value)
        for timestep in fresh.timesteps:
            sample = fresh.step(model(scale(sample, timestep), timestep), timestep, sample).prev_sample
        return sample

    def reach(asked: Sequence[float]) -> Floats:
        if len(asked) != len(told) or not np.allclose(asked, told, rtol=1e-4, atol=1e-4 * max(map(abs, told))):
            raise InputError(f"the scheduler makes {len(told)} calls from {told[0]:g} to {told[-1]:g}: plan for these")
        readings = tuple(Reading(t) for t in told)
        return reach_of_loop(sampler, readings, torch.zeros(1, 1, 4, 4))

    return reach


def reach_of_loop(sampler: Sampler, readings: Sequence[Reading], output: torch.Tensor, seed: int = 0) -> Floats:
    """The reach of any loop whose calls take an output like `output`, with no model in it: float64 [T]."""
    outputs = tuple(torch.zeros_like(output) for _ in readings)
    silent = Tape(seed, tuple(readings), outputs, output, output.device)
    return mixing_of(silent, lambda *args, **kwargs: output, sampler).reach
