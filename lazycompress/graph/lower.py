"""Stage 5, lower: the flat lazy graph with each branch in a module that runs it only where it is needed.

1. A branch is what lies between its `enter` marks and its `select`s, plus everything that only this depends on: constants
   and their (de)quantization, text keys and values. Nothing is read off the model again.
2. Each branch becomes one `LazyBranch`, called with its score and caches and with every value that it reads from outside.
3. Sizes are computed inside, from the operands, since a gathered batch is smaller than the whole one.
4. An operand whose batch is in another dimension than the first (a permuted one) is computed again inside, from values that
   can be cut.

In PyTorch a `LazyBranch` branches in Python; under `torch.export` it becomes `torch.cond`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from ..errors import LocateError
from .insert import LazyGraph
from .lazy_branch import Controller, LazyBranch, Operand
from .ops import is_data_size, is_dynamic, is_heavy, size_hint
from .tidy import size_node

_ops = torch.ops.lazycompress


def lower(flat: LazyGraph) -> LazyGraph:
    """Put every branch of a flat lazy graph into a `LazyBranch`; weights are shared, the flat graph is left as it is."""
    source = flat.graph_module.graph
    nodes = list(source.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    entries: dict[int, dict[int, fx.Node]] = {}
    selects: dict[int, list[fx.Node]] = {}
    branch_of_lazy: dict[fx.Node, int] = {}
    for node in nodes:
        if node.target is _ops.enter.default or node.target is _ops.enter:
            entries.setdefault(node.args[1], {})[node.args[2]] = node
    decides = [node for node in nodes if node.target in (_ops.decide, _ops.decide.default)]
    for i, node in enumerate(decides):
        branch_of_lazy[node] = i
    for node in nodes:
        if node.target in (_ops.select, _ops.select.default):
            selects.setdefault(branch_of_lazy[node.args[2]], []).append(node)

    constant = _constants(nodes)
    owner: dict[fx.Node, int] = {}
    for i, chosen in selects.items():
        # `decide` may come in another order than the branches' numbers: the marks know.
        marks = set(entries[_mark_of(decides[i])].values())
        for node in _between(nodes, number, marks, [s.args[0] for s in chosen], constant):
            owner[node] = i

    graph = fx.Graph()
    root = nn.Module()
    mapped: dict[fx.Node, fx.Node] = {}
    caches_of = {i: [node.all_input_nodes[1] for node in chosen] for i, chosen in selects.items()}
    parts = {i: _extract(flat, i, _mark_of(decides[i]), chosen, owner, constant) for i, chosen in selects.items()}
    lazy_of: dict[fx.Node, fx.Node] = {}

    waiting = [node for node in nodes if node not in owner and node.op != "output"]
    while waiting:
        left: list[fx.Node] = []
        for node in waiting:
            if node in branch_of_lazy:
                i = branch_of_lazy[node]
                branch, outside = parts[i]
                caches = caches_of[i]
                score, valid, threshold = node.all_input_nodes
                branch.scheduled = score.target in (_ops.scheduled, _ops.scheduled.default)
                needed = [*outside, *caches, score, valid, threshold]
                if any(n not in mapped for n in needed):
                    left.append(node)
                    continue
                root.add_module(f"branch_{branch.index}", branch)
                call = graph.call_module(
                    f"branch_{branch.index}",
                    (
                        mapped[score],
                        mapped[valid],
                        mapped[threshold],
                        [mapped[c] for c in caches],
                        [mapped[o] for o in outside],
                    ),
                )
                results = graph.call_function(_getitem, (call, 0))
                lazy_of[node] = graph.call_function(_getitem, (call, 1))
                mapped[node] = lazy_of[node]
                for position, chosen_node in enumerate(selects[i]):
                    item = graph.call_function(_getitem, (results, position))
                    item.meta = dict(chosen_node.meta)
                    mapped[chosen_node] = item
            elif node in mapped:
                continue
            elif any(used not in mapped for used in node.all_input_nodes):
                left.append(node)
            else:
                mapped[node] = graph.node_copy(node, mapped.__getitem__)
        assert len(left) < len(waiting), "a flat lazy graph has no cycles"
        waiting = left
    output = next(node for node in nodes if node.op == "output")
    graph.output(fx.map_arg(output.args[0], mapped.__getitem__))
    graph.lint()
    for name, module in flat.graph_module.named_children():
        root.add_module(name, module)
    for store in ("_parameters", "_buffers"):
        for name, tensor in getattr(flat.graph_module, store).items():
            getattr(root, store)[name] = tensor
    for name, value in vars(flat.graph_module).items():
        if isinstance(value, Tensor):
            setattr(root, name, value)
    module = fx.GraphModule(root, graph)
    graph.eliminate_dead_code()
    module.recompile()
    return replace(flat, graph_module=module)


def lazy_branches(lowered: LazyGraph) -> list[LazyBranch]:
    """The branches of a lowered graph, in the order of `LazyGraph.branches`."""
    found = [m for m in lowered.graph_module.modules() if isinstance(m, LazyBranch)]
    return sorted(found, key=lambda branch: branch.index)


def _getitem(values: Any, index: int) -> Any:
    return values[index]


def _mark_of(decide_node: fx.Node) -> int:
    """The branch number in the marks that a gate's score reads."""
    score = decide_node.args[0]
    streams: Any = score.args[0]  # type: ignore[union-attr]
    number: int = streams[0].args[1]
    return number


