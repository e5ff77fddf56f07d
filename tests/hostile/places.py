"""Places to write to: every writer with every place that it must not take, and what is there must stay as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lazycompress
from lazycompress.files import write_file
from lazycompress.integrations.digits.model import WEIGHTS_DIR
from lazycompress.integrations.emoji.demo import run_demo
from lazycompress.places import DEMO, EXPORT, GATES, Kind, seal, whole_folder

from . import made
from .harness import Try, command

_MODEL = ("--model", WEIGHTS_DIR, "--recipe", "digits_dit.yaml")


def _written_by_places(place: Any) -> object:
    with whole_folder(place, GATES, overwrite=True) as folder:
        seal(folder, GATES, {})
    return place


#: Whatever writes a folder. All of them would replace a folder of their own.
_WRITERS: dict[str, tuple[Kind, Callable[[Any], object]]] = {
    "save": (GATES, lambda place: lazycompress.save(made.lazy(), place, overwrite=True)),
    "export": (EXPORT, lambda place: lazycompress.export(made.lazy(), place, overwrite=True)),
    "demo": (DEMO, lambda place: run_demo(place, 10, 2, overwrite=True)),
    "places": (GATES, _written_by_places),
    "apply": (GATES, lambda place: command("apply", *_MODEL, "--overwrite", place)),
    "export command": (EXPORT, lambda place: command("export", *_MODEL, "--overwrite", place)),
}


@contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _seen(folder: Path) -> dict[str, object]:
    """All that is in a folder: links by where they lead, files by their bytes."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def _kept(write: Callable[[Any], object], prepare: Callable[[Path], Any]) -> Callable[[Path], object]:
    """Write to the place that `prepare` makes in a folder; afterwards all must be there that was, and nothing else."""

    def act(folder: Path) -> object:
        (folder / "work").mkdir()
        place = prepare(folder / "work")
        before = _seen(folder)
        try:
            with _within(folder / "work"):
                return write(place)
        finally:
            assert _seen(folder) == before, "something was lost, or left behind"

    return act


