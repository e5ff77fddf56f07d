"""A graph that `torch.export` gave, made plain: nothing in it but what the outputs need, and no ties but those of data.

1. Checks are removed, and `x[:]`; of a value that lends its dtype only, the dtype is kept.
2. What removing mutation leaves behind is replaced by plain operators.
3. Every dynamic size is computed from the sizes of placeholders, so that no size ties a branch to what is around it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .ops import op_name, remove_dead


def has_mutation(graph: fx.Graph) -> bool:
    """Whether some operator writes into its operands."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in graph.nodes
        if node.op == "call_function"
    )


def tidy(graph_module: fx.GraphModule) -> None:
    """Plain placeholders and one tuple as output; assertions about metadata and shapes, and `x[:]`, removed."""
    graph = graph_module.graph
    for node in reversed(list(graph.nodes)):
        is_check = op_name(node) in ("aten::_assert_tensor_metadata", "aten::_assert_scalar") or (
            node.op == "call_module" and not node.users
        )
        if is_check:
            graph.erase_node(node)
        elif _is_whole_slice(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif op_name(node) == "aten::type_as" and node.args[0].meta["val"].device == node.meta["val"].device:
            # Of the second value only the dtype counts: what is computed from a timestep depends on no stream.
            node.target, node.args = torch.ops.aten.to.dtype, (node.args[0], node.meta["val"].dtype)
    _plain_copies(graph)
    _sizes_from_placeholders(graph)
    graph.set_codegen(fx.graph.CodeGen())
    remove_dead(graph)
    graph_module.recompile()


def _is_whole_slice(node: fx.Node) -> bool:
    """Whether the node takes everything along its dimension, as `x[:, 3:]` does along the first."""
    start, end, step = (*node.args[2:], None, None, None)[:3]
    return op_name(node) == "aten::slice" and start in (None, 0) and end in (None, sys.maxsize) and step in (None, 1)


def _plain_copies(graph: fx.Graph) -> None:
    """What removing mutation leaves behind, `copy(old, new)`, has no derivative: `new`, with the old sizes and dtype."""
    for node in list(graph.nodes):
        if op_name(node) != "aten::copy":
            continue
        old, new = node.args[:2]
        value = new
        with graph.inserting_before(node):
            if str(old.meta["val"].shape) != str(new.meta["val"].shape):
                value = graph.call_function(torch.ops.aten.expand_as.default, (value, old))
                value.meta = dict(node.meta)
            if old.meta["val"].dtype != new.meta["val"].dtype:
                value = graph.call_function(torch.ops.aten.to.dtype, (value, old.meta["val"].dtype))
                value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _sizes_from_placeholders(graph: fx.Graph) -> None:
    """Compute every dynamic size from the sizes of placeholders, so that no size ties a branch to what is around it."""
    symbols: dict[sympy.Symbol, fx.Node] = {}
    last = None
    for node in graph.nodes:
        if node.op == "placeholder":
            last = node
    if last is None:
        return
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if (
                isinstance(size, torch.SymInt)
                and isinstance(size.node.expr, sympy.Symbol)
                and size.node.expr not in symbols
            ):
                with graph.inserting_after(last):
                    known = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                    known.meta["val"] = size
                symbols[size.node.expr] = known
    known_nodes = set(symbols.values())
    made: dict[sympy.Expr, fx.Node | None] = {}
    anchor = last.next
    while anchor in known_nodes:
        anchor = anchor.next
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or node in known_nodes or not isinstance(value, torch.SymInt):
            continue
        if value.node.expr.is_Integer:
            constant = int(value.node.expr)

            def put(used: fx.Node, node: fx.Node = node, constant: int = constant) -> Any:
                return constant if used is node else used

            for user in list(node.users):
                user.args = fx.map_arg(user.args, put)
                user.kwargs = fx.map_arg(user.kwargs, put)
            continue
        if value.node.expr not in made:
            with graph.inserting_before(anchor):
                made[value.node.expr] = size_node(graph, value.node.expr, symbols)
        rebuilt = made[value.node.expr]
        if rebuilt is not None and rebuilt is not node:
            rebuilt.meta.setdefault("val", value)
            node.replace_all_uses_with(rebuilt)


def size_node(graph: fx.Graph, expression: sympy.Expr, symbols: Mapping[sympy.Symbol, fx.Node]) -> fx.Node | None:
    """Nodes that compute `expression` from the nodes of its symbols, or None if one is unknown or nothing is dynamic."""
    if not expression.free_symbols or any(symbol not in symbols for symbol in expression.free_symbols):
        return None
    environment = {symbol: fx.Proxy(symbols[symbol]) for symbol in expression.free_symbols}
    result = sympy_interp(PythonReferenceAnalysis, environment, expression)
    return result.node if isinstance(result, fx.Proxy) else None
