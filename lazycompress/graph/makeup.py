"""What a capture of a module depends on, and whether it is still so.

Weights that get other values in place are the same weights: a graph shares them. One that is assigned is another, and so are a
module in the place of another one, another attention processor, another scale of an adapter, a hook.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

#: What `nn.Module` keeps in each module for itself, and what stands around a call of the whole.
_TORCH = frozenset((*vars(nn.Module()), "forward", "_call_impl", "_compiled_call_impl"))

#: Of the entries: a part of a module, such as "blocks.0.attn" and "processor".
Key = tuple[str, str]


class _Is:
    """Some object: equal to itself alone, and kept, so that no other one takes its place in memory."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True)
class Makeup:
    """Entries of a module's parts.

    Attributes:
        graph: what a graph is made of: modules, weights, settings.
        around: what no graph has: hooks, a `forward` in the place of the class's, training mode.
        parts: of each module its dictionary, and what that holds, object by object: for a quick look.
        collections: small ones among the settings, and what they hold.
    """

    graph: Mapping[Key, Any]
    around: Mapping[Key, Any]
    parts: Sequence[tuple[dict[str, Any], tuple[Any, ...]]]
    collections: Sequence[tuple[Any, Any]]

    @staticmethod
    def of(model: nn.Module) -> Makeup:
        """What a module is made of now."""
        graph: dict[Key, Any] = {}
        around: dict[Key, Any] = {}
        parts, collections = [], []
        for path, module in model.named_modules():
            held = module.__dict__
            parts.append((held, _objects(held)))
            graph[path, ""] = module.__class__
            for values in (held["_parameters"], held["_buffers"]):
                for name, value in values.items():
                    graph[path, name] = None if value is None else (_Is(value), value.dtype, value.device)
            for name in held.keys() - _TORCH:
                graph[path, name] = still = _still(held[name])
                if isinstance(still, tuple | frozenset):
                    collections.append((held[name], still))
            if path and (held["_forward_pre_hooks"] or held["_forward_hooks"]):
                around[path, "hooks"] = tuple(
                    map(_Is, (*held["_forward_pre_hooks"].values(), *held["_forward_hooks"].values()))
                )
            if "forward" in held:
                around[path, "forward"] = _Is(getattr(held["forward"], "__func__", held["forward"]))
        if model.training:  # a part that was added in training mode is none of the caller's wishes
            around["", "training"] = True
        return Makeup(graph, around, parts, collections)

    def stands(self) -> bool:
        """Whether every part holds what it held, object by object: a look that costs little."""
        for held, objects in self.parts:
            now = _objects(held)
            if len(now) != len(objects) or not all(map(is_, objects, now)):
                return False
        return all(_still(value) == still for value, still in self.collections)

    def changed(self, now: Makeup, but: Iterable[Key] = ()) -> set[Key]:
        """Entries of the graph that are other ones now, without some."""
        return _differing(self.graph, now.graph).difference(but)

    def changed_around(self, now: Makeup) -> set[Key]:
        """Hooks and modes that are there now and were not."""
        return {key for key in _differing(self.around, now.around) if key in now.around}


def named(keys: Iterable[Key]) -> str:
    """The first of some entries, for a message."""
    path, name = min(keys)
    return ".".join(filter(None, (path, name))) or "its class"


def _objects(held: dict[str, Any]) -> tuple[Any, ...]:
    """What a module holds: attributes, weights and their dtypes, buffers, modules, hooks."""
    weights = held["_parameters"].values()
    return (
        *held.values(), *weights, *(weight.dtype for weight in weights if weight is not None), *held["_buffers"].values(),
        *held["_modules"].values(), *held["_forward_pre_hooks"].values(), *held["_forward_hooks"].values(),
    )  # fmt: skip


def _differing(before: Mapping[Key, Any], now: Mapping[Key, Any]) -> set[Key]:
    if before == now:
        return set()
    return {key for key in before.keys() | now.keys() if (key in before) != (key in now) or before[key] != now[key]}


def _still(value: Any) -> Any:
    """A value as it is now: plain ones and small collections of them by what they hold, tensors not at all, others as objects."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return Tensor  # a table that the model makes for itself
    if isinstance(value, tuple | list) and len(value) <= 64:
        return tuple(map(_still, value))
    if isinstance(value, dict) and len(value) <= 64:
        return tuple((name if isinstance(name, str) else _Is(name), _still(held)) for name, held in value.items())
    if isinstance(value, set | frozenset) and len(value) <= 64 and all(isinstance(held, str) for held in value):
        return frozenset(value)
    return _Is(value)