def _thesis(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("ten years")
    return folder / "out"


def _sub_folder(folder: Path) -> Path:
    (folder / "out" / "photos" / "2019").mkdir(parents=True)
    return folder / "out"


def _link_to_folder(folder: Path) -> Path:
    _thesis(folder)
    (folder / "link").symlink_to("out")
    return folder / "link"


def _link_to_empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("empty")
    return folder / "link"


def _dangling(folder: Path) -> Path:
    (folder / "link").symlink_to("nowhere")
    return folder / "link"


def _link_to_itself(folder: Path) -> Path:
    (folder / "link").symlink_to("link")
    return folder / "link"


def _file(folder: Path) -> Path:
    (folder / "file").write_text("notes")
    return folder / "file"


def _own(kind: Kind, change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A folder that a writer of this kind wrote, with a change."""

    def prepare(folder: Path) -> Path:
        (folder / "out").mkdir()
        (folder / "out" / "numbers.bin").write_bytes(b"12")
        seal(folder / "out", kind, {})
        change(folder / "out")
        return folder / "out"

    return prepare


def _linked_inside(out: Path) -> None:
    (out.parent / "elsewhere.bin").write_bytes(b"34")
    (out / "numbers.bin").unlink()
    (out / "numbers.bin").symlink_to("../elsewhere.bin")


def _bad_places(kind: Kind) -> dict[str, tuple[Callable[[Path], Any], str]]:
    """By name: makes the place, and what must be said."""
    other = GATES if kind is EXPORT else EXPORT
    marker = kind.marker
    return {
        "a folder with a file of the user's": (_thesis, "is not empty and no .*thesis.txt"),
        "a folder with a sub-folder": (_sub_folder, "is not empty and no .*photos"),
        "a link to a folder": (_link_to_folder, "is a link to out"),
        "a link to an empty folder": (_link_to_empty_folder, "is a link to empty"),
        "a link that dangles": (_dangling, "is a link to nowhere"),
        "a link to itself": (_link_to_itself, "is a link to link"),
        "a file": (_file, "is a file"),
        "a folder in a file": (lambda folder: _file(folder) / "out", "cannot write"),
        "the working folder": (lambda folder: ".", "is the working folder"),
        "the working folder by its name": (lambda folder: folder, "is the working folder"),
        "the folder above": (lambda folder: "..", "holds it"),
        "the root": (lambda folder: "/", "holds it"),
        "an empty path": (lambda folder: "", "the path is empty|is the working folder"),
        "a name of 300 letters": (lambda folder: "n" * 300, "too long"),
        "a path of 9,000 letters": (lambda folder: "/".join(["n" * 200] * 45), "too long"),
        "a path with a zero byte": (lambda folder: "a\0b", "zero byte"),
        "a folder of another kind": (_own(other, lambda out: None), "is not empty and no"),
        "a folder of its own with a file of the user's": (
            _own(kind, lambda out: (out / "thesis.txt").write_text("ten years")),
            "holds thesis.txt, which lazycompress did not write",
        ),
        "a folder of its own with an empty folder of the user's": (
            _own(kind, lambda out: (out / "photos").mkdir()),
            "holds photos, which lazycompress did not write",
        ),
        "a folder of its own with a hidden file": (
            _own(kind, lambda out: (out / ".git").mkdir()),
            "holds .git, which lazycompress did not write",
        ),
        "a folder of its own with a link in it": (
            _own(kind, _linked_inside),
            "holds numbers.bin, which lazycompress did",
        ),
        "a folder whose marker is a list": (
            _own(kind, lambda out: (out / marker).write_text("[]")),
            "is not empty and no|did not write",
        ),
        "a folder whose marker is empty": (
            _own(kind, lambda out: (out / marker).write_text("")),
            "not empty|did not write",
        ),
        "a folder whose marker says nothing": (
            _own(kind, lambda out: (out / marker).write_text("{}")),
            "is not empty and no|did not write",
        ),
        "a folder whose marker is of another program": (
            _own(kind, lambda out: (out / marker).write_text('{"files": {"numbers.bin": 1}}')),
            "is not empty and no|did not write",
        ),
        "a folder whose marker is a folder": (
            _own(kind, lambda out: ((out / marker).unlink(), (out / marker).mkdir())),
            "is not empty and no|did not write",
        ),
        "a folder whose marker is a link": (
            _own(kind, lambda out: (out / marker).rename(out / "m") and (out / marker).symlink_to("m")),
            "is not empty and no|did not write",
        ),
    }


#: What only the functions of Python can be given.
_NO_PATHS: dict[str, Any] = {"None": None, "7": 7, "bytes": b"out", "a list": ["out"], "True": True}


def _refused_without_asking(write: Callable[[Path], object], kind: Kind) -> Callable[[Path], object]:
    return _kept(write, _own(kind, lambda out: None))


def _other_models_gates(folder: Path) -> Path:
    copy = made.gates(folder)
    made.change_json(copy / GATES.marker, ("model",), "SomeOtherModel")
    return copy


_PYTHON = ("save", "export", "demo", "places")
_MARK = "<!-- mark -->"


def _svg(place: Any) -> object:
    return write_file(place, f"<svg>{_MARK}</svg>", _MARK)


def _twice(folder: Path) -> None:
    for _ in range(2):
        lazycompress.save(made.lazy(), folder / "gates")
    assert sorted(path.name for path in folder.iterdir()) == ["gates"]


def _over_0_1(folder: Path) -> None:
    copy = made.gates(folder)
    made.change_json(copy / GATES.marker, ("files",), ...)
    lazycompress.save(made.lazy(), copy, overwrite=True)


def _mode_kept(folder: Path) -> None:
    (folder / "gates").mkdir(mode=0o750)
    lazycompress.save(made.lazy(), folder / "gates")
    lazycompress.save(made.lazy(), folder / "gates")
    assert (folder / "gates").stat().st_mode & 0o700 == 0o700


def _model_over_itself(*arguments: str) -> Callable[[Path], object]:
    """A command whose output is the folder of its own model."""

    def act(folder: Path) -> object:
        model = Path(shutil.copytree(WEIGHTS_DIR, folder / "my_dit"))
        before = _seen(folder)
        try:
            return command(*(a.replace("MODEL", str(model)) for a in arguments))
        finally:
            assert _seen(folder) == before, "the model was touched"

    return act


TRIES = [
    *(
        Try(f"places: {name} into {what}", _kept(write, prepare), says)
        for name, (kind, write) in _WRITERS.items()
        for what, (prepare, says) in _bad_places(kind).items()
    ),
    *(
        Try(f"places: {name} into {what}", lambda _, write=write, place=place: write(place), "a path is a string")
        for name, (_, write) in _WRITERS.items()
        if name in _PYTHON
        for what, place in _NO_PATHS.items()
    ),
    *(
        Try(
            f"places: {name} without asking",
            _refused_without_asking(write, kind),
            "holds .* already; pass overwrite=True",
        )
        for name, kind, write in (
            ("save", GATES, lambda place: lazycompress.save(made.lazy(), place, overwrite=False)),
            ("export", EXPORT, lambda place: lazycompress.export(made.lazy(), place)),
            ("demo", DEMO, lambda place: run_demo(place, 10, 2)),
            ("apply", GATES, lambda place: command("apply", *_MODEL, place)),
            ("export command", EXPORT, lambda place: command("export", *_MODEL, place)),
        )
    ),
    *(
        Try(f"places: a drawing into {what}", _kept(_svg, prepare), says)
        for what, prepare, says in (
            ("a folder", _thesis, "is no file"),
            ("a link", _link_to_folder, "is a link to"),
            ("a link that dangles", _dangling, "is a link to nowhere"),
            ("a file of the user's", _file, "is a file that lazycompress did not write"),
            ("a folder that is not there", lambda folder: folder / "no" / "a.svg", "cannot write"),
            ("a device", lambda folder: "/dev/null", "is no file"),
            ("a name of 300 letters", lambda folder: "n" * 300, "too long"),
            ("an empty path", lambda folder: "", "path is empty"),
            ("None", lambda folder: None, "a path is a string"),
        )
    ),
    Try(
        "places: apply over its own model",
        _model_over_itself("apply", "--model", "MODEL", "--recipe", "digits_dit.yaml", "MODEL"),
        "holds what --model names",
    ),
    Try(
        "places: apply over its own model, asked to",
        _model_over_itself("apply", "--model", "MODEL", "--recipe", "digits_dit.yaml", "--overwrite", "MODEL"),
        "holds what --model names",
    ),
    Try(
        "places: apply over the folder of its model",
        _model_over_itself("apply", "--model", "MODEL", "--recipe", "digits_dit.yaml", "MODEL/.."),
        "holds what --model names",
    ),
    Try(
        "places: export over its own model",
        _model_over_itself("export", "--model", "MODEL", "--recipe", "digits_dit.yaml", "--overwrite", "MODEL"),
        "holds what --model names",
    ),
    Try(
        "places: export over its gates",
        lambda folder: command("export", "--model", WEIGHTS_DIR, "--gates", made.gates(folder), folder / "gates"),
        "holds what --gates names",
    ),
    Try(
        "places: save over another model's gates",
        lambda folder: lazycompress.save(made.lazy(), _other_models_gates(folder)),
        "holds gates already; pass overwrite=True",
    ),
    Try(
        "places: save over another model's gates, asked to",
        lambda folder: lazycompress.save(made.lazy(), _other_models_gates(folder), overwrite=True),
        None,
    ),
    Try("places: save twice", _twice, None),
    Try("places: save over gates of version 0.1", _over_0_1, None),
    Try("places: save into an empty folder", _mode_kept, None),
    Try("places: save into folders to be made", lambda f: lazycompress.save(made.lazy(), f / "a" / "b" / "c"), None),
    Try("places: save into a name with spaces", lambda f: lazycompress.save(made.lazy(), f / "my gates ü"), None),
    Try("places: save into a name of 240 letters", lambda f: lazycompress.save(made.lazy(), f / ("n" * 240)), None),
    Try(
        "places: save a model that is not lazy",
        lambda f: lazycompress.save(made.dense(), f / "g"),
        "is not lazy: call lazycompress.apply first",
    ),  # type: ignore[arg-type]
    Try(
        "places: export a model that is not lazy",
        lambda f: lazycompress.export(made.dense(), f / "g"),
        "is not lazy: call lazycompress.apply first",
    ),  # type: ignore[arg-type]
    Try(
        "places: export to no format", lambda f: lazycompress.export(made.lazy(), f / "g", format="tflite"), "'tflite'"
    ),
    Try(
        "places: export to format 7",
        lambda f: lazycompress.export(made.lazy(), f / "g", format=7),
        "no export format 7",
    ),  # type: ignore[arg-type]
]
