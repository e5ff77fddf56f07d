"""What NNCF leaves in a graph, in a form that runtimes make the best of.

Modules that it calls become operations of the graph itself, with 4-bit weights taken apart on the way; rounding moves next to
the matmul that needs it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from ..errors import ComposeError
from ..graph.ops import FOUR_BITS, SEE_THROUGH, op_name
from .scope import has_weight

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default

#: Operations that move values and change none.
_MOVES = SEE_THROUGH | frozenset(
    f"aten::{name}"
    for name in ["transpose", "permute", "reshape", "view", "_unsafe_view", "flatten", "squeeze", "unsqueeze"]
)
_ATEN: dict[Any, Any] = {operator.mul: torch.ops.aten.mul.Tensor, operator.sub: torch.ops.aten.sub.Tensor}


def inline(module: fx.GraphModule) -> fx.GraphModule:
    """Modules that NNCF calls (scales of SmoothQuant, decompressors) as operations of the graph itself.

    4-bit weights that it packs in pairs are taken apart: runtimes pack them in ways of their own. Each then is an integer
    constant whose name ends in `FOUR_BITS`.
    """
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    for node in calls:
        inner = module.get_submodule(str(node.target))
        traced = fx.symbolic_trace(inner)
        mapped: dict[fx.Node, Any] = {}
        inputs = iter(node.args)
        known: dict[fx.Node, Tensor] = {}  # integers that depend on constants alone
        with module.graph.inserting_before(node):
            for part in traced.graph.nodes:
                if part.op == "placeholder":
                    mapped[part] = next(inputs)
                    value = _constant(module, mapped[part])
                elif part.op == "get_attr":
                    value = _constant(traced, part)
                elif part.op == "output":
                    node.replace_all_uses_with(mapped[part.args[0]])
                    continue
                else:
                    value = _folded(part, known)
                    if value is None:
                        for used in part.all_input_nodes:
                            if used not in mapped:
                                mapped[used] = _stored(module, f"{node.target}_{used.name}", known[used])
                        mapped[part] = _as_operation(module.graph, part, mapped)
                if value is not None and not value.is_floating_point():
                    known[part] = value
                elif part.op == "get_attr" and value is not None:
                    mapped[part] = _stored(module, f"{node.target}_{part.target}", value)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    return module


def round_last(module: fx.GraphModule) -> None:
    """Move rounding of a whole tensor past what only moves values, to the matmuls that alone read it.

    NNCF rounds as early as it can, right after attention; OpenVINO's kernel of attention is three times slower with that inside.
    """
    for node in list(module.graph.nodes):
        quantize = node.args[0] if node.target is DEQUANTIZE else None
        if not isinstance(quantize, fx.Node) or quantize.target is not QUANTIZE:
            continue
        last = node
        while len(last.users) == 1 and _moves(next(iter(last.users)), quantize):
            last = next(iter(last.users))
        if last is node or not all(has_weight(user) and user.args[0] is last for user in last.users):
            continue
        next(iter(node.users)).replace_input_with(node, quantize.args[0])
        readers = list(last.users)
        with module.graph.inserting_after(last):
            again = module.graph.call_function(QUANTIZE, (last, *quantize.args[1:]), dict(quantize.kwargs))
        with module.graph.inserting_after(again):
            restored = module.graph.call_function(DEQUANTIZE, (again, *node.args[1:]), dict(node.kwargs))
        for reader in readers:
            reader.replace_input_with(last, restored)
    module.graph.eliminate_dead_code()


def _moves(node: fx.Node, quantize: fx.Node) -> bool:
    source, value = quantize.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    same = not isinstance(source, Tensor) or not isinstance(value, Tensor) or source.dtype is value.dtype
    return op_name(node) in _MOVES and same


def _as_operation(graph: fx.Graph, part: fx.Node, mapped: Mapping[fx.Node, Any]) -> fx.Node:
    """A node of a traced module as an ATen operation: what follows takes methods of tensors for no constants.

    Raises:
        ComposeError: NNCF uses a method that has no counterpart here.
    """
    args, kwargs = fx.map_arg((part.args, part.kwargs), mapped.__getitem__)
    if part.op == "call_function":
        return graph.call_function(_ATEN.get(part.target, part.target), args, kwargs)
    if part.target in ("type", "to") and "dtype" in kwargs:
        return graph.call_function(torch.ops.aten._to_copy.default, args[:1], {"dtype": kwargs["dtype"]})
    if part.target == "reshape":
        shape = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
        return graph.call_function(torch.ops.aten.reshape.default, (args[0], list(shape)))
    raise ComposeError(
        f"NNCF restores weights with the method {part.target!r}, which is not known here: use another mode"
    )


def _folded(part: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor | None:
    """The integers that a node gives, if it works on known ones alone."""
    if not part.all_input_nodes or any(used not in known for used in part.all_input_nodes):
        return None
    args, kwargs = fx.map_arg((part.args, part.kwargs), known.__getitem__)
    if part.op == "call_method":
        value = getattr(args[0], str(part.target))(*args[1:], **kwargs)
    else:
        value = part.target(*args, **kwargs)  # type: ignore[operator]
    return value if isinstance(value, Tensor) and not value.is_floating_point() else None


def _stored(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    low, high = (-8, 7) if value.dtype is torch.int8 else (0, 15)
    four = not value.is_floating_point() and value.numel() > 1 and low <= int(value.min()) <= int(value.max()) <= high
    name = name.replace(".", "_") + (FOUR_BITS if four else "")
    module.register_buffer(name, value.detach().contiguous())
    return module.graph.get_attr(name)


def _constant(module: Any, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    for step in str(node.target).split("."):
        module = getattr(module, step)
    return module if isinstance(module, Tensor) else None
