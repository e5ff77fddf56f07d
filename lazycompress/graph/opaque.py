"""Modules that `torch.export` cannot take: the graph calls them as they are, as one node each.

Where control flow or data leave the graph (experts looped over by how many tokens each got, say), nothing but the module
itself computes what it computes. It can stand in a graph if it gives one tensor of the sizes of its first one:

1. In one real run, what it costs and whether it is attention is measured.
2. While the model is captured, it is one operator, `lazycompress::opaque`.
3. In the graph that comes out, that operator is replaced by a call of the module, weights shared.

A graph with such a node runs in PyTorch and is trained through; `torch.export`, and so every file format, refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode


def opaque(values: Sequence[Tensor], call: int) -> Tensor:
    """Stands for a call of a module while a model is captured; gives a tensor like the first of `values`."""
    return values[0].new_empty(values[0].shape)


_library: Any = torch.library.Library("lazycompress", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("opaque(Tensor[] values, int call) -> Tensor")
_library.impl("opaque", opaque, "CompositeExplicitAutograd")


#: Stands where a tensor goes.
_TENSOR = object()


@dataclass
class _Call:
    """How a module was called: its path, and its arguments flat, the tensors left out."""

    path: str
    others: list[Any]
    spec: pytree.TreeSpec


@dataclass
class Opaque:
    """Modules that are not traced.

    Attributes:
        paths: where they are in the model.
        reason: why they are not traced.
        macs: multiply-accumulates of a real call, by path.
        attention: whether a real call held products of two activations, by path.
    """

    paths: list[str]
    reason: str
    macs: dict[str, int] = field(default_factory=dict)
    attention: dict[str, bool] = field(default_factory=dict)
    _calls: list[_Call] = field(default_factory=list)

    @contextmanager
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        """Within the block these modules of `model` are measured when run, and are one operator when exported."""
        modules = [model.get_submodule(path) for path in self.paths]
        for path, module in zip(self.paths, modules, strict=True):
            module.forward = self._forward(path, module.forward)
        try:
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)

    def _forward(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            flat, spec = pytree.tree_flatten((args, kwargs))
            values = [value for value in flat if isinstance(value, Tensor)]
            if torch.compiler.is_exporting():
                self._calls.append(_Call(path, [_TENSOR if isinstance(v, Tensor) else v for v in flat], spec))
                return torch.ops.lazycompress.opaque(values, len(self._calls) - 1)
            with FlopCounterMode(display=False) as counter:
                result = forward(*args, **kwargs)
            if not values or not isinstance(result, Tensor) or result.shape != values[0].shape:
                raise RuntimeError(f"{path} does not give one tensor of the sizes of its first one: {self.reason}")
            self.macs[path] = counter.get_total_flops() // 2
            names = [str(operator) for operator in counter.get_flop_counts().get("Global", {})]
            self.attention[path] = any("bmm" in name or "attention" in name for name in names)
            return result

        return stand_in

    def put_back(self, graph_module: fx.GraphModule, model: nn.Module) -> None:
        """Replace the operator by calls of the modules themselves."""
        graph = graph_module.graph
        for node in list(graph.nodes):
            if node.target is not torch.ops.lazycompress.opaque.default:
                continue
            values, number = node.args
            call = self._calls[number]
            name = "opaque_" + call.path.replace(".", "_")
            graph_module.add_submodule(name, model.get_submodule(call.path))
            tensors = iter(values)
            flat = [next(tensors) if place is _TENSOR else place for place in call.others]
            args, kwargs = pytree.tree_unflatten(flat, call.spec)
            with graph.inserting_before(node):
                called = graph.call_module(name, args, kwargs)
            called.meta = dict(node.meta) | {
                "macs": self.macs.get(call.path, 0),
                "attention": self.attention.get(call.path, False),
                "opaque": f"{call.path} ({self.reason})",
            }
            node.replace_all_uses_with(called)
            graph.erase_node(node)
        graph_module.recompile()


def untraceable(model: nn.Module, error: BaseException) -> list[str]:
    """Paths of the modules that are of the class in whose code `error` arose; none if that is the model itself."""
    innermost: nn.Module | None = None
    trace = error.__traceback__
    known = set(model.modules()) - {model}
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in known and not type(owner).__module__.startswith("torch."):
            innermost = owner
        trace = trace.tb_next
    if innermost is None:
        return []
    return [path for path, module in model.named_modules() if type(module) is type(innermost)]
