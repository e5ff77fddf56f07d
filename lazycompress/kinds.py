"""What goes by a name: a module of this package, or one that another package brings by an entry point.

    [project.entry-points."lazycompress.forecasts"]
    settled = "my_package.settled"

Either is an entry point here, and is imported when somebody asks for it. `docs/extending.md` brings one of each kind.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import InputError, LazyCompressError

#: What a message calls one of a kind.
NOUNS = {
    "forecasts": "forecast",
    "gates": "gate",
    "runtimes": "export format",
    "pruners": "pruning method",
    "pipelines": "kind of pipeline",
}

#: The package's own: a module, or an object in one.
OWN = {
    "forecasts": {
        "0": "lazycompress.plan.forecasts:CONSTANT",
        "1": "lazycompress.plan.forecasts:LINE",
        "2": "lazycompress.plan.forecasts:PARABOLA",
    },
    "gates": {"linear": "lazycompress.gate"},
    "runtimes": {
        "openvino": "lazycompress.export.openvino",
        "onnx": "lazycompress.export.onnx",
        "executorch": "lazycompress.export.executorch",
    },
    "pruners": {
        "structured": "lazycompress.compose.prune:STRUCTURED",
        "magnitude": "lazycompress.compose.prune:MAGNITUDE",
    },
    "pipelines": {"diffusers": "lazycompress.integrations.diffusers.kind"},
}


@lru_cache(maxsize=32)
def _brought(kind: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """What other packages bring; read once for what `sys.path` is, since that reads the notes of every package there."""
    return tuple(entry for entry in entry_points(group=f"lazycompress.{kind}") if entry.name not in OWN[kind])


def others(kind: str) -> list[str]:
    """The names that other packages bring, sorted; those of the package's own are not theirs to take."""
    return sorted(entry.name for entry in _brought(kind, tuple(sys.path)))


def need(kind: str, name: Any, error: type[LazyCompressError] = InputError) -> None:
    """Whether something goes by a name; it is not imported.

    Raises:
        LazyCompressError: as `error`; says what there is.
    """
    if name not in (known := list(OWN[kind])) and name not in (known := known + others(kind)):
        raise error(f"there is no {NOUNS[kind]} {name!r}; there are {', '.join(map(repr, known))}")


def find(kind: str, name: Any, error: type[LazyCompressError] = InputError) -> Any:
    """What goes by a name, imported: a module or an object, with the members of its kind's protocol.

    Raises:
        LazyCompressError: as `error`, if there is none or it cannot be imported; what it raises itself as it is.
    """
    need(kind, name, error)
    group = f"lazycompress.{kind}"
    own = OWN[kind].get(name)
    brought = (entry for entry in _brought(kind, tuple(sys.path)) if entry.name == name)
    entry = EntryPoint(name, own, group) if own else next(brought)
    try:
        return entry.load()
    except LazyCompressError:
        raise
    except Exception as problem:  # another package's module: it may raise anything
        why = f"{type(problem).__name__}: {problem}"
        raise error(
            f"the {NOUNS[kind]} {name!r}, entry point {entry.value!r} of {group}, does not load: {why}"
        ) from problem
