"""Results of a calibration's runs in a folder, so that one that was cut off goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .. import __version__
from ..errors import ExportError, InputError
from ..files import written_whole
from .calibration import Floats

ABOUT_FILE = "about.json"

#: Names of files that were cut off.
PART = re.compile(r"\..+\.part")

_RESULT = re.compile(r"(dense|skip)-[0-9-]+\.safetensors")


def about(images: int, seed: int, budget: float, weights: str) -> dict[str, Any]:
    """What a calibration depends on: `about.json`."""
    return {"lazycompress": __version__, "images": images, "seed": seed, "budget": budget, "weights": weights}


class Kept:
    """Arrays by name, in a folder; of no folder, nothing is kept. Files appear whole or not at all.

    Args:
        folder: where; made if it is not there.
        about: what the results depend on: flat keys and values that JSON has.

    Raises:
        InputError: the folder keeps another calibration, or something else.
        ExportError: it cannot be written.
    """

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        path = self.folder / ABOUT_FILE
        if not path.is_file():
            self._write(path, json.dumps(about, indent=1).encode())
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{path} does not describe a calibration; choose another folder")
        now = json.loads(json.dumps(about))
        for key in sorted(set(found) | set(now)):
            if found.get(key) != now.get(key):
                raise InputError(
                    f"{self.folder} keeps another calibration: {key} was {found.get(key)!r}, now it is {now.get(key)!r}; "
                    "delete the folder, or choose another one"
                )

    def get(self, name: str) -> dict[str, Floats] | None:
        """What was kept under this name.

        Raises:
            InputError: it cannot be read.
        """
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").is_file():
            return None
        try:
            return {key: value.astype(np.float64) for key, value in load(path.read_bytes()).items()}
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}; delete it") from None

    def put(self, name: str, arrays: Mapping[str, Floats]) -> None:
        """Keep arrays."""
        if self.folder is not None:
            values = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
            self._write(self.folder / f"{name}.safetensors", save(values))

    def _write(self, path: Path, data: bytes) -> None:
        try:
            with written_whole(path) as beside:
                beside.write_bytes(data)
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror}; choose another folder") from None


def discard(folder: Path) -> None:
    """Delete what a calibration keeps in a folder, and the folder if nothing else is in it; others' folders stay as they are."""
    try:
        found = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8")) if not folder.is_symlink() else None
    except (OSError, ValueError):
        return
    if isinstance(found, dict) and found.keys() == about(0, 0, 0.0, "").keys():
        empty(folder, _RESULT)


def empty(folder: Path, results: re.Pattern[str]) -> None:
    """Delete results, what they are of, and files that were cut off; and the folder if nothing else is in it.

    What the system does not let go stays: the work that they were kept for is done.
    """
    with suppress(OSError):
        for path in folder.iterdir():
            own = path.name == ABOUT_FILE or results.fullmatch(path.name) or PART.fullmatch(path.name)
            if own and not path.is_dir():
                path.unlink(missing_ok=True)
        folder.rmdir()
