"""Which layers of a graph a recipe's ignored scope means, and what is wrong with it, before any work."""

from __future__ import annotations

import difflib
import re

from torch import fx

from ..errors import RecipeError
from ..graph.ops import is_heavy
from ..recipe import IgnoredScope


def is_constant(node: fx.Node) -> bool:
    """Whether a value depends on weights alone."""
    if node.op == "get_attr":
        return True
    used = node.all_input_nodes
    return node.op == "call_function" and bool(used) and all(is_constant(n) for n in used)


def has_weight(node: fx.Node) -> bool:
    """Whether a node is a matmul or convolution with a weight, not a product of two activations."""
    return is_heavy(node) and any(is_constant(used) for used in node.all_input_nodes)


def label(node: fx.Node) -> str:
    """What a user calls a node: the module that its weight belongs to; else the node's own name."""
    weights = [str(used.target) for used in node.all_input_nodes if used.op == "get_attr"] if is_heavy(node) else []
    return weights[0].removesuffix(".weight").removeprefix("model.") if weights else node.name


def left_out(graph: fx.Graph, scope: IgnoredScope, section: str) -> list[str]:
    """Names of the nodes that a scope's names and patterns mean: of nodes, or of the modules that their weights belong to.

    Raises:
        RecipeError: one of them matches nothing; says what there was.
    """
    known = [(node, {node.name, label(node)}) for node in graph.nodes if node.op == "call_function"]
    layers = [label(node) for node, _ in known if has_weight(node)]
    found: dict[str, None] = {}
    for key, entries in (("names", scope.names), ("patterns", scope.patterns)):
        for entry in entries:
            try:
                expression = re.compile(entry if key == "patterns" else re.escape(entry))
            except re.error as error:
                raise RecipeError(
                    f"{section}.ignored_scope.{key}: {entry!r} is no regular expression: {error}"
                ) from None
            matched = [node.name for node, names in known if any(expression.fullmatch(name) for name in names)]
            if not matched:
                near = difflib.get_close_matches(entry, layers, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise RecipeError(
                    f"{section}.ignored_scope.{key}: {entry!r} matches nothing; {hint}layers are {', '.join(layers[:4])}, "
                    f"... ({len(layers)} in all); a pattern has to match the whole name"
                )
            found |= dict.fromkeys(matched)
    return list(found)


def check_types(scope: IgnoredScope, section: str) -> None:
    """Whether NNCF knows the operation types of a scope.

    Raises:
        RecipeError: it does not know one.
    """
    if not scope.types:
        return
    from nncf.torch.graph.operator_metatypes import PT_OPERATOR_METATYPES

    known = sorted({name for kind in PT_OPERATOR_METATYPES.registry_dict.values() for name in kind.get_all_aliases()})
    for entry in scope.types:
        if entry not in known:
            near = difflib.get_close_matches(entry, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known[:6])}, ..."
            raise RecipeError(f"{section}.ignored_scope.types: NNCF knows no operation type {entry!r}; {hint}")
