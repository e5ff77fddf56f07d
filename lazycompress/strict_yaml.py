"""YAML for people: what is ambiguous, dangerous or not meant is refused in one line that names its line number.

Plain YAML lets the last of two equal keys win, makes Python objects of tags, and can blow a few lines up to any size through
aliases. A recipe needs none of that.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError

#: A text of this many bytes is no recipe; of thousands of prompts one still is.
MOST_BYTES = 2**21

#: Levels of sections and lists in each other. The deepest that a recipe knows is four.
MOST_LEVELS = 32

#: Values, those that aliases repeat counted each time.
MOST_VALUES = 50_000


def read_text(path: Path) -> str:
    """The text of a YAML file, in UTF-8, or in UTF-16 if it begins with a byte order mark.

    Raises:
        RecipeError: it cannot be read, is too large, or is no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > MOST_BYTES:
        raise RecipeError(f"{path} is larger than {MOST_BYTES >> 20} MiB, which no recipe is: pass a YAML file")
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is no text in UTF-8: byte {error.start} is {content[error.start : error.start + 1].hex()}; "
            "save it as UTF-8"
        ) from None


def parse(text: str, where: str) -> Any:
    """The value that YAML text describes, made of mappings, lists and scalars.

    Args:
        text: one document.
        where: names it in messages.

    Raises:
        RecipeError: it is not YAML, is nested too deep or too large, has a key twice, or has a tag of Python's.
    """
    try:
        _check_size(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        said = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{where} is not YAML: {'' if mark is None else f'line {mark.line + 1}: '}{said}") from None
    except _RefusedError as error:
        raise RecipeError(f"{where} line {error.line}: {error}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise RecipeError(f"{where} is not YAML: {error}") from None
    except (ValueError, OverflowError, RecursionError) as error:  # a date that is none, an integer of 5000 digits
        raise RecipeError(f"{where}: a value in it cannot be read: {error}") from None


class _RefusedError(Exception):
    """What is YAML, but nothing that is meant in a recipe."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Refuses mappings that have a key twice, or a key that is a section or a list."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise _RefusedError(line, "a key is a word, there was a list or a section")
            if key in seen:
                raise _RefusedError(line, f"the key {key!r} is there twice: keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _check_size(text: str) -> None:
    """Look at depth and size before anything is made, aliases followed. The parser's events need no recursion."""
    sizes: dict[str, int] = {}
    anchors: list[str | None] = []
    counts = [0]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _RefusedError(line, f"the alias *{event.anchor} stands for nothing, or for what it is a part of")
            counts[-1] += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            counts[-1] += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            anchors.append(event.anchor)
            counts.append(1)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = counts.pop(), anchors.pop()
            counts[-1] += size
            if anchor is not None:
                sizes[anchor] = size
        if len(anchors) > MOST_LEVELS:
            raise _RefusedError(line, f"more than {MOST_LEVELS} lists and sections in each other")
        if sum(counts) > MOST_VALUES:
            raise _RefusedError(line, f"more than {MOST_VALUES} values, those that aliases repeat counted")
