"""Imports go one way: a module imports only what stands before it in this order, wherever the import is written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lazycompress

ROOT = Path(lazycompress.__file__).parent

#: The rooms of the package, the ground first. `integrations` is beside the package, and only these lead to it.
ORDER = [
    "errors", "eager", "kinds", "models", "noise", "free_memory", "files", "encoding", "weights", "places", "strict_yaml",
    "sections", "recipe", "recipe_loading", "recipe_reference", "report", "sampling", "plan", "gate", "gates", "graph",
    "rehearsal", "scopes", "continuity", "state", "contexts", "targets", "programs", "runtime", "old_gates", "gates_file", "lazy",
    "storage", "train", "compose", "export", "wrap", "pipelines", "api", "cli",
]  # fmt: skip
LEAD_OUT = {"api", "cli", "__init__"}


def room(name: str) -> str:
    """`lazycompress.graph.capture` is in the room `graph`."""
    return name.split(".")[1] if "." in name else "__init__"


def imports() -> Iterator[tuple[str, str]]:
    """(who, whom) for each relative import of the package."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["lazycompress", *path.relative_to(ROOT).with_suffix("").parts]
        package = parts[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                for name in names:
                    yield ".".join(parts), ".".join([*base, name])


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {room(who) for who, _ in imports()} - {"__init__"}
    assert rooms <= set(ORDER), f"rooms without a place: {sorted(rooms - set(ORDER))}"


def test_imports_go_one_way() -> None:
    against = []
    for who, whom in imports():
        own, other = room(who), room(whom)
        if own == other or other == "__version__" or own == "__init__":
            continue
        if other == "integrations":
            if own not in LEAD_OUT:
                against.append(f"{who} imports {whom}")
        elif other not in ORDER or ORDER.index(other) > ORDER.index(own):
            against.append(f"{who} imports {whom}")
    assert not against, "\n".join(against)
