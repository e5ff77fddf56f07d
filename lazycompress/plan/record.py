"""Calibrate a model inside the user's own denoising loop, forward only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..sampling import Sampler
from .calibration import Calibration


class Reading(NamedTuple):
    """What a call of the model says about itself: its timestep, and the stream it belongs to (see `Plan`)."""

    timestep: float
    stream: int = 0


#: `read(args, kwargs)` of one call of the model: its timestep, or that and its stream.
Read = Callable[[tuple[Any, ...], Mapping[str, Any]], float | Reading]

#: The model's forward: a module, a bound method, an OpenVINO request, an ONNX session.
Denoise = Callable[..., Any]


def calibrate(
    denoise: Denoise,
    sampler: Sampler,
    *,
    read: Read,
    images: int = 16,
    seed: int = 0,
    progress: bool = True,
    budget: float = 15.0,
    checkpoint: str | Path | None = None,
) -> Calibration:
    """Record dense runs of the sampler and measure how the model responds to a call that is forecast.

    Args:
        denoise: computes one call. It is only run, without gradients, in the precision and the place that it has.
        sampler: runs one denoising loop with the callable it is given in the model's place, and returns the final latents
            [batch, ...]; draws new noise from torch's global generator.
        read: the timestep of a call, and its stream if there are several.
        images: to look at, at least; the sampler runs as often as it takes.
        seed: of the noise.
        progress: show a bar with the time left, and say before how many calls there will be and how much memory they take.
        budget: calls to spend, in dense runs of all images; at least 2.
        checkpoint: a folder in which finished runs are kept: a calibration that was cut off goes on from it.

    Raises:
        InputError: the sampler does not fit, or an output is not finite: names the call.
        ExportError: the checkpoint cannot be written.
    """
    raise NotImplementedError
