"""A calibration: what one model told about itself in a few dense runs, and all that planning needs of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from ..errors import InputError
from ..places import CALIBRATION, seal, whole_folder
from ..weights import weights_hash
from .forecasts import HIGHEST_ORDER

Floats = npt.NDArray[np.float64]

TENSORS_FILE = "calibration.safetensors"
ABOUT_FILE = "calibration.json"

#: Of the two files; a reader refuses others.
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is kept of the recorded runs. T calls in an image, B images.

    Attributes:
        timesteps: of the calls, in order: [T].
        streams: of the calls, see `Plan`: [T].
        gram: mean product of the elements of the predictions of two calls, for each image: float64 [B, T, T].
        reach: how far an error of a call's prediction gets into the final latents if the model does not react: float64 [T].
        gain: how much of that the model lets through when it does: float64 [T], above 0.
        image: mean square of the final latents of each image: float64 [B].
        weights: a hash of the model's weights; empty where there are none to see.
        calls: of the model that were spent.
        scale: true errors of plans with a forecast of order 0, 1 and 2, as multiples of what the rest of this prices them at;
            of ones where no plan was run.

    Raises:
        InputError: shapes do not agree, a number is not finite, or a gain or a scale is not above 0.
    """

    timesteps: tuple[float, ...]
    streams: tuple[int, ...]
    gram: Floats
    reach: Floats
    gain: Floats
    image: Floats
    weights: str = ""
    calls: int = 0
    scale: tuple[float, ...] = (1.0,) * (HIGHEST_ORDER + 1)

    def __post_init__(self) -> None:
        calls, images = len(self.timesteps), len(self.image)
        shapes = {
            "streams": (np.shape(self.streams), (calls,)),
            "gram": (self.gram.shape, (images, calls, calls)),
            "reach": (self.reach.shape, (calls,)),
            "gain": (self.gain.shape, (calls,)),
            "image": (self.image.shape, (images,)),
        }
        if not calls or not images:
            raise InputError(f"a calibration has calls and images; there were {calls} and {images}")
        for name, (there, needed) in shapes.items():
            if there != needed:
                raise InputError(f"a calibration of {calls} calls has {name} of shape {needed}; it was {there}")
        for name in ("timesteps", "gram", "reach", "gain", "image"):
            if not np.isfinite(getattr(self, name)).all():
                raise InputError(f"a calibration's numbers are finite; in its {name} one was not")
        if (self.gain <= 0).any():
            raise InputError("a calibration's gains are above 0; one was not")
        if len(self.scale) != HIGHEST_ORDER + 1 or not all(0 < factor < math.inf for factor in self.scale):
            raise InputError(
                f"a calibration has a scale above 0 for each order of the forecast; there was {list(self.scale)}"
            )

    def evened(self, share: float) -> Calibration:
        """With gains that differ by this share (of the logarithm) of what they do: 0 is the same gain for all calls."""
        logs = np.log(self.gain)
        mean = logs.mean()
        return replace(self, gain=np.exp(mean + share * (logs - mean)))


def save_calibration(calibration: Calibration, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write `calibration.safetensors` and `calibration.json` into a folder, which appears whole or not at all.

    Args:
        calibration: what to write.
        folder: a place that is free, or that of a calibration, see `places`.
        overwrite: replace a calibration that is there.

    Raises:
        ExportError: the folder is not ours to take, or cannot be written.
    """
    tensors: dict[str, Any] = {
        name: np.ascontiguousarray(getattr(calibration, name)) for name in ("gram", "reach", "gain", "image")
    }
    about = {
        "format": FORMAT,
        "timesteps": list(calibration.timesteps),
        "streams": list(calibration.streams),
        "weights": calibration.weights,
        "calls": calibration.calls,
        "scale": list(calibration.scale),
    }
    with whole_folder(folder, CALIBRATION, overwrite) as beside:
        save_file(tensors, beside / TENSORS_FILE)
        seal(beside, CALIBRATION, about)
    return Path(folder)


def load_calibration(folder: str | Path) -> Calibration:
    """The calibration that `save_calibration` wrote.

    Raises:
        InputError: the folder holds none, or what it holds is damaged: says which file and what about it.
    """
    about, path = _read_about(Path(folder) / ABOUT_FILE), Path(folder) / TENSORS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {_line(error)}; calibrate again") from None
    missing = {"gram", "reach", "gain", "image"} - set(tensors)
    if missing:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}; calibrate again")
    if any(not np.issubdtype(value.dtype, np.floating) for value in tensors.values()):
        raise InputError(f"{path} holds something else than floating-point numbers; calibrate again")
    values = {name: tensors[name].astype(np.float64) for name in ("gram", "reach", "gain", "image")}
    if values["gram"].ndim != 3 or values["image"].ndim != 1:
        raise InputError(f"{path} holds a gram of {values['gram'].ndim} dimensions; calibrate again")
    try:
        return Calibration(**(about | values))
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}; calibrate again") from None


def hash_of(denoise: Any) -> str:
    """The hash of a module's weights, or of those of the module that a method belongs to; else empty."""
    module = denoise if isinstance(denoise, nn.Module) else getattr(denoise, "__self__", None)
    return weights_hash(module) if isinstance(module, nn.Module) else ""


def _read_about(path: Path) -> dict[str, Any]:
    """The arguments of a calibration that are no arrays."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no calibration: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {_line(error)}; calibrate again") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        there = found.get("format") if isinstance(found, dict) else None
        raise InputError(f"{path} has format {there!r}, this version reads {FORMAT}; calibrate again")
    found.setdefault("scale", [1.0] * (HIGHEST_ORDER + 1))  # older ones have none
    kinds = {"timesteps": (int, float), "streams": (int,), "scale": (int, float)}
    for name, kind in kinds.items():
        values = found.get(name)
        if not isinstance(values, list) or not all(type(v) in kind for v in values):
            raise InputError(f"{path}: {name} is no list of numbers; calibrate again")
    if not isinstance(found.get("weights"), str) or type(found.get("calls")) is not int:
        raise InputError(f"{path}: weights is a text and calls a whole number; calibrate again")
    try:
        timesteps, scale = (tuple(float(t) for t in found[name]) for name in ("timesteps", "scale"))
    except OverflowError:
        raise InputError(f"{path}: a timestep or a scale is too large; calibrate again") from None
    return {
        "timesteps": timesteps,
        "scale": scale,
        "streams": tuple(found["streams"]),
        "weights": found["weights"],
        "calls": found["calls"],
    }


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
