"""Places: taken whole or not at all, by one writer at a time, whoever is killed when."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazycompress import places
from lazycompress.errors import ExportError
from lazycompress.files import write_file
from lazycompress.places import EXPORT, GATES, check_place, seal, whole_folder


def write(place: Path, text: str = "new", overwrite: bool = True) -> None:
    with whole_folder(place, GATES, overwrite) as folder:
        (folder / "numbers.txt").write_text(text * 1000)
        (folder / "inner").mkdir()
        (folder / "inner" / "more.txt").write_text(text)
        seal(folder, GATES, {"text": text})


def write_and(place: Path, act: Callable[[Path], object], later: Callable[[Path], object] = lambda _: None) -> None:
    """`act` in the new folder before it is sealed, `later` after that."""
    with whole_folder(place, GATES, True) as folder:
        act(folder)
        seal(folder, GATES, {})
        later(folder)


def failing(_: Path) -> None:
    raise KeyError


def held(place: Path) -> str:
    """What `write` wrote there: all of it, and nothing else."""
    names = {str(path.relative_to(place)) for path in place.rglob("*")}
    assert names == {"numbers.txt", "inner", "inner/more.txt", "gates.json"}
    text = str(json.loads((place / "gates.json").read_text())["text"])
    assert (place / "numbers.txt").read_text() == text * 1000
    assert (place / "inner" / "more.txt").read_text() == text
    return text


def beside(place: Path) -> list[str]:
    return sorted(path.name for path in place.parent.iterdir() if path != place)


def test_a_place_is_taken_when_all_is_written(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "out"
    with whole_folder(place, GATES) as folder:
        assert not place.exists()
        seal(folder, GATES, {})
    assert [path.name for path in place.iterdir()] == ["gates.json"]
    assert beside(place) == []
    assert place.stat().st_mode & 0o777 == 0o777 & ~_mask()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("old", [True, False])
def test_what_fails_leaves_the_old_folder_and_nothing_else(tmp_path: Path, old: bool) -> None:
    place = tmp_path / "made" / "out"
    if old:
        write(place, "old")
    with pytest.raises(KeyError):
        write_and(place, lambda folder: (folder / "half.txt").write_text("half"), failing)
    assert held(place) == "old" if old else not place.parent.exists()
    assert not old or beside(place) == []


def test_an_old_folder_is_exchanged_for_the_new_one(tmp_path: Path) -> None:
    place = tmp_path / "out"
    write(place, "old")
    place.chmod(0o750)
    write(place, "new")
    assert held(place) == "new"
    assert place.stat().st_mode & 0o777 == 0o750
    with pytest.raises(ExportError, match="holds gates already; pass overwrite=True"):
        write(place, "newer", overwrite=False)
    with pytest.raises(ExportError, match="is not empty and no export"):
        check_place(place, EXPORT, True)
    assert held(place) == "new"


def test_what_is_not_listed_is_not_put_in_place(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"more\.txt was written without being listed"):
        write_and(tmp_path / "out", lambda _: None, lambda folder: (folder / "more.txt").write_text(""))
    assert list(tmp_path.iterdir()) == []


def _thesis(place: Path) -> Callable[[Path], object]:
    def come(_: Path) -> None:
        place.mkdir(exist_ok=True)
        (place / "thesis.txt").write_text("ten years")

    return come


@pytest.mark.parametrize("exchange", [True, False])
def test_what_comes_while_it_is_written_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """A file of the user's in the old folder; or a folder where there was none."""
    if not exchange:
        monkeypatch.setattr(places, "_exchange", lambda *_: False)
    place, other = tmp_path / "out", tmp_path / "other"
    write(place, "old")
    for taken in (place, other):
        with pytest.raises(ExportError, match=r"thesis\.txt"):
            write_and(taken, _thesis(taken))
        assert (taken / "thesis.txt").read_text() == "ten years"
    assert beside(place) == ["other"]


