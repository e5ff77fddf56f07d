"""What a call gives, taken apart by sample and put together again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Form:
    """The structure of one output.

    Attributes:
        build: makes the output of its tensors.
        listed: whether there is one tensor for each sample; else each tensor holds all samples.
        tensors: how many.
    """

    build: Callable[[Sequence[Tensor]], Any]
    listed: bool
    tensors: int

    def of_sample(self, tensors: Sequence[Tensor], row: int, batch: int) -> list[Tensor]:
        """What of the tensors belongs to one sample: views."""
        if self.listed:
            return [tensors[row]]
        return [_rows(tensor, batch)[row] for tensor in tensors]

    def of_batch(self, samples: Sequence[Sequence[Tensor]]) -> Any:
        """The output whose samples these are, each as `of_sample` gives it."""
        if self.listed:
            return self.build([sample[0] for sample in samples])
        stacked = [torch.stack([sample[k] for sample in samples]) for k in range(self.tensors)]
        return self.build([tensor.flatten(0, 1) if grouped else tensor for tensor, grouped in self._groups(stacked)])

    def _groups(self, stacked: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
        return [(tensor, grouped) for tensor, grouped in zip(stacked, self.grouped, strict=True)]

    #: For each tensor, whether a sample has several of its rows.
    grouped: tuple[bool, ...] = ()


def take_apart(output: Any, batch: int) -> tuple[list[Tensor], Form] | None:
    """The tensors of an output and its form; None if they cannot be told apart by sample."""
    tensors, build = _flatten(output)
    if not tensors:
        return None
    if all(tensor.dim() > 0 and tensor.shape[0] == batch for tensor in tensors):
        return tensors, Form(build, False, len(tensors), (False,) * len(tensors))
    if len(tensors) == batch and _holds_a_list(output, batch):
        return tensors, Form(build, True, batch)
    if all(tensor.dim() > 0 and tensor.shape[0] % batch == 0 for tensor in tensors):
        return tensors, Form(build, False, len(tensors), tuple(tensor.shape[0] != batch for tensor in tensors))
    return None


def _rows(tensor: Tensor, batch: int) -> Tensor:
    return tensor if tensor.shape[0] == batch else tensor.reshape(batch, -1, *tensor.shape[1:])


def _holds_a_list(output: Any, batch: int) -> bool:
    if isinstance(output, list):
        return len(output) == batch and all(isinstance(part, Tensor) for part in output)
    if isinstance(output, tuple):
        return any(_holds_a_list(part, batch) for part in output)
    values = output.values() if hasattr(output, "values") else vars(output).values() if _is_plain(output) else ()
    return any(_holds_a_list(value, batch) for value in values)


def _flatten(output: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    leaves, spec = pytree.tree_flatten(output)
    parts: list[tuple[int, Callable[[Sequence[Tensor]], Any]]] = []
    tensors: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            parts.append((1, _first))
        elif _is_plain(leaf):
            inside, build = _flatten({field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)})
            tensors += inside
            parts.append((len(inside), _remaking(type(leaf), build)))
        elif isinstance(leaf, MutableMapping):
            inside, build = _flatten(dict(leaf))
            tensors += inside
            parts.append((len(inside), _refilling(leaf, build)))
        else:
            parts.append((0, _always(leaf)))

    def build_all(given: Sequence[Tensor]) -> Any:
        made, at = [], 0
        for count, make in parts:
            made.append(make(given[at : at + count]))
            at += count
        return pytree.tree_unflatten(made, spec)

    return tensors, build_all


def _is_plain(value: Any) -> bool:
    """Whether it is an instance of a dataclass that pytrees do not know."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _first(given: Sequence[Tensor]) -> Tensor:
    return given[0]


def _always(value: Any) -> Callable[[Sequence[Tensor]], Any]:
    return lambda given: value


def _refilling(
    mapping: MutableMapping[Any, Any], build: Callable[[Sequence[Tensor]], Any]
) -> Callable[[Sequence[Tensor]], Any]:
    """Of a mapping that pytrees do not know."""
    empty = copy.copy(mapping)
    for key in empty:
        empty[key] = None

    def refill(given: Sequence[Tensor]) -> Any:
        made = copy.copy(empty)
        for key, value in build(given).items():
            made[key] = value
        return made

    return refill


def _remaking(kind: type, build: Callable[[Sequence[Tensor]], Any]) -> Callable[[Sequence[Tensor]], Any]:
    return lambda given: kind(**build(given))
