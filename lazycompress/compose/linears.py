"""The linear layers of a model in its graph: which nodes they are, and between which of them a value lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from ..graph.branch import Branch
from ..graph.ops import is_heavy, op_name


def linear_nodes(graph_module: fx.GraphModule, model: nn.Module) -> dict[fx.Node, str]:
    """The nodes that are linear layers of the model, with the layers' names."""
    owners = {id(layer.weight): name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    found: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        if op_name(node) != "aten::linear":
            continue
        weight = node.args[1]
        while isinstance(weight, fx.Node) and weight.op == "call_function" and len(weight.all_input_nodes) == 1:
            weight = weight.all_input_nodes[0]  # a change of dtype
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        value: Any = graph_module
        for part in str(weight.target).split("."):
            value = getattr(value, part)
        if id(value) in owners:
            found[node] = owners[id(value)]
    return found


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def sources_of(
    node: fx.Node, inside: set[fx.Node], linears: Mapping[fx.Node, str], branch: Branch, values: Sequence[Any]
) -> tuple[list[str], bool]:
    """Linear layers of the branch that `values`, inputs of `node`, come from, and whether anything else does."""
    entries = {stream.entry for stream in branch.streams}
    stack, seen = [value for value in values if isinstance(value, fx.Node)], {node}
    names: list[str] = []
    mixed = False
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in linears and current in inside:
            names.append(linears[current])
        elif current in entries or is_heavy(current):
            mixed = True
        elif current in inside:
            stack.extend(current.all_input_nodes)
    return list(dict.fromkeys(names)), mixed


def uses_of(
    node: fx.Node, inside: set[fx.Node], linears: Mapping[fx.Node, str], branch: Branch
) -> tuple[list[str], bool]:
    """Linear layers of the branch that `node` goes to, and whether it goes anywhere else."""
    exits = set(branch.exits)
    stack, seen = [node], {node}
    names: list[str] = []
    strays = node in exits
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user in linears and user in inside:
                names.append(linears[user])
            elif user in exits or user not in inside or is_heavy(user):
                strays = True
            else:
                stack.append(user)
    return list(dict.fromkeys(names)), strays