def test_a_link_that_comes_while_it_is_written_is_kept(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / "out"
    with pytest.raises(ExportError, match="is a link to elsewhere"):
        write_and(place, lambda _: place.symlink_to("elsewhere"))
    assert place.is_symlink()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_links_among_the_parents_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    write(tmp_path / "link" / "out")
    assert held(tmp_path / "disk" / "out") == "new"


_HOLDS = """
import sys
from pathlib import Path
from lazycompress.places import GATES, seal, whole_folder
with whole_folder(Path(sys.argv[1]), GATES, True) as folder:
    print("holds", flush=True)
    sys.stdin.readline()
    seal(folder, GATES, {})
"""


def test_of_two_writers_one_wins_and_the_other_gets_a_line(tmp_path: Path) -> None:
    place = tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", _HOLDS, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == b"holds\n"
    with pytest.raises(ExportError, match="another process is writing"):
        write(place)
    other.stdin.write(b"go on\n")
    other.stdin.close()
    assert other.wait() == 0
    assert [path.name for path in place.iterdir()] == ["gates.json"]
    write(place)
    assert held(place) == "new"


def test_one_that_was_killed_holds_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", _HOLDS, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"holds\n"
    other.kill()
    other.wait()
    assert beside(place) == [".out.lazycompress"]
    write(place)
    assert held(place) == "new"
    assert beside(place) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    """At any moment. Without an exchange in one step, the next that writes puts back what it finds."""
    if not exchange:
        monkeypatch.setattr(places, "_exchange", lambda *_: False)
    place, chance = tmp_path / "out", random.Random(0)
    write(place, "0")
    for k in range(40):
        child = os.fork()
        if not child:
            while True:
                write(place, str(k))
        time.sleep(chance.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not exchange:  # what the next start does first, when it then fails
            with pytest.raises(KeyError):
                write_and(place, failing)
        held(place)
    write(place, "last")
    assert held(place) == "last"
    assert beside(place) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("needs to mount a small disk")
    try:
        write(disk / "out", "old")
        with pytest.raises(ExportError, match=r"cannot write .*No space left on device"):
            write_and(disk / "out", lambda folder: (folder / "large.bin").write_bytes(b"x" * 10**6))
        assert held(disk / "out") == "old"
        with pytest.raises(ExportError, match=r"cannot write .*No space left on device"):
            write_file(disk / "large.svg", "<svg>" + "x" * 10**6, "<svg>")
        assert [path.name for path in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", disk], check=True)


_AS_NOBODY = """
import os, sys
os.setuid(65534)
from pathlib import Path
from lazycompress.errors import ExportError
from lazycompress.places import GATES, seal, whole_folder
try:
    with whole_folder(Path(sys.argv[1]), GATES, True) as folder:
        seal(folder, GATES, {})
except ExportError as error:
    print(error)
"""


def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    if os.getuid():
        tmp_path.chmod(0o500)
        with pytest.raises(ExportError, match="may not write to"):
            write(tmp_path / "out")
        return
    with tempfile.TemporaryDirectory() as folder:  # one that others may enter: pytest's own they may not
        Path(folder).chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, f"{folder}/out"], capture_output=True, text=True, check=False
        )
        if "PermissionError" in done.stderr or "ModuleNotFoundError" in done.stderr:
            pytest.skip("nobody may read this Python")
        assert "cannot write" in done.stdout, done.stderr
        assert "may not write to" in done.stdout


_NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda name: name not in (".", "..")
)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), names=st.lists(_NAMES, min_size=1, max_size=4, unique=True))
def test_nothing_of_the_users_is_ever_lost(data: st.DataObject, names: list[str]) -> None:
    """Whatever is put into a folder that was written: if it is replaced, then nothing but what was written was in it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / data.draw(_NAMES)
        write(place, "old")
        for name in names:
            where = data.draw(st.sampled_from([place, place / "inner"]))
            if (where / name).exists():
                continue
            if data.draw(st.booleans()):
                (where / name).mkdir()
            else:
                (where / name).write_text("mine")
        added = {path.name for path in (place, place / "inner") for path in path.iterdir()}
        foreign = added - {"numbers.txt", "inner", "more.txt", "gates.json"}
        if foreign:
            with pytest.raises(ExportError, match="did not write"):
                write(place, "new")
            assert {path.name for path in (place, place / "inner") for path in path.iterdir()} == added
        else:
            write(place, "new")
            assert held(place) == "new"
        shutil.rmtree(place)
        assert list(Path(folder).iterdir()) == []
