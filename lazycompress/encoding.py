"""Python values as JSON and tensors, in a closed form: decoding makes what is listed here and nothing else.

| value | JSON |
|---|---|
| None, bool, int of 64 bits, str, finite float | itself |
| other float | `{"float": "inf"}`, `"-inf"` or `"nan"` |
| list | a list |
| tuple | `{"tuple": [...]}` |
| dict with keys of str or int | `{"dict": [[key, value], ...]}`, in its order |
| torch.dtype | `{"dtype": "float32"}` |
| tensor | `{"tensor": ...}`, as the caller wants it |

No name in a file is looked up anywhere but in the tables of this module, and nothing is allocated before its size is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: All dtypes that a file may name.
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip

#: The most that a value may hold: levels, parts, characters of a string, bytes of made-up tensors.
DEPTH, PARTS, CHARACTERS, BYTES = 32, 100_000, 2**20, 2 * 2**30

_SMALLEST, _LARGEST = -(2**63), 2**64 - 1

_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class EncodingError(ValueError):
    """A value has no closed form, or a file does not hold one. Callers say where, in an error of this package's own."""


def encode(value: Any, tensor: Callable[[Tensor], Any]) -> Any:
    """`value` for JSON.

    Args:
        value: dictionaries, lists and tuples of what the table lists.
        tensor: what to write for a tensor.

    Raises:
        EncodingError: something in it is not in the table.
    """
    kind = type(value)
    if value is None or kind in (bool, str) or (kind is int and _SMALLEST <= value <= _LARGEST):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is list:
        return [encode(part, tensor) for part in value]
    if kind is tuple:
        return {"tuple": [encode(part, tensor) for part in value]}
    if kind is dict and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, encode(part, tensor)] for key, part in value.items()]}
    if isinstance(value, torch.dtype) and value in DTYPES.values():
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor):
        return {"tensor": tensor(value)}
    raise EncodingError(f"a {kind.__name__} cannot be kept in a file")


def decode(node: Any, tensor: Callable[[Any], Tensor]) -> Any:
    """The value that `encode` was given.

    Args:
        node: what JSON gave.
        tensor: makes a tensor of what stands for one; raises `EncodingError` where it does not.

    Raises:
        EncodingError: it is not what `encode` gives, or larger than a value may be.
    """
    return _Decoder(tensor).value(node, DEPTH)


class _Decoder:
    def __init__(self, tensor: Callable[[Any], Tensor]) -> None:
        self.tensor = tensor
        self.parts = PARTS

    def value(self, node: Any, depth: int) -> Any:
        self.parts -= 1
        if depth == 0 or self.parts < 0:
            raise EncodingError("nested too deeply" if depth == 0 else f"more than {PARTS} parts")
        if isinstance(node, str) and len(node) > CHARACTERS:
            raise EncodingError(f"a string of {len(node)} characters")
        if isinstance(node, int) and not _SMALLEST <= node <= _LARGEST:
            raise EncodingError("an integer beyond 64 bits")
        if isinstance(node, float) and not math.isfinite(node):
            raise EncodingError("a number beyond floating point")
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, list):
            return [self.value(part, depth - 1) for part in node]
        if not isinstance(node, dict) or len(node) != 1:
            raise EncodingError("an object that is none of float, tuple, dict, dtype and tensor")
        return self.tagged(*next(iter(node.items())), depth)

    def tagged(self, tag: str, held: Any, depth: int) -> Any:
        if tag == "tuple" and isinstance(held, list):
            return tuple(self.value(part, depth - 1) for part in held)
        if tag == "dict" and isinstance(held, list):
            return dict(self.pair(part, depth) for part in held)
        if tag == "float" and isinstance(held, str) and held in _FLOATS:
            return _FLOATS[held]
        if tag == "dtype":
            return dtype_called(held)
        if tag == "tensor":
            return self.tensor(held)
        raise EncodingError(f"{tag[:40]!r} with a {type(held).__name__}")

    def pair(self, node: Any, depth: int) -> tuple[str | int, Any]:
        if not isinstance(node, list) or len(node) != 2 or type(node[0]) not in (str, int):
            raise EncodingError("an entry of a dictionary that is no key and value")
        return self.value(node[0], depth - 1), self.value(node[1], depth - 1)


def dtype_called(name: Any) -> torch.dtype:
    """The torch dtype of that name.

    Raises:
        EncodingError: it is none of `DTYPES`.
    """
    if not isinstance(name, str) or name not in DTYPES:
        shown = repr(name)[:60]
        raise EncodingError(f"there is no dtype {shown}; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def outline(tensor: Tensor) -> dict[str, Any]:
    """Shape and dtype of a tensor, for JSON; its values are left out."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


class Zeros:
    """Makes tensors of zeros from outlines, together at most `BYTES` large."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.left = BYTES

    def __call__(self, node: Any) -> Tensor:
        if not isinstance(node, dict) or set(node) != {"shape", "dtype"} or not isinstance(node["shape"], list):
            raise EncodingError("a tensor without shape and dtype")
        dtype, shape = dtype_called(node["dtype"]), node["shape"]
        if len(shape) > 16 or not all(type(size) is int and 0 < size < 2**31 for size in shape):
            raise EncodingError(f"a tensor of the shape {repr(shape)[:60]}")
        self.left -= math.prod(shape) * dtype.itemsize
        if self.left < 0:
            raise EncodingError(f"tensors of more than {BYTES} bytes together (shape {repr(shape)[:60]})")
        return torch.zeros(shape, dtype=dtype, device=self.device)
