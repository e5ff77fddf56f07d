"""What a model reads of its inputs on the host (`.item()`, `if mask.all():`, `x[mask]`), and how a capture copes with it.

`torch.export` stops where Python needs a number that only the data has. Such numbers mostly come from masks and position
ids: the length of a prompt, a switch. Then they are

1. recorded in one real run of the model, in the order in which they are read;
2. fixed while the model is captured, each with the tensor that it was read from;
3. compared at every later call, by a small graph of its own (`HostReads`); other numbers ask for another capture.

Numbers read from what the model computes with matmuls or convolutions (routing to experts) would be others at every step:
these are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from .ops import is_heavy, remove_dead

_SCALARS = frozenset({"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"})


@dataclass
class HostReads:
    """The graph that computes what was read from the inputs, and what it was at capture."""

    graph_module: fx.GraphModule
    seen: list[Tensor]

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the model would read the same from these inputs."""
        with torch.no_grad():
            now = self.graph_module(*tensors)
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(now, self.seen, strict=True))


@dataclass
class _Read:
    name: str
    value: Any


class Recorder(TorchFunctionMode):
    """Runs everything as it is, and keeps what is read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[_Read] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _SCALARS and args and isinstance(args[0], Tensor):
            value = func(*args, **kwargs)
            if name == "tolist":  # what is traced reads a list item by item
                self.reads += [_Read("item", item) for item in _flat(value)]
            else:
                self.reads.append(_Read(name, value))
            return value
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], _resolve(args[1], self._read), *args[2:])
        return func(*args, **kwargs)

    def _read(self, tensor: Tensor) -> Any:
        value: Any = int(tensor.item()) if tensor.dtype != torch.bool else tensor.nonzero(as_tuple=True)
        self.reads.append(_Read("index", value))
        return value


class Replayer(TorchFunctionMode):
    """Gives what was recorded instead of reading, and keeps the tensors that would have been read."""

    def __init__(self, reads: Sequence[_Read]) -> None:
        super().__init__()
        self._reads = iter(reads)
        self.sources: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SCALARS and args and isinstance(args[0], Tensor):
            return self._next(name, args[0])
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], _resolve(args[1], lambda tensor: self._next("index", tensor)), *args[2:])
        return func(*args, **(kwargs or {}))

    def _next(self, name: str, tensor: Tensor) -> Any:
        read = next(self._reads, None)
        if read is None or read.name != name:
            raise RuntimeError(f"the model read other values while it was captured than when it ran ({name})")
        self.sources.append(tensor)
        return read.value


def _flat(value: Any) -> list[Any]:
    return [item for part in value for item in _flat(part)] if isinstance(value, list) else [value]


def _resolve(key: Any, read: Any) -> Any:
    """An index with its masks and the tensors in its slices replaced by what is read from them."""
    if isinstance(key, slice):
        parts = [read(p) if isinstance(p, Tensor) else p for p in (key.start, key.stop, key.step)]
        return slice(*parts)
    if isinstance(key, Tensor) and key.dtype == torch.bool:
        found = read(key)
        return found if len(found) > 1 else found[0]
    if isinstance(key, tuple):
        flat: list[Any] = []
        for part in key:
            value = _resolve(part, read)
            flat += value if isinstance(value, tuple) else [value]
        return tuple(flat)
    return key


def split_reads(graph_module: fx.GraphModule, count: int) -> fx.GraphModule | None:
    """Take the last `count` outputs, which are the tensors read, out of a captured graph into a graph of their own.

    Returns:
        A module of the same inputs that gives these tensors, or None if they come from heavy operators.
    """
    graph = graph_module.graph
    output = next(node for node in graph.nodes if node.op == "output")
    results = list(output.args[0])
    wanted = results[len(results) - count :]
    guard = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    guard.output(guard.graph_copy(graph, mapped))
    last = next(node for node in guard.nodes if node.op == "output")
    last.args = (tuple(mapped[node] for node in wanted),)
    remove_dead(guard)
    if any(is_heavy(node) for node in guard.nodes):
        return None
    output.args = (type(output.args[0])(results[: len(results) - count]),)
    remove_dead(graph)
    graph_module.recompile()
    return fx.GraphModule(graph_module, guard)