def _constants(nodes: list[fx.Node]) -> set[fx.Node]:
    constant: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and node.all_input_nodes and all(n in constant for n in node.all_input_nodes)
        ):
            constant.add(node)
    return constant


def _between(
    nodes: list[fx.Node], number: dict[fx.Node, int], marks: set[fx.Node], ends: Sequence[Any], constant: set[fx.Node]
) -> set[fx.Node]:
    first = min(number[m] for m in marks)
    last = max(number[e] for e in ends)
    down: set[fx.Node] = set(marks)
    for node in nodes[first + 1 : last + 1]:
        if any(used in down for used in node.all_input_nodes):
            down.add(node)
    up: set[fx.Node] = set(ends)
    for node in reversed(nodes[first : last + 1]):
        if node in up:
            up.update(n for n in node.all_input_nodes if n not in constant)
    core = (down & up) - marks
    for node in reversed(nodes[: last + 1]):  # rule 1: what only the branch needs
        if node.op != "call_function" or node in core or node in marks or node in constant or not node.users:
            continue
        if (isinstance(node.meta.get("val"), torch.SymInt) and not is_data_size(node)) or is_gate(node):
            continue
        if all(user in core for user in node.users):
            core.add(node)
    # One part of a list made outside (chunk, split) is taken outside too: an operand is a tensor.
    return {n for n in core if n.target is not operator.getitem or n.all_input_nodes[0] in core}


def is_gate(node: fx.Node) -> bool:
    """Whether a node is one of the operators of `lazycompress.gate`."""
    return getattr(node.target, "namespace", "") == "lazycompress" or isinstance(
        node.target, torch._ops.OpOverloadPacket
    )


