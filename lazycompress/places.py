"""Places for folders that this package writes: nothing of the user's is lost there, and nothing half-written is found.

1. A folder is written beside its place, in `.NAME.lazycompress/new`, and takes the place at the end, in one step.
2. The place must be free, an empty folder, or a folder of the same kind that this package wrote, if replacing it was asked
   for. A folder says so itself: its marker, a JSON file, lists the files beside it. With anything else in it, it is the user's.
   That is checked before the work, and again when the place is taken.
3. An old folder is exchanged for the new one by `renameat2` with `RENAME_EXCHANGE` (Linux): at every moment the name leads to
   one of them. Where the system has no such call there are two renames; a process that is killed between them leaves the old
   folder in `.NAME.lazycompress/old`, and the next one that writes there first puts it back.
4. `.NAME.lazycompress` is locked by `flock` while it is used: of two writers the second is told so. A process that dies leaves no
   lock; what it leaves is deleted by the next that writes there.
5. Links are not followed and not replaced; links among the parents are.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .errors import ExportError, LazyCompressError
from .files import path_of, read_json, sha256_of, write_json

try:
    import fcntl
except ImportError:  # pragma: no cover - a system without flock: two writers are not told apart
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

#: renameat2 takes paths relative to the working folder, and exchanges two names. (linux/fcntl.h, linux/fs.h)
_HERE, _EXCHANGE = -100, 2

#: What a system or a file system says that cannot exchange names.
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}

#: What is no fault of the code that writes.
_FULL = re.compile(r"No space left on device|Disk quota exceeded|Read-only file system|File too large|\(os error \d+\)")

#: A name in bytes, with what is put before and behind it.
_LONGEST = 200


@dataclass(frozen=True)
class Kind:
    """A kind of folder that this package writes.

    Attributes:
        name: as in "holds NAME already".
        noun: as in "is no NOUN of lazycompress".
        marker: the JSON file in it that says so: an object with the keys `lazycompress` (a version) and `files`.
        other: another name that the marker may have.
    """

    name: str
    noun: str
    marker: str
    other: str | None = None


#: What `save` writes: of a lazy graph its gates, of a lazy module its plan.
GATES = Kind("gates", "folder of gates", "gates.json", "plan.json")
EXPORT = Kind("an export", "export", "lazycompress.json")
#: What a model told while it was calibrated.
CALIBRATION = Kind("a calibration", "calibration", "calibration.json")
DEMO = Kind("a demo", "demo", "demo.json")

#: Version 0.1 listed no files in these.
_BEFORE: Mapping[str, frozenset[str]] = {GATES.marker: frozenset({"gates.safetensors"})}


@contextmanager
def whole_folder(directory: str | Path, kind: Kind, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, which takes its place only when the block ends without an error.

    Args:
        directory: the place. Parents are made.
        kind: what will be there; `seal` has to be called on the new folder within the block.
        overwrite: replace a folder of this kind that this package wrote.

    Raises:
        ExportError: the place is not ours to take, another process is writing it, or it cannot be written.
    """
    place = place_of(directory)
    with _telling(place):
        check_place(place, kind, overwrite)
        with _parents(place), _workshop(place) as shop:
            check_place(place, kind, overwrite)
            new = shop / "new"
            new.mkdir()
            yield new
            if _foreign(new, kind) is not None:
                raise ExportError(f"{place}: {_foreign(new, kind)} was written without being listed: not put in place")
            _flush(new)
            _take(place, new, shop, kind, overwrite)
            _flush_one(place.parent)


def check_place(directory: str | Path, kind: Kind, overwrite: bool = False) -> Path:
    """Refuse a place that `whole_folder` could not take: before long work, for one.

    Returns:
        The place, absolute.

    Raises:
        ExportError: says why.
    """
    place = place_of(directory)
    with _telling(place):
        if place.is_symlink():
            raise ExportError(f"{place} is a link to {os.readlink(place)}: name the folder itself")
        parent = next(parent for parent in place.parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            reason = "no folder" if not parent.is_dir() else "a folder that this process may not write to"
            raise ExportError(f"cannot write {place}: {parent} is {reason}; choose another folder")
        if not place.exists():
            return place
        if not place.is_dir():
            raise ExportError(f"cannot write {place}: it is a file; choose another folder")
        if next(place.iterdir(), None) is None:
            return place
        foreign = _foreign(place, kind)
        if foreign is not None:
            marker = _marker(place, kind)
            if marker.exists() and foreign != marker.name:
                raise ExportError(
                    f"{place} holds {foreign}, which lazycompress did not write, beside {kind.name}: move it away, or "
                    "choose another folder"
                )
            raise ExportError(
                f"{place} is not empty and no {kind.noun} of lazycompress (it holds {foreign}); choose another folder"
            )
        if not overwrite:
            raise ExportError(
                f"{place} holds {kind.name} already; pass overwrite=True (--overwrite), or choose another folder"
            )
    return place


def place_of(directory: str | Path) -> Path:
    """The place that a user's path names: absolute, its parents without links.

    Raises:
        ExportError: it is no path, or the working folder, one that holds it, or the root.
    """
    path = path_of(directory)
    try:
        here = Path.cwd()
        path = here / path
        place = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    except (OSError, RuntimeError) as error:
        raise ExportError(f"cannot write {str(directory)[:100]}: {getattr(error, 'strerror', error)}") from None
    if place == here or place in here.parents:
        raise ExportError(f"{place} is the working folder, or holds it: name a folder of its own")
    return place


def seal(folder: Path, kind: Kind, about: Mapping[str, Any], marker: str | None = None) -> None:
    """Write the marker of a finished folder: `about`, the version, and size and hash of every file, sub-folders' too."""
    written = folder / (marker or kind.marker)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != written]
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }
    write_json({"lazycompress": __version__, **about, "files": files}, written)


