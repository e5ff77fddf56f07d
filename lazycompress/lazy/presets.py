"""Plans from what was learned before, without a call of the model: for other budgets, other steps, another machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import kind_of, path_of
from ..plan.calibration import ABOUT_FILE, Calibration, load_calibration
from ..recipe import Recipe
from .learn import Search
from .store import CALIBRATION_FOLDER, PLAN_FILE, read_settings


@dataclass(frozen=True)
class Preset:
    """What one denoiser's plans are made from, and the share of its calls that it was learned for."""

    search: Search
    target: float


def presets(folder: str | Path) -> dict[str, Preset]:
    """What a folder holds, by the denoisers' names; of a single one, and of a calibration alone, without a name.

    Args:
        folder: what `lazycompress.save`, or a pipeline's `save_pretrained`, wrote; or the calibration in one.

    Raises:
        InputError: it holds no calibration, or a broken one.
        ExportError: its plan is broken.
    """
    root = path_of(folder)
    if kind_of(root / ABOUT_FILE) == "file":
        own = Recipe()
        return {"": Preset(Search(load_calibration(root), own.forecast, own.guards), own.targets[0])}
    inside = [*root.glob(f"*/{PLAN_FILE}"), *root.glob(f"*/*/{PLAN_FILE}")]
    places = (
        {"": root} if kind_of(root / PLAN_FILE) == "file" else {p.relative_to(root).parts[0]: p.parent for p in inside}
    )
    found = {name: _preset(place) for name, place in sorted(places.items())}
    if not found:
        raise InputError(
            f"{root} holds no plan and no calibration: 'lazycompress apply' and lazycompress.save write them, of whole calls"
        )
    return found


def spread_as(calibration: Calibration, steps: int) -> tuple[float, ...]:
    """So many timesteps, spread over the range as those of a calibration are."""
    streams = np.array(calibration.streams)
    own = np.array(calibration.timesteps)[streams == streams[0]]
    return tuple(float(t) for t in np.interp(np.linspace(0, len(own) - 1, steps), np.arange(len(own)), own))


def _preset(place: Path) -> Preset:
    if kind_of(place / CALIBRATION_FOLDER) != "folder":
        raise InputError(f"{place} holds a plan without a calibration: apply the recipe again")
    target, recipe = read_settings(place)
    return Preset(Search(load_calibration(place / CALIBRATION_FOLDER), recipe.forecast, recipe.guards), target)