def _extract(
    flat: LazyGraph,
    i: int,
    mark: int,
    chosen: list[fx.Node],
    owner: dict[fx.Node, int],
    constant: set[fx.Node],
) -> tuple[LazyBranch, list[fx.Node]]:
    """The branch's own graph, and the nodes outside that are its operands."""
    source = flat.graph_module
    inner = [node for node in source.graph.nodes if owner.get(node) == i]
    outside: list[fx.Node] = []
    sizes: list[fx.Node] = []
    batch = _batch_symbol(flat)
    again: dict[fx.Node, list[fx.Node] | None] = {}
    fresh = [c.all_input_nodes[0] for c in chosen]
    for node in inner:
        for used in node.all_input_nodes:
            if owner.get(used) == i or used in constant:
                continue
            for value in _sources(used, batch, constant, again):
                kind = sizes if isinstance(value.meta.get("val"), torch.SymInt) else outside
                if value not in kind:
                    kind.append(value)
    needed = {size.meta["val"].node.expr for size in sizes} | {size for node in fresh for _, size in _dims(node)}
    outside += _carriers(needed, outside, list(source.graph.nodes)[: len(flat.leaves)], batch)

    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for k, node in enumerate(outside):
        mapped[node] = graph.placeholder(f"operand_{k}")
        mapped[node].meta = dict(node.meta)
    operands = [Operand(_rows(node, batch)) for node in outside]
    inside = _sizes_inside(graph, {size.meta["val"].node.expr for size in sizes}, outside, mapped)
    mapped |= {size: inside[size.meta["val"].node.expr] for size in sizes}

    def copy(node: fx.Node) -> fx.Node:
        if node not in mapped:
            mapped[node] = graph.node_copy(node, copy)
        return mapped[node]

    for node in inner:
        copy(node)
    graph.output(tuple(mapped[node] for node in fresh))
    graph.lint()
    core = fx.GraphModule(source, graph)
    outputs = [_rows(node, batch) for node in fresh]
    gather = batch is not None and all(o.rows >= 0 for o in operands) and all(r > 0 for r in outputs)
    return LazyBranch(mark, core, operands, outputs, gather, _shapes(fresh, outside)), outside


def _shapes(fresh: list[fx.Node], outside: list[fx.Node]) -> fx.GraphModule | None:
    """A graph that gives the shapes of the outputs from the operands; None where only their batch is dynamic."""
    shapes = [node.meta["val"].shape for node in fresh]
    if not any(is_dynamic(size) for shape in shapes for size in shape[1:]):
        return None
    graph = fx.Graph()
    mapped = {node: graph.placeholder(f"operand_{k}") for k, node in enumerate(outside)}
    inside = _sizes_inside(graph, {expression for node in fresh for _, expression in _dims(node)}, outside, mapped)
    graph.output(
        tuple(
            tuple(inside[size.node.expr] if is_dynamic(size) else size_hint(size) for size in shape) for shape in shapes
        )
    )
    return fx.GraphModule(nn.Module(), graph)


def _sources(
    node: fx.Node,
    batch: tuple[sympy.Symbol, ...] | None,
    constant: set[fx.Node],
    again: dict[fx.Node, list[fx.Node] | None],
) -> list[fx.Node]:
    """The node itself if it can be cut to some samples, else what to compute it from (rule 4)."""
    found = _cuttable(node, batch, constant, again, 12)
    return [node] if found is None else found


def _cuttable(
    node: fx.Node,
    batch: tuple[sympy.Symbol, ...] | None,
    constant: set[fx.Node],
    again: dict[fx.Node, list[fx.Node] | None],
    depth: int,
) -> list[fx.Node] | None:
    if node in again:
        return again[node]
    found: list[fx.Node] | None = None
    if batch is None or isinstance(node.meta.get("val"), torch.SymInt) or _rows(node, batch) >= 0:
        found = [node]
    elif depth > 0 and node.op == "call_function" and not is_heavy(node) and not is_gate(node):
        parts = [_cuttable(n, batch, constant, again, depth - 1) for n in node.all_input_nodes if n not in constant]
        if all(part is not None for part in parts):
            found = list(dict.fromkeys(n for part in parts for n in part or []))
    again[node] = found
    return found


def _batch_symbol(flat: LazyGraph) -> tuple[sympy.Symbol, ...] | None:
    """The symbol of the batch, then those of other inputs that `torch.export` did not find out to be the same (masks)."""
    placeholders = [node for node in flat.graph_module.graph.nodes if node.op == "placeholder"]
    sizes = [node.meta["val"].shape[0] for node, leaf in zip(placeholders, flat.leaves, strict=False) if leaf.batched]
    symbols = [size.node.expr for size in sizes if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol]
    latents = placeholders[flat.latents].meta["val"].shape[0]
    if not is_dynamic(latents):
        return None
    return tuple(dict.fromkeys([latents.node.expr, *symbols]))


