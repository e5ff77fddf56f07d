"""Recipes: files, dictionaries and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lazycompress.recipe import Recipe, load_recipe

from .harness import Try


def load(folder: Path, text: str | bytes, overrides: Any = None) -> Recipe:
    """A recipe from a file with this text."""
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, overrides)


TRIES = [
    Try(
        "recipe: an unknown key",
        lambda folder: load(folder, "tarket: 0.4"),
        r"recipe\.yaml: unknown key 'tarket'; did you mean 'target'",
    ),
    Try("recipe: an empty file", lambda folder: load(folder, ""), None),
]
