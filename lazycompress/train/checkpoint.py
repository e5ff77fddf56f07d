"""What a training that was cut off goes on from: a folder with the result of every sampling run that was finished.

Training is repeatable: with the same recipe and model it makes the same runs again. So nothing of its progress needs to be
written but the results of runs, each under the name of what it depends on: a run that is asked for again is read instead.
Files appear whole or not at all, whenever the process ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import ExportError, InputError, RecipeError
from ..recipe import Recipe
from ..runtime import LazyModel
from .distributed import Group

ABOUT_FILE = "about.json"

#: Recipe keys that say nothing about what is learned.
_ELSEWHERE = ("train.checkpoint", "export.")


class Checkpoint:
    """Results by name, in a folder; of no folder, nothing is kept.

    Args:
        folder: where; made if it is not there.
        about: what the training is of: flat keys and values, see `about`.
        main: whether this process writes what is common to all.

    Raises:
        RecipeError: the folder is of a training with another recipe.
        InputError: it is of another model, or of another version of this package.
        ExportError: it cannot be written.
    """

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any], main: bool = True) -> None:
        self.folder = Path(folder) if folder else None
        if self.folder is None:
            return
        path = self.folder / ABOUT_FILE
        if path.is_file():
            _compare(self.folder, _read_about(path), json.loads(json.dumps(about)))
        elif main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ExportError(
                    f"train.checkpoint: cannot write {self.folder}: {error.strerror}; choose another folder"
                ) from None
            _write(path, json.dumps(about, indent=2).encode())

    def get(self, name: str) -> Any:
        """What was kept under this name, on the CPU, or None."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no class of its own for what cannot be read
            raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}; delete it") from None

    def put(self, name: str, value: Any) -> None:
        """Keep tensors, numbers, or lists and dictionaries of them."""
        path = self._path(name)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
            os.close(handle)
            torch.save(value, beside)
            os.replace(beside, path)
        except OSError as error:
            raise ExportError(f"train.checkpoint: cannot write {path}: {error.strerror}") from None

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.pt"


def about(lazy: LazyModel, recipe: Recipe, timesteps: list[float]) -> dict[str, Any]:
    """What a training depends on: the recipe's keys, the model, and the timesteps of the sampler's calls."""
    keys = {
        key: value for key, value in _flat(recipe.model_dump(mode="json")).items() if not key.startswith(_ELSEWHERE)
    }
    return {
        "lazycompress": __version__,
        "recipe": keys,
        "model": fingerprint(lazy),
        "timesteps": [round(t, 4) for t in timesteps],
    }


def fingerprint(lazy: LazyModel) -> str:
    """A hash of the branches and of some values of every weight."""
    digest = hashlib.sha256()
    for branch in lazy.branches:
        digest.update(f"{branch.name} {branch.kind} {branch.macs} {branch.width}".encode())
    for name, value in lazy.model.state_dict().items():
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)].cpu()
        digest.update(some.contiguous().view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    return digest.hexdigest()[:32]


def begin(folder: str, directory: Path, resume: bool, group: Group) -> Path:
    """The checkpoint of a training into `directory`: the recipe's, which is always gone on with, or one beside it.

    Of the one beside it nothing is left unless the training resumes.

    Raises:
        InputError: there is nothing to go on with.
    """
    path = Path(folder) if folder else directory.absolute().with_name(f"{directory.absolute().name}.training")
    if resume and not any(path.glob(f"**/{ABOUT_FILE}")):
        raise InputError(f"nothing to resume: {path} keeps no training; leave out --resume to begin one")
    if not resume and not folder and group.main:
        discard(path)
    group.wait()
    return path


def discard(folder: Path) -> None:
    """Delete the folder of a training, and nothing that is none."""
    if any(folder.glob(f"**/{ABOUT_FILE}")):
        shutil.rmtree(folder, ignore_errors=True)


def _read_about(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; delete the folder, or choose another one") from None
    if not isinstance(found, dict) or not {"lazycompress", "recipe", "model", "timesteps"} <= set(found):
        raise InputError(f"{path} does not describe a training; choose another folder")
    return found


def _compare(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    what = f"{folder} keeps another training"
    todo = "delete the folder, or choose another one"
    for key in sorted(set(old["recipe"]) | set(new["recipe"])):
        before, now = old["recipe"].get(key), new["recipe"].get(key)
        if before != now:
            raise RecipeError(f"{what}: {key} was {before!r}, now it is {now!r}; {todo}")
    for part, name in (
        ("lazycompress", "lazycompress' version"),
        ("model", "the model"),
        ("timesteps", "the sampler's timesteps"),
    ):
        if old[part] != new[part]:
            values = f" was {old[part]}, now it is {new[part]}" if part == "lazycompress" else " is another one"
            raise InputError(f"{what}: {name}{values}; {todo}")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {key: v for name, inner in value.items() for key, v in _flat(inner, f"{prefix}{name}.").items()}


def _write(path: Path, data: bytes) -> None:
    handle, beside = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(beside, path)