def _rows(node: fx.Node, batch: tuple[sympy.Symbol, ...] | None) -> int:
    """Rows of dim 0 per sample; 0 if the batch is in no dimension, -1 if it is in another than the first."""
    value = node.meta.get("val")
    if batch is None or not isinstance(value, Tensor):
        return -1
    where = [
        d for d, s in enumerate(value.shape) if isinstance(s, torch.SymInt) and s.node.expr.free_symbols & set(batch)
    ]
    if not where:
        return 0
    if where != [0]:
        return -1
    first: Any = value.shape[0]
    factor = sympy.simplify(first.node.expr.subs(dict.fromkeys(batch, batch[0])) / batch[0])
    return int(factor) if factor.is_Integer else -1


def _carriers(
    expressions: set[sympy.Expr],
    outside: list[fx.Node],
    inputs: list[fx.Node],
    batch: tuple[sympy.Symbol, ...] | None,
) -> list[fx.Node]:
    """Inputs of the model that a branch reads for their sizes alone: what none of its operands tells (rule 3)."""
    known = {size for node in outside for _, size in _dims(node)}
    open_ = {symbol for expression in expressions - known for symbol in expression.free_symbols}
    found: list[fx.Node] = []
    cut = sorted(inputs, key=lambda node: _rows(node, batch) < 0)  # better one that can be cut to some samples
    for symbol in sorted(open_, key=str):
        if not any(_multiple(size, symbol) for node in [*outside, *found] for _, size in _dims(node)):
            found += [node for node in cut if any(size == symbol for _, size in _dims(node))][:1]
    return found


def _dims(node: fx.Node) -> list[tuple[int, sympy.Expr]]:
    """The dynamic dimensions of a value, and their sizes."""
    value = node.meta.get("val")
    shape: Any = value.shape if isinstance(value, Tensor) else ()
    return [(d, size.node.expr) for d, size in enumerate(shape) if is_dynamic(size)]


def _multiple(size: sympy.Expr, symbol: sympy.Symbol) -> int:
    """How often `symbol` goes into a size that is a multiple of it; else 0."""
    factor = sympy.simplify(size / symbol)
    return int(factor) if factor.is_Integer and factor > 0 else 0


def _sizes_inside(
    graph: fx.Graph, expressions: set[sympy.Expr], outside: list[fx.Node], mapped: dict[fx.Node, fx.Node]
) -> dict[sympy.Expr, fx.Node]:
    """Nodes that compute sizes from those of operands."""
    dims = [(node, d, size) for node in outside for d, size in _dims(node)]
    found: dict[sympy.Expr, fx.Node] = {}
    for expression in sorted(expressions, key=str):
        for node, d, size in dims:
            if size == expression and expression not in found:
                found[expression] = graph.call_function(torch.ops.aten.sym_size.int, (mapped[node], d))
    symbols: dict[sympy.Symbol, fx.Node] = {}
    for symbol in sorted({s for e in expressions - set(found) for s in e.free_symbols}, key=str):
        for node, d, size in dims:
            factor = _multiple(size, symbol) if symbol not in symbols else 0
            if factor:
                symbols[symbol] = graph.call_function(torch.ops.aten.sym_size.int, (mapped[node], d))
                if factor != 1:
                    symbols[symbol] = graph.call_function(_floordiv, (symbols[symbol], factor))
    for expression in sorted(expressions - set(found), key=str):
        rebuilt = size_node(graph, expression, symbols)
        if rebuilt is None:
            raise LocateError(f"no operand of a branch tells the size {expression}")
        found[expression] = rebuilt
    return found


def _floordiv(a: Any, b: int) -> Any:
    return a // b


__all__ = ["Controller", "LazyBranch", "LazyGraph", "lazy_branches", "lower"]
