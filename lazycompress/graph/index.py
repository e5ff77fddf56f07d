"""A graph's nodes by number, in topological order: what flows where, and what a value is to an attention or an MLP."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx

from .ops import SPLITS, is_data_size, is_heavy, op_name, product_axes, shape_of


class Index:
    """Nodes by number, their ancestors as bit sets."""

    def __init__(self, graph: fx.Graph, batch: int) -> None:
        self.nodes = list(graph.nodes)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.inputs = [tuple(self.number[n] for n in node.all_input_nodes) for node in self.nodes]
        self.users: list[list[int]] = [[] for _ in self.nodes]
        self.ancestors: list[int] = []
        self.depends_on_input: list[bool] = []
        for i, node in enumerate(self.nodes):
            bits = 1 << i
            live = node.op == "placeholder"
            for j in self.inputs[i]:
                bits |= self.ancestors[j]
                live |= self.depends_on_input[j]
                self.users[j].append(i)
            self.ancestors.append(bits)
            self.depends_on_input.append(live)
        self.heavy = [is_heavy(node) for node in self.nodes]
        self.names = [op_name(node) for node in self.nodes]
        self.shapes = [shape_of(node) for node in self.nodes]
        self.ranks = [-1 if shape is None else len(shape) for shape in self.shapes]
        self.pooled = [_is_vector(shape, batch) for shape in self.shapes]

    def is_tensor(self, i: int) -> bool:
        """Whether the value is a tensor or a list of them, not a size."""
        value = self.nodes[i].meta.get("val")
        return isinstance(value, torch.Tensor | list | tuple)

    def is_data_size(self, i: int) -> bool:
        return is_data_size(self.nodes[i])

    def is_ancestor(self, a: int, b: int) -> bool:
        return a < b and bool(self.ancestors[b] >> a & 1)

    def between(self, sources: Iterable[int], sinks: Iterable[int], tokens_only: bool = False) -> set[int]:
        """Nodes on a path from a source to a sink, sinks included, sources not.

        With `tokens_only`, paths through a vector per sample do not count, unless a source is such a vector itself.
        """
        sources, sinks = set(sources), set(sinks)
        tokens_only = tokens_only and not any(self.pooled[i] for i in sources)
        first, last = min(sources), max(sinks)
        down: set[int] = set(sources)
        for i in range(first + 1, last + 1):
            if not (down.isdisjoint(self.inputs[i]) or (tokens_only and self.pooled[i])):
                down.add(i)
        # Only what is below a source is worth going up: text encoders and the like lie in between by number alone.
        up: set[int] = set()
        waiting = list(sinks)
        while waiting:
            i = waiting.pop()
            if i not in up:
                up.add(i)
                waiting += [j for j in self.inputs[i] if j > first and j in down]
        return (up & down) - sources | (sinks & down)


def whole_of(index: Index, i: int) -> int | None:
    """The value of which node `i` is some tokens (not samples, not channels), or None."""
    part = i
    if index.names[i] == "getitem":
        part = index.inputs[i][0]
    elif index.names[i] not in ("aten::slice", "aten::narrow"):
        return None
    if index.names[part] not in SPLITS:
        return None
    args, rank = index.nodes[part].args, index.ranks[i]
    position = 2 if index.names[i] == "getitem" else 1
    dim = args[position] if len(args) > position else 0
    return index.inputs[part][0] if isinstance(dim, int) and 0 < dim % rank < rank - 1 else None


def _is_vector(shape: list[int] | None, batch: int) -> bool:
    """Whether a value is one vector per sample: [batch, n] up to dimensions of size 1."""
    return shape is not None and len(shape) >= 2 and shape[0] == batch and sum(size > 1 for size in shape[1:]) <= 1


def mixes_tokens(index: Index, i: int, tokens: int) -> bool:
    """Whether node `i` is attention among `tokens` (of all samples): a product of two activations across tokens."""
    if index.names[i] == "aten::scaled_dot_product_attention" or index.nodes[i].meta.get("attention"):
        return True
    if index.names[i] not in ("aten::matmul", "aten::bmm", "aten::baddbmm", "aten::einsum"):
        return False
    if sum(index.depends_on_input[j] for j in index.inputs[i]) < 2:
        return False
    common, left, right = product_axes(index.nodes[i])
    # Every token by itself, one row of weights times its own few values: a mixture, not attention.
    return not (min(left, right) == 1 and common % tokens == 0)


def tokens_of(index: Index, i: int) -> int:
    """Number of vectors that the value of node `i` holds, all samples together."""
    shape = index.shapes[i] or [1]
    return math.prod(shape) // max(1, shape[-1])