def _foreign(folder: Path, kind: Kind) -> str | None:
    """The first thing in a folder that this package did not write there, relative; None if there is none."""
    own = _own(folder, kind)
    folders = {parent for name in own for parent in Path(name).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        known = name in folders if path.is_dir() else name.as_posix() in own
        if path.is_symlink() or not known:
            return name.as_posix()
    return None


def _marker(folder: Path, kind: Kind) -> Path:
    """Where the marker of a folder is, or would be."""
    own = folder / kind.marker
    return folder / kind.other if kind.other and not os.path.lexists(own) else own


def _own(folder: Path, kind: Kind) -> frozenset[str]:
    """Names of the files that the marker of a folder says are this package's; none without a marker."""
    marker = _marker(folder, kind)
    if marker.is_symlink():
        return frozenset()
    try:
        found = read_json(marker)
    except LazyCompressError:
        return frozenset()
    if not isinstance(found, dict) or not isinstance(found.get("lazycompress"), str):
        return frozenset()
    files = found.get("files", dict.fromkeys(_BEFORE.get(marker.name, ())))
    return frozenset({marker.name, *files}) if isinstance(files, dict) else frozenset()


def _take(place: Path, new: Path, shop: Path, kind: Kind, overwrite: bool) -> None:
    """Rules 2 and 3."""
    check_place(place, kind, overwrite)
    if not place.exists() or next(place.iterdir(), None) is None:
        os.rename(new, place)  # fails where something has come there since, unless it is an empty folder
        return
    new.chmod(place.stat().st_mode & 0o7777)
    if _exchange(new, place):
        try:  # where nobody finds it by its name any more
            if (foreign := _foreign(new, kind)) is not None:
                raise ExportError(f"{foreign} came into {place} while it was written: nothing was replaced")
        except BaseException:
            _exchange(new, place)
            raise
        return
    old = shop / "old"
    os.rename(place, old)
    try:
        os.rename(new, place)
    except BaseException:
        os.rename(old, place)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; false where that cannot be done."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def _workshop(place: Path) -> Iterator[Path]:
    """Rule 4: the folder beside the place, for this process alone, with nothing left in it."""
    name = place.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    shop = place.with_name(f".{name}.lazycompress")
    lock = _locked(shop, place)
    try:
        old = shop / "old"
        if old.exists() and not os.path.lexists(place):
            os.rename(old, place)
        _clear(shop)
        yield shop
    finally:
        _clear(shop)
        with suppress(OSError):  # something else is in it: not ours
            shop.rmdir()
        os.close(lock)


def _locked(shop: Path, place: Path) -> int:
    """A descriptor of the folder `shop`, made if it is not there, which no other process has locked."""
    while True:
        with suppress(FileExistsError):
            shop.mkdir()
        try:
            lock = os.open(shop, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            continue  # its last user has just removed it
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(shop)):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise ExportError(f"another process is writing {place}: wait for it, or choose another folder") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EBADF, *_CANNOT):
                _log.warning("%s is on a file system without locks: nobody else may write it now", place)
                return lock
            os.close(lock)
            raise
        os.close(lock)


def _clear(shop: Path) -> None:
    for name in ("new", "old"):
        shutil.rmtree(shop / name, ignore_errors=True)


@contextmanager
def _parents(place: Path) -> Iterator[None]:
    """The parents of a place, made if they are not there; those that were made go again if nothing comes into them."""
    missing = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def _telling(place: Path) -> Iterator[None]:
    """Faults of the system while writing become a line; what else goes wrong stays what it is."""
    try:
        yield
    except LazyCompressError:
        raise
    except Exception as error:
        about = " ".join(str(error).split())
        name = str(error.filename or "") if isinstance(error, OSError) else ""
        here = name.startswith((str(place), os.path.join(place.parent, "."))) or name in map(str, place.parents)
        if not here and not _FULL.search(about):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else about[:200]
        shown = str(place) if len(str(place)) <= 200 else f"{str(place)[:100]}...{str(place)[-40:]}"
        raise ExportError(f"cannot write {shown}: {reason}; choose another folder") from error


def _flush(folder: Path) -> None:
    """Have a folder and all in it on the disk."""
    for path in (*folder.rglob("*"), folder):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
