"""The example call of `gates.json` as version 0.1 wrote it: torch's words for a structure, and the leaves in lists beside it.

Torch's own reader imports what such words name; this one knows `dict`, `list` and `tuple`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .encoding import DEPTH, PARTS, EncodingError

_PROTOCOL = 1


def structure(example: dict[str, Any]) -> Any:
    """The call in the form that `encoding.decode` takes.

    Raises:
        EncodingError: the structure has other parts, or another number of leaves than there are.
    """
    if set(example) != {"spec", "tensors", "others"}:
        raise EncodingError("keys other than spec, tensors and others")
    spec, tensors, others = example["spec"], example["tensors"], example["others"]
    if not isinstance(spec, str) or not isinstance(tensors, list) or not isinstance(others, dict):
        raise EncodingError("spec is a string, tensors a list, others an object")
    if len(tensors) + len(others) > PARTS:
        raise EncodingError(f"more than {PARTS} parts")
    flat = [_tensor(entry) for entry in tensors]
    for position, value in sorted(((_position(key), value) for key, value in others.items()), key=lambda pair: pair[0]):
        if value is not None and not isinstance(value, bool | int | float | str):
            raise EncodingError("others holds numbers, strings, true, false and null")
        if position > len(flat):
            raise EncodingError(f"others names the place {position} of {len(flat)}")
        flat.insert(position, value)
    try:
        words = json.loads(spec)
    except (ValueError, RecursionError):
        raise EncodingError("spec is not JSON") from None
    if not isinstance(words, list) or len(words) != 2 or words[0] != _PROTOCOL:
        raise EncodingError("spec is none that version 0.1 wrote")
    leaves = iter(flat)
    found = _part(words[1], leaves, DEPTH)
    if next(leaves, leaves) is not leaves:
        raise EncodingError("more tensors and values than spec has places for")
    return found


def _part(word: Any, leaves: Iterator[Any], depth: int) -> Any:
    if depth == 0:
        raise EncodingError("spec is nested too deeply")
    if not isinstance(word, dict) or set(word) != {"type", "context", "children_spec"}:
        raise EncodingError("spec has a part without type, context and children_spec")
    name, children = word["type"], word["children_spec"]
    if not isinstance(children, list):
        raise EncodingError("children_spec is a list")
    if name is None and not children:
        for leaf in leaves:
            return leaf
        raise EncodingError("fewer tensors and values than spec has places for")
    if name not in ("builtins.dict", "builtins.list", "builtins.tuple"):
        raise EncodingError(
            f"spec names {str(name)[:60]!r}, which is none of dict, list and tuple; pass example_inputs"
        )
    parts = [_part(child, leaves, depth - 1) for child in children]
    if name == "builtins.list":
        return parts
    if name == "builtins.tuple":
        return {"tuple": parts}
    keys = _keys(word["context"])
    if len(keys) != len(parts):
        raise EncodingError("a dict in spec with more or fewer keys than values")
    return {"dict": [list(pair) for pair in zip(keys, parts, strict=True)]}


def _keys(context: Any) -> list[str | int]:
    try:
        keys = json.loads(context) if isinstance(context, str) else None
    except (ValueError, RecursionError):
        keys = None
    if not isinstance(keys, list) or not all(type(key) in (str, int) for key in keys):
        raise EncodingError("a dict in spec whose context is no list of keys")
    return keys


def _tensor(entry: Any) -> Any:
    if not isinstance(entry, dict) or set(entry) != {"name", "shape", "dtype"}:
        raise EncodingError("a tensor without name, shape and dtype")
    return {"tensor": {"shape": entry["shape"], "dtype": entry["dtype"]}}


def _position(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 9:
        raise EncodingError(f"others has the key {key[:40]!r}, which is no number")
    return int(key)
