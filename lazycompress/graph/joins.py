"""The residual joins of a graph and their regions: rules 1 to 4 of `locate`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .index import Index, mixes_tokens, tokens_of, whole_of
from .ops import JOINS, SEE_THROUGH, is_opaque


@dataclass
class Join:
    """A residual join as node numbers: the stream, what is added to it, and what lies between the two.

    `substantial` joins are branches, by rule 3.
    """

    stream: int
    residual: int
    output: int
    region: set[int]
    substantial: bool = False


def find_joins(index: Index) -> list[Join]:
    """The joins with any heavy operator in their region, in the order of their outputs."""
    joins: list[Join] = []
    outputs: dict[int, Join] = {}
    for i, node in enumerate(index.nodes):
        if index.names[i] not in JOINS or index.ranks[i] < 3:
            continue
        operands = [index.number[a] for a in node.args[:3] if isinstance(a, fx.Node)]
        if index.names[i] == "aten::addcmul":
            pairs = [(operands[0], operands[1]), (operands[0], operands[2])]
        elif index.names[i] in ("aten::sub", "aten::sub_"):
            pairs = [(operands[0], operands[1])] if len(operands) == 2 else []
        elif len(operands) == 2 or index.names[i] == "aten::lerp":
            pairs = [(operands[0], operands[1]), (operands[1], operands[0])]
        else:
            continue
        best: Join | None = None
        for carrier, residual in pairs:
            stream = _stream_of(index, carrier, residual, outputs)
            if stream is None or index.ranks[residual] < 3:
                continue
            if best is None or stream > best.stream:
                best = Join(stream, residual, i, set())
        if best is None:
            continue
        region = index.between([best.stream], [best.residual], tokens_only=True)
        inner = []
        for join in reversed(joins):  # ordered by output: what ends before the stream begins cannot be inside
            if join.output <= best.stream:
                break
            if join.output in region and join.stream >= best.stream and join.substantial:
                inner.append(join)
        if inner:
            last = max(join.output for join in inner)
            region = (
                index.between([last], [best.residual], tokens_only=True)
                if index.is_ancestor(last, best.residual)
                else set()
            )
            best.stream = last
        if not any(index.heavy[j] for j in region):
            continue
        best.region = region
        best.substantial = _is_substantial(index, best)
        joins.append(best)
        outputs[i] = best
    return joins


def _stream_of(index: Index, carrier: int, residual: int, joins: dict[int, Join]) -> int | None:
    """The residual stream that `carrier` carries past `residual`, or None."""
    node = carrier
    while True:
        if index.is_ancestor(node, residual):
            return node if index.ranks[node] >= 3 else None
        if node in joins:  # x + f(x) + g(x): look past the first join
            node = joins[node].stream
            continue
        live = [j for j in index.inputs[node] if index.depends_on_input[j]]
        whole = whole_of(index, node)
        if index.names[node] in SEE_THROUGH and live:
            node = live[0]
        elif whole is not None and index.shapes[node] == index.shapes[residual] and not index.pooled[node]:
            node = whole  # not a row of a table of shifts and scales, which every token gets
        elif (index.names[node] in ("aten::mul", "aten::div", "aten::add") and len(live) < 2) or (
            index.names[node] in ("aten::mul", "aten::div")
        ):
            tokens = [j for j in live if index.ranks[j] >= 3]
            wide = [j for j in tokens if index.shapes[j] == index.shapes[node]]
            if len(wide) != 1:
                return None
            node = wide[0]
        else:
            return None


def _is_substantial(index: Index, join: Join) -> bool:
    """Rule 3: attention, or two heavy operators in a chain."""
    region, tokens = join.region, tokens_of(index, join.stream)
    depth: dict[int, int] = {}
    for i in sorted(region):
        if mixes_tokens(index, i, tokens) or is_opaque(index.nodes[i]):
            return True
        depth[i] = max((depth.get(j, 0) for j in index.inputs[i]), default=0) + index.heavy[i]
        if depth[i] >= 2:
            return True
    return False


def merge_shared(index: Index, joins: list[Join]) -> list[list[Join]]:
    """Joins whose regions share a heavy operator, together: one branch each."""
    owner: dict[int, int] = {}
    parent = list(range(len(joins)))

    def root(k: int) -> int:
        while parent[k] != k:
            k = parent[k]
        return k

    for k, join in enumerate(joins):
        for i in join.region:
            if index.heavy[i]:
                if i in owner:
                    parent[root(k)] = root(owner[i])
                else:
                    owner[i] = k
    groups: dict[int, list[Join]] = {}
    for k, join in enumerate(joins):
        groups.setdefault(root(k), []).append(join)
    return list(groups.values())
