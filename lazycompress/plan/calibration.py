"""A calibration: what one model told about itself in a few dense runs, and all that planning needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is kept of the recorded runs. T calls in an image, B images.

    Attributes:
        timesteps: of the calls, in order: [T].
        streams: of the calls, see `Plan`: [T].
        gram: mean product of the elements of the outputs of two calls, for each image: float64 [B, T, T].
        reach: how far an error of a call's output gets into the final latents if the model does not react: float64 [T].
        gain: how much of that the model lets through when it does: float64 [T], above 0.
        image: mean square of the final latents of each image: float64 [B].
        weights: a hash of the model's weights; empty where there are none to see.
        calls: of the model that were spent.
    """

    timesteps: tuple[float, ...]
    streams: tuple[int, ...]
    gram: Floats
    reach: Floats
    gain: Floats
    image: Floats
    weights: str = ""
    calls: int = 0


def save_calibration(calibration: Calibration, folder: str | Path) -> Path:
    """Write `calibration.safetensors` and `calibration.json` into a folder, which appears whole or not at all.

    Raises:
        ExportError: the folder cannot be written.
    """
    raise NotImplementedError


def load_calibration(folder: str | Path) -> Calibration:
    """The calibration that `save_calibration` wrote.

    Raises:
        InputError: the folder holds none, or what it holds is damaged: says which file and what about it.
    """
    raise NotImplementedError
