"""A model's output as planning sees it: its first tensor, in whatever it comes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError


def first_of(output: Any) -> Tensor:
    """The first tensor of a model's output: the output itself, or the first entry of a tuple, mapping or output object.

    Arrays, as OpenVINO and ONNX Runtime give them, are read as tensors of the same memory.

    Raises:
        InputError: there is none.
    """
    found = output
    while not isinstance(found, Tensor | np.ndarray):
        try:
            found = next(iter(found.values())) if hasattr(found, "values") else found[0]
        except (TypeError, KeyError, IndexError, StopIteration):
            raise InputError(f"the model returned {type(output).__name__}, which holds no tensor") from None
    return torch.from_numpy(found) if isinstance(found, np.ndarray) else found


def with_first(output: Any, value: Tensor) -> Any:
    """The output with another first tensor, of the same kind all the way down; `output` itself stays as it is."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, np.ndarray):
        return value.cpu().numpy().astype(output.dtype, copy=False)
    if isinstance(output, tuple):
        entries = (with_first(output[0], value), *output[1:])
        return type(output)(*entries) if hasattr(output, "_fields") else entries
    if isinstance(output, list):
        return [with_first(output[0], value), *output[1:]]
    key = next(iter(output.keys()))
    changed = with_first(output[key], value)
    if isinstance(output, dict):  # diffusers' output objects, too: assigning to a key moves the attribute
        other = copy.copy(output)
        other[key] = changed
        return other
    if isinstance(output, Mapping):
        return _Exchanged(output, output[key], changed)
    raise InputError(f"the model returned {type(output).__name__}: its first tensor cannot be exchanged")


class _Exchanged(Mapping[Any, Any]):
    """A mapping that cannot be changed, such as OpenVINO's results, with another value in one's place, by whatever key."""

    def __init__(self, output: Mapping[Any, Any], old: Any, new: Any) -> None:
        self._output, self._old, self._new = output, old, new

    def __getitem__(self, key: Any) -> Any:
        found = self._output[key]
        return self._new if found is self._old else found

    def __iter__(self) -> Iterator[Any]:
        return iter(self._output)

    def __len__(self) -> int:
        return len(self._output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)
