"""Single files, read with limits and written whole. What is wrong with one is a line that names it.

Nothing that a file says is imported, called or looked up by name: JSON and safetensors hold values alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ExportError, LazyCompressError

_Model = TypeVar("_Model", bound=BaseModel)

#: No JSON file of this package or of diffusers comes near it, in bytes.
LARGEST_JSON = 64 * 2**20

_CHUNK = 2**20

_Error = type[LazyCompressError]


def path_of(value: Any, what: str = "directory", error: _Error = ExportError) -> Path:
    """A user's path as a `Path`.

    Args:
        value: what the user gave.
        what: what it is for, for the message.
        error: the class to raise.

    Raises:
        LazyCompressError: it is no path, an empty one, or one that no system has.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str):
        raise error(f"{what}: a path is a string or a Path; there was {type(value).__name__}: {_shown(value)}")
    if not text:
        raise error(f"{what}: the path is empty; name a folder or file")
    if "\0" in text:
        raise error(f"{what}: a path holds no zero byte; there was {_shown(text)}")
    return Path(text)


def kind_of(path: Path, error: _Error = ExportError) -> str:
    """What a path leads to, links followed: "file", "folder", "other" (a device, a pipe), or "" for nothing.

    Raises:
        LazyCompressError: the system does not say.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as problem:
        raise error(f"cannot read {_short(path)}: {problem.strerror or problem}") from None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def read_text(path: Path, error: _Error = ExportError, largest: int = LARGEST_JSON) -> str:
    """A whole text file.

    Raises:
        LazyCompressError: it is not there, not a file, too large, not UTF-8, or cannot be read.
    """
    kind = kind_of(path, error)
    if kind != "file":
        raise error(f"{_short(path)} {'is missing' if not kind else 'is no file'}")
    try:
        size = path.stat().st_size
        if size > largest:
            raise error(f"{path} has {size} bytes, more than the {largest} that such a file may have")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text: {problem.reason} at byte {problem.start}") from None
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror or problem}") from None


def read_json(path: Path, error: _Error = ExportError) -> Any:
    """The value in a JSON file. Keys are given once; NaN and Infinity are no JSON.

    Raises:
        LazyCompressError: as for `read_text`, or it is not JSON.
    """
    text = read_text(path, error)
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise error(f"{path} is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{path} is not JSON: {_line(problem)}") from None


def read_object(path: Path, error: _Error = ExportError) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        LazyCompressError: as for `read_json`, or it is something else.
    """
    found = read_json(path, error)
    if not isinstance(found, dict):
        raise error(f"{path} holds no JSON object but {_shown(found)}")
    return found


def checked(data: Any, model: type[_Model], where: Path | str, error: _Error = ExportError) -> _Model:
    """`data` as a pydantic model.

    Raises:
        LazyCompressError: it does not fit; names the key, and what there was.
    """
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise error(f"{where}: {key} is missing") from None
        if first["type"] == "extra_forbidden":
            raise error(f"{where}: unknown key {key!r}") from None
        message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"].lower()
        at = f"{key}: " if key else ""
        raise error(f"{where}: {at}{_line(message)}; there was {_shown(first['input'])}") from None


@dataclass(frozen=True)
class TensorEntry:
    """What the header of a safetensors file says of a tensor: its dtype as safetensors names it, such as F32, and sizes."""

    dtype: str
    shape: tuple[int, ...]


def tensor_entries(path: Path, error: _Error = ExportError) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, none of them read.

    Raises:
        LazyCompressError: it is no such file.
    """
    if kind_of(path, error) != "file":
        raise error(f"{_short(path)} is missing, or no file")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return {name: TensorEntry(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise error(f"{path} is no whole safetensors file: {_line(problem)}") from None


def read_tensors(path: Path, error: _Error = ExportError) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        LazyCompressError: it is no such file.
    """
    _ = tensor_entries(path, error)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as problem:
        raise error(f"{path} cannot be read: {_line(problem)}") from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata)
    except (SafetensorError, OSError) as problem:
        raise ExportError(f"cannot write {path}: {_line(problem)}") from None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside a file to write it to; it takes the file's place after the block, and is gone if the block fails.

    Raises:
        OSError: the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file.

    Raises:
        ExportError: it holds NaN or infinity, or what JSON has no form for.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise ExportError(f"cannot write {path}: {_line(problem)}") from None
    path.write_text(text + "\n", encoding="utf-8")


def check_file(path: str | Path, mark: str) -> Path:
    """Refuse a place that `write_file` would not take: before long work, for one.

    Raises:
        ExportError: there is a link, a folder, or a file of the user's.
    """
    place = path_of(path, "file")
    try:
        if place.is_symlink():
            raise ExportError(f"{place} is a link to {os.readlink(place)}: name the file itself")
        kind = kind_of(place)
        if kind in ("folder", "other"):
            raise ExportError(f"cannot write {place}: it is no file; choose another name")
        if kind == "file" and place.stat().st_size and mark not in place.read_text("utf-8", errors="replace"):
            raise ExportError(f"{place} is a file that lazycompress did not write; choose another name")
    except OSError as problem:
        raise ExportError(f"cannot write {_short(place)}: {problem.strerror or problem}") from None
    return place


def write_file(path: str | Path, text: str, mark: str) -> None:
    """Write a single text file for the user, whole or not at all.

    Args:
        path: where to; its folder is there.
        text: what to write.
        mark: a piece of `text` by which a file is known that was written before, and may be replaced.

    Raises:
        ExportError: there is a link, a folder, or a file of the user's; or it cannot be written.
    """
    place = check_file(path, mark)
    if not place.parent.is_dir():
        raise ExportError(
            f"cannot write {_short(place)}: {_short(place.parent)} is no folder; make it, or choose another name"
        )
    try:
        with written_whole(place) as beside:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            beside.chmod(0o666 & ~mask)
    except OSError as problem:
        raise ExportError(f"cannot write {_short(place)}: {problem.strerror or problem}") from None


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} is given twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _shown(value: Any) -> str:
    """A value for a message: short, in one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a user's own class, or nesting beyond what repr takes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-40:]}"


def _line(problem: object) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__
