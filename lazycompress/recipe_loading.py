"""Recipes from files, from those that come with the package and from dictionaries, with overrides by dotted keys."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import RecipeError, shown
from .recipe import Recipe
from .sections import explain
from .strict_yaml import MOST_LEVELS, parse, read_text


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package: file name -> first comment line."""
    folder = importlib.resources.files("lazycompress.recipes")
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").splitlines()[:1]
            found[entry.name] = first[0].lstrip("# ") if first else ""
    return found


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from a path, the name of a shipped recipe, or a dictionary.

    Args:
        source: where the recipe is. A path wins over a shipped recipe of the same name.
        overrides: dotted keys and values that replace the recipe's, such as `{"guards.warmup_steps": 2}`.

    Raises:
        RecipeError: there is no such recipe, it is not YAML, or a key or value in it is wrong; names file and key.
    """
    if isinstance(source, Recipe | Mapping):
        data: Any = source.model_dump() if isinstance(source, Recipe) else source
        where = "recipe"
    else:
        text, where = _read(source)
        data = parse(text, where)
        data = {} if data is None else data
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: a recipe is a mapping of keys, there was {type(data).__name__}")
    if not isinstance(overrides, Mapping | None):
        raise RecipeError(f"overrides: a mapping of dotted keys is needed, there was {shown(overrides)}")
    own = _copied(data, where)
    for key, value in (overrides or {}).items():
        if not isinstance(key, str):
            raise RecipeError(f"overrides: a key is a dotted name such as 'guards.max_reuse', there was {shown(key)}")
        _override(own, key, _copied(value, f"override {shown(key)}"), where)
    try:
        return Recipe.model_validate(own)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, where)) from None


def _copied(value: Any, where: str, level: int = 0) -> Any:
    """The same in mappings and lists of its own: what the caller holds is never written to."""
    if level > MOST_LEVELS:
        raise RecipeError(
            f"{where}: more than {MOST_LEVELS} lists and sections in each other, or one that holds itself"
        )
    if isinstance(value, Mapping):
        return {key: _copied(inner, where, level + 1) for key, inner in value.items()}
    return [_copied(inner, where, level + 1) for inner in value] if isinstance(value, list) else value


def _read(source: str | Path) -> tuple[str, str]:
    if not isinstance(source, str | os.PathLike) or isinstance(os.fspath(source), bytes):
        raise RecipeError(
            f"a recipe is a path, the name of a shipped recipe, a dictionary or a Recipe; there was {shown(source)}"
        )
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        is_file = is_folder = False
    if is_file:
        return read_text(path), str(path)
    if is_folder:
        raise RecipeError(f"{path} is a folder, no recipe")
    shipped = shipped_recipes()
    name = path.name if path.name in shipped else f"{path.name}.yaml"
    if path.parent == Path() and name in shipped:
        return importlib.resources.files("lazycompress.recipes").joinpath(name).read_text(encoding="utf-8"), name
    raise RecipeError(f"no recipe {shown(str(source))}: neither a file nor one of the shipped {', '.join(shipped)}")


def _override(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: cannot set {shown(key)}: {shown(parent)} is not a section")
    data[last] = value
