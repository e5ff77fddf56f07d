"""One call of a model taken apart: its tensors as a flat list, which dimension of each is the batch, and all else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..models import bind, by_name

#: Keyword arguments of one forward call, or a tuple of positional ones.
ExampleInputs = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Leaf:
    """One tensor among the inputs: its name (the argument's, with a path if nested), and which dimension is the batch."""

    name: str
    batch_dim: int | None

    @property
    def batched(self) -> bool:
        """Whether dim 0 is the batch."""
        return self.batch_dim == 0


@dataclass(frozen=True)
class CallKey:
    """What two calls need to share to run the same capture: structure, constants, dtypes, device, ranks."""

    spec: str
    constants: str
    tensors: tuple[tuple[torch.dtype, str, int], ...]


@dataclass
class Call:
    """The arguments of one forward call, taken apart. `tensors` and `leaves` are in step.

    `lists` names the arguments that are lists with one tensor for each sample; here they are stacked.
    """

    tensors: list[Tensor]
    leaves: list[Leaf]
    others: dict[int, Any]
    spec: pytree.TreeSpec
    batch: int
    latents: int
    lists: tuple[str, ...] = ()

    @property
    def key(self) -> CallKey:
        tensors = tuple((t.dtype, str(t.device), t.dim()) for t in self.tensors)
        return CallKey(f"{self.spec} {self.lists}", repr(sorted(self.others.items())), tensors)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of every tensor, the batch included."""
        return tuple(tuple(t.shape) for t in self.tensors)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes with -1 for the batch."""
        pairs = zip(self.tensors, self.leaves, strict=True)
        return tuple(tuple(-1 if d == leaf.batch_dim else n for d, n in enumerate(t.shape)) for t, leaf in pairs)

    def arguments(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """The keyword arguments again, with other tensors in the places of the leaves."""
        flat: list[Any] = list(tensors)
        for position, value in sorted(self.others.items()):
            flat.insert(position, value)
        arguments: dict[str, Any] = pytree.tree_unflatten(flat, self.spec)
        return arguments | {name: list(arguments[name].unbind(0)) for name in self.lists}


def take_apart(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Flatten the arguments of `model.forward(*args, **kwargs)`.

    Raises:
        InputError: the arguments do not fit the signature, or hold no tensor of rank 3 or more.
    """
    arguments = {name: value for name, value in by_name(bind(model, args, kwargs)).items() if value is not None}
    lists = _lists_of_samples(arguments)
    arguments |= {name: torch.stack(arguments[name]) for name in lists}
    flat, spec = pytree.tree_flatten_with_path(arguments)
    tensors = [value for _, value in flat if isinstance(value, Tensor)]
    names = [path_name(path) for path, value in flat if isinstance(value, Tensor)]
    others = {i: value for i, (_, value) in enumerate(flat) if not isinstance(value, Tensor)}
    streams = [i for i, t in enumerate(tensors) if _is_stream(t)]
    if not streams:
        given = ", ".join(f"{n}{list(t.shape)}" for n, t in zip(names, tensors, strict=True)) or "no tensor at all"
        raise InputError(
            f"{type(model).__name__} was called without a floating-point tensor of rank 3 or more (latents or tokens); "
            f"there was {given}"
        )
    latents = streams[0]
    batch = tensors[latents].shape[0]
    if not batch:
        raise InputError(
            f"{type(model).__name__} was called with {names[latents]}{list(tensors[latents].shape)}: no samples"
        )
    leaves = [
        Leaf(name, 0 if i == latents else _batch_dim(t, batch, tensors))
        for i, (name, t) in enumerate(zip(names, tensors, strict=True))
    ]
    return Call(tensors, leaves, others, spec, batch, latents, lists)


def call_of(model: nn.Module, example_inputs: ExampleInputs) -> Call:
    """`take_apart` for inputs in either form."""
    if isinstance(example_inputs, Mapping):
        return take_apart(model, (), example_inputs)
    return take_apart(model, example_inputs, {})


def _lists_of_samples(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments that are lists of one tensor a sample, all of the same sizes; none where the latents are a tensor."""
    first = next((v for v in arguments.values() if any(_is_stream(leaf) for leaf in pytree.tree_leaves(v))), None)
    if not isinstance(first, list):
        return ()
    samples = len(first)
    if not any(isinstance(v, Tensor) and v.shape == (samples,) for v in arguments.values()):  # no timestep for each
        return ()

    def is_one_a_sample(value: Any) -> bool:
        if not isinstance(value, list) or len(value) != samples or not all(isinstance(v, Tensor) for v in value):
            return False
        return len({(v.shape, v.dtype, v.device) for v in value}) == 1

    return tuple(name for name, v in arguments.items() if is_one_a_sample(v)) if is_one_a_sample(first) else ()


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point()


def _batch_dim(tensor: Tensor, batch: int, tensors: Sequence[Tensor]) -> int | None:
    if tensor.dim() > 0 and tensor.shape[0] == batch:
        # Position ids ([tokens, axes], beside [batch, tokens, channels]) have this as their first size only by accident.
        tokens = {t.shape[1] for t in tensors if t.dim() == 3}
        return None if tensor.dim() == 2 and tensor.shape[0] in tokens and tensor.shape[1] <= 4 else 0
    # Stacked layers of a text encoder: [layers, batch, tokens, channels]. A size of 1 says nothing.
    return 1 if tensor.dim() >= 4 and tensor.shape[1] == batch > 1 else None


def path_name(path: Any) -> str:
    """A path of `pytree` as names with dots between them."""
    parts = []
    for entry in path:
        key = getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", None)))
        parts.append(str(key))
    return ".".join(parts)


def pattern(path: str) -> str:
    """A path without the positions in lists: what is true of one of a list's tensors is true of all."""
    return re.sub(r"\.\d+(?=\.|$)", "", path)
