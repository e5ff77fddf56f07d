"""What a training that was cut off goes on from: a folder with the result of every sampling run that was finished.

Training is repeatable: with the same recipe and model it makes the same runs again. So nothing of its progress needs to be
written but the results of runs, each under the name of what it depends on: a run that is asked for again is read instead.
Files appear whole or not at all, whenever the process ends.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import Tensor

from .. import __version__
from ..encoding import EncodingError, decode, encode
from ..errors import ExportError, InputError, RecipeError
from ..files import checked, kind_of, path_of, read_json, read_tensors, write_tensors, written_whole
from ..plan.kept import ABOUT_FILE, PART, empty
from ..plan.kept import discard as discard_calibration
from ..recipe import Recipe
from ..runtime import LazyModel
from ..weights import weights_hash
from .distributed import Group

#: Names of results, and the key of a result's structure in its file.
_RESULT, _STRUCTURE = re.compile(r"[0-9a-f]{32}\.safetensors"), "structure"

#: Recipe keys that say nothing about what is learned.
_ELSEWHERE = ("train.checkpoint", "export.")


class _About(BaseModel):
    """`about.json`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lazycompress: str = Field(max_length=100)
    recipe: dict[str, Any]
    model: str = Field(max_length=200)
    timesteps: list[Annotated[float, Field(allow_inf_nan=False)]]


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
        self.folder = path_of(folder, "train.checkpoint") if folder else None
        if self.folder is None:
            return
        path = self.folder / ABOUT_FILE
        if kind_of(path) == "file":
            _compare(self.folder, _read_about(path), json.loads(json.dumps(about)))
        elif main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                other = next((p.name for p in sorted(self.folder.iterdir()) if not PART.fullmatch(p.name)), None)
                if other is not None and not any(self.folder.glob(f"*/{ABOUT_FILE}")):
                    raise ExportError(
                        f"train.checkpoint: {self.folder} is not empty and keeps no training (it holds {other}); choose "
                        "another folder"
                    )
                with written_whole(path) as beside:
                    beside.write_text(json.dumps(about, indent=2), encoding="utf-8")
            except OSError as error:
                raise ExportError(
                    f"train.checkpoint: cannot write {self.folder}: {error.strerror}; choose another folder"
                ) from None

    def get(self, name: str) -> Any:
        """What was kept under this name, on the CPU, or None."""
        path = self._path(name)
        if path is None or kind_of(path) != "file":
            return None
        try:
            tensors = read_tensors(path, InputError)
            with safe_open(path, framework="pt") as file:
                structure = json.loads((file.metadata() or {}).get(_STRUCTURE, ""))
            return decode(structure, lambda name: _of(tensors, name))
        except (InputError, EncodingError, RecursionError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}; delete it") from None

    def put(self, name: str, value: Any) -> None:
        """Keep tensors, numbers, or lists and dictionaries of them."""
        path = self._path(name)
        if path is None:
            return
        tensors: dict[str, Tensor] = {}

        def number(tensor: Tensor) -> str:
            tensors[str(len(tensors))] = tensor.detach().cpu().clone().contiguous()
            return str(len(tensors) - 1)

        structure = json.dumps(encode(value, number))
        try:
            with written_whole(path) as beside:
                write_tensors(tensors, beside, {_STRUCTURE: structure})
        except OSError as error:
            raise ExportError(f"train.checkpoint: cannot write {path}: {error.strerror}") from None

    def _path(self, name: str) -> Path | None:
        return (
            None
            if self.folder is None
            else self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
        )


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
    """A hash of the branches and of the weights, the same on every device."""
    digest = hashlib.sha256(weights_hash(lazy.model).encode())
    for branch in lazy.branches:
        digest.update(f"{branch.name} {branch.kind} {branch.macs} {branch.width}".encode())
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
    """Delete what trainings keep in a folder and in those in it, and the folders if nothing else is in them."""
    if folder.is_symlink():
        return
    for inner in (*(path.parent for path in folder.glob(f"*/{ABOUT_FILE}")), folder):
        discard_calibration(inner)
    found = [path.parent for path in (folder / ABOUT_FILE, *folder.glob(f"*/{ABOUT_FILE}")) if _keeps_training(path)]
    for inner in found:
        empty(inner, _RESULT)
    if found:
        with suppress(OSError):
            folder.rmdir()


def _keeps_training(path: Path) -> bool:
    try:
        return not path.parent.is_symlink() and bool(_read_about(path))
    except InputError:
        return False


def _of(tensors: Mapping[str, Tensor], name: Any) -> Tensor:
    if not isinstance(name, str) or name not in tensors:
        raise EncodingError("its structure names a tensor that is not there")
    return tensors[name]


def _read_about(path: Path) -> dict[str, Any]:
    return checked(
        read_json(path, InputError), _About, f"{path} does not describe a training (choose another folder)", InputError
    ).model_dump()


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
