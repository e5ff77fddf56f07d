"""Stage 5, for gates that decide all branches alike: the flat lazy graph with the whole network in one branch.

Where all branches are reused a forecast gives the output, so nothing of the network is needed; where all compute, no cache:

1. The network, between the model's inputs and the outputs that forecasts are for, is the branch. Its gate is the first one.
2. What it gives for a sample that reuses is not read: the forecast's last value stands there.
3. Caches are no part of the state.

Decisions, outputs and the rest of the state are those of the flat graph, for gates with `Gates.together`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .insert import LazyGraph
from .lower import is_gate, lazy_branches, lower

_ops = torch.ops.lazycompress


def lower_whole(flat: LazyGraph) -> LazyGraph | None:
    """Put the network of a flat lazy graph into one `LazyBranch`; None if it has outputs without a forecast."""
    nodes = list(flat.graph_module.graph.nodes)
    if len(flat.forecast) != flat.outputs or not any(_is(node, _ops.forecast) for node in nodes):
        return None
    is_cache = [spec.kind == "cache" for spec in flat.state]
    leaves, past = nodes[: len(flat.leaves)], nodes[len(flat.leaves) + 1 :][: len(flat.state)]
    caches = {node for node, cache in zip(past, is_cache, strict=True) if cache}
    graph = fx.Graph()
    mapped = {node: graph.node_copy(node) for node in nodes if node.op == "placeholder" and node not in caches}
    #: Inputs as the network reads them.
    marks = {node: _mark(graph, mapped[node], k) for k, node in enumerate(leaves)}
    #: The network's outputs, as far as they were computed.
    fresh: dict[fx.Node, fx.Node] = {}
    lazy: fx.Node | None = None
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        if _is(node, _ops.enter) or _is(node, _ops.select):  # branches are not told apart, and always computed
            mapped[node] = mapped[node.all_input_nodes[0]]
        elif _is(node, _ops.scheduled):
            mapped[node] = graph.call_function(node.target, ([*marks.values()], *(mapped[n] for n in node.args[1:])))
        elif _is(node, _ops.decide):
            lazy = lazy or graph.node_copy(node, mapped.__getitem__)
            mapped[node] = lazy
        elif _is(node, _ops.forecast) or _is(node, _ops.hold):
            given, cache = node.all_input_nodes[:2]
            if given not in fresh:
                assert lazy is not None, "outputs come after the gates"
                fresh[given] = _select(graph, given, mapped[given], mapped[cache], lazy)
            mapped[node] = graph.node_copy(node, lambda n: fresh.get(n) or mapped[n])
        elif is_gate(node):
            mapped[node] = graph.node_copy(node, mapped.__getitem__)
        else:
            mapped[node] = graph.node_copy(node, lambda n: marks.get(n) or mapped[n])
    results: Any = next(node for node in nodes if node.op == "output").args[0]
    ends = flat.outputs, flat.outputs + len(flat.state)
    present = [value for value, cache in zip(results[ends[0] : ends[1]], is_cache, strict=True) if not cache]
    graph.output(fx.map_arg((*results[: ends[0]], *present, *results[ends[1] :]), mapped.__getitem__))
    graph.eliminate_dead_code()
    graph.lint()
    state = [spec for spec, cache in zip(flat.state, is_cache, strict=True) if not cache]
    module = fx.GraphModule(flat.graph_module, graph)
    module.lazy_gates = flat.graph_module.lazy_gates  # the gates themselves, not their values: those may move
    lowered = lower(replace(flat, graph_module=module, state=state))
    for branch in lazy_branches(lowered):
        branch.once = True
    return lowered


def _mark(graph: fx.Graph, leaf: fx.Node, position: int) -> fx.Node:
    mark = graph.call_function(_ops.enter, (leaf, 0, position))
    mark.meta = dict(leaf.meta)
    return mark


def _select(graph: fx.Graph, like: fx.Node, fresh: fx.Node, cache: fx.Node, lazy: fx.Node) -> fx.Node:
    """What the branch gives: `fresh`, or any value where it is not read."""
    dtype = like.meta["val"].dtype
    if dtype is not torch.float32:
        cache = graph.call_function(torch.ops.aten.to.dtype, (cache, dtype))
    select = graph.call_function(_ops.select, (fresh, cache, lazy))
    select.meta = dict(like.meta)
    return select


def _is(node: fx.Node, packet: Any) -> bool:
    return node.target is packet or node.target is packet.default
