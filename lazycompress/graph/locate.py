"""Stage 2, locate: the branches of a Diffusion Transformer, found in its graph by their shape alone.

The rules, in the order in which they run:

1. A *join* is `add(p, r)` (or `addcmul`, `lerp`, `sub`) of rank 3 or more, in which `p` is the residual stream `x`, seen
   through casts, dropout, scales and constants added, and `x` is an ancestor of `r`. In `x + f(x) + g(x)` the second join
   reaches `x` through the first. Parts of the tokens may have a join each (a gate of their own for given frames). What is
   pooled from the stream to one vector per sample is conditioning, not a branch.
2. The *region* of a join is what lies between `x` and `r`. If it holds a whole inner branch, only what follows the
   last inner join counts (a block whose second residual reaches back to its input).
3. A region is a branch if it holds attention, or at least two heavy operators one after the other. Attention is a product
   of two values that both depend on the input, unless it weighs several values of one token (a mixture of experts).
4. Branches that share a heavy operator are one branch with several streams (joint attention, one MLP on joined tokens).
5. The cheap ends are trimmed: norm and modulation at the front, gate, norm and rescaling at the back. What is left goes
   from one value `Z` per stream to one value `Y` per stream: the gate reads `Z`, the cache holds `Y`.

Everything is a set of node indices in topological order; ancestors are bit sets (one Python int a node).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from torch import fx

from ..errors import LocateError
from .branch import Branch, Stream
from .index import Index, mixes_tokens, tokens_of
from .joins import Join, find_joins, merge_shared
from .ops import CHEAP, NONLINEAR, SPLICES, is_opaque, macs_of


def locate_branches(graph: fx.Graph, batch: int) -> list[Branch]:
    """Find the branches of a captured graph, in the order in which they run.

    Args:
        graph: ATen graph with `meta["val"]` on its nodes; it is not changed.
        batch: batch size at capture, by which MACs are divided.

    Raises:
        LocateError: no residual branch with attention was found; says what there was.
    """
    index = Index(graph, batch)
    joins = find_joins(index)
    groups = merge_shared(index, [join for join in joins if join.substantial])
    cuts = sorted((_cut(index, group) for group in groups), key=lambda cut: cut.exits[0])
    cuts = [cut for cut in cuts if any(index.heavy[i] for i in cut.core)]
    taken = set().union(*(cut.core for cut in cuts)) if cuts else set()
    for cut in cuts:
        cut.core |= _only_used_by(index, cut, taken)
    branches = [_make_branch(index, cut, batch) for cut in cuts]
    inside = set().union(*(branch.nodes for branch in branches))
    for node in index.nodes:
        if is_opaque(node) and node not in inside:
            raise LocateError(f"a module that cannot be traced is no part of a residual branch: {node.meta['opaque']}")
    if not any(branch.kind != "mlp" for branch in branches):
        heavy = sum(index.heavy)
        raise LocateError(
            "no Diffusion Transformer here: looked for residual joins x + f(x) on tokens (rank 3 or more) with attention "
            f"in f; found {len(joins)} residual joins, {len(branches)} of them with two or more matmuls or convolutions, "
            f"none with attention, among {len(index.nodes)} operations ({heavy} matmuls, convolutions or attentions)"
        )
    _name_apart(branches)
    return branches


@dataclass
class _Cut:
    """A branch as node numbers: entries and exits per stream, what runs with it, and what of that its entries reach."""

    entries: list[int]
    exits: list[int]
    core: set[int]
    path: set[int]


def _cut(index: Index, joins: list[Join]) -> _Cut:
    region = joins[0].region
    if len(joins) > 1:
        region = index.between([j.stream for j in joins], [j.residual for j in joins], tokens_only=True)
    entries, exits = [], []
    for stream in dict.fromkeys(join.stream for join in joins):
        residuals = [join.residual for join in joins if join.stream == stream]
        whole = _trim_back(index, residuals, region, index.shapes[stream if len(residuals) > 1 else residuals[0]])
        ends = [whole] if whole is not None else [_trim_back(index, [i], region, index.shapes[i]) for i in residuals]
        exits += [end for end in ends if end is not None]
        entries += [_trim_front(index, stream, region)] * len(ends)
    path = index.between(entries, exits)
    # Sizes are computed anew inside a branch, unless they come from its data (how many tokens an expert gets).
    core = {i for i in path if index.is_tensor(i) or index.is_data_size(i)}
    # One part of a list made outside (chunk, split) is taken outside too: an operand is a tensor.
    parts = {i for i in core if index.names[i] == "getitem" and index.inputs[i][0] not in core}
    return _Cut(entries, exits, core - parts, path)


def _make_branch(index: Index, cut: _Cut, batch: int) -> Branch:
    core, nodes = cut.core, index.nodes
    heavy = [i for i in sorted(core) if index.heavy[i]]
    escapes = [
        nodes[i]
        for i in sorted(core - set(cut.exits))
        if index.ranks[i] >= 0 and any(u not in core for u in index.users[i])
    ]
    streams = [
        Stream(nodes[z], nodes[y], _channel_dim(index, z, core)) for z, y in zip(cut.entries, cut.exits, strict=True)
    ]
    name = _common_module([nodes[i] for i in heavy])
    macs = sum(macs_of(nodes[i]) for i in heavy) // batch
    return Branch(name, _kind_of(index, cut), macs, streams, escapes, [nodes[i] for i in sorted(core)])


def _trim_front(index: Index, stream: int, region: set[int]) -> int:
    """The last single value, going down from the stream, before anything that is not cheap.

    Parts of the tokens may go ways of their own (a modulation each), as long as they come together again.
    """
    frontier, best, parted = [stream], stream, False
    seen = {stream}
    while frontier:
        node = heapq.heappop(frontier)
        if node != stream and index.names[node] not in CHEAP and index.names[node] not in SPLICES:
            break
        parted |= node != stream and index.names[node] in SPLICES
        if not frontier and not (parted and index.shapes[node] != index.shapes[stream]):
            best = node
        for user in index.users[node]:
            if user in region and user not in seen:
                seen.add(user)
                heapq.heappush(frontier, user)
    return best


def _trim_back(index: Index, residuals: list[int], region: set[int], shape: list[int] | None) -> int | None:
    """The first single value, going up from the residuals, after anything that is not cheap.

    Of parts of the tokens it is the value of that shape that they are parts of. None: there is no single value.
    """
    frontier, best, parted = [-i for i in sorted(residuals, reverse=True)], None, False
    seen = set(residuals)
    while frontier:
        node = -heapq.heappop(frontier)
        if not frontier and not ((parted or len(residuals) > 1) and index.shapes[node] != shape):
            best = node
        if index.names[node] not in CHEAP and index.names[node] not in SPLICES:
            break
        parted |= index.names[node] in SPLICES
        for source in index.inputs[node]:
            if source in region and source not in seen:
                seen.add(source)
                heapq.heappush(frontier, -source)
    return best


def _only_used_by(index: Index, cut: _Cut, taken: set[int]) -> set[int]:
    """Work on side inputs that only this branch needs (text keys and values, say), to be skipped with it."""
    extra: set[int] = set()
    # Largest number first: by the time a node is looked at, all its users inside have been.
    waiting = [-j for i in cut.core for j in index.inputs[i] if j not in cut.core]
    heapq.heapify(waiting)
    last = None
    while waiting:
        i = -heapq.heappop(waiting)
        if i == last:
            continue
        last = i
        if i in taken or i in cut.entries or index.nodes[i].op != "call_function":
            continue
        if not (index.is_tensor(i) or index.is_data_size(i)) or not index.depends_on_input[i]:
            continue
        if all(u in cut.core or u in extra for u in index.users[i]):
            extra.add(i)
            for j in index.inputs[i]:
                heapq.heappush(waiting, -j)
    return extra


def _channel_dim(index: Index, entry: int, core: set[int]) -> int:
    rank = index.ranks[entry]
    into_convolution = any(u in core and "conv" in index.names[u] for u in index.users[entry])
    return 1 if rank >= 4 and into_convolution else rank - 1


def _kind_of(index: Index, cut: _Cut) -> str:
    core, entries = cut.core, cut.entries
    tokens = tokens_of(index, entries[0])
    products = {i for i in core if mixes_tokens(index, i, tokens)}
    if not products:
        return "mlp"
    if _has_nonlinear_path(index, core, products, entries):
        return "parallel"
    if len(entries) > 1:
        return "joint-attention"
    first = min(products)
    from_stream = [j for j in index.inputs[first] if j in cut.path or j in entries]
    live = [j for j in index.inputs[first] if index.depends_on_input[j]]
    return "cross-attention" if len(from_stream) < min(2, len(live)) else "attention"


def _has_nonlinear_path(index: Index, core: set[int], products: set[int], entries: list[int]) -> bool:
    """Whether an MLP (heavy, activation, heavy) runs beside the attention, not through it."""
    state = dict.fromkeys(entries, 0)
    for i in sorted(core - products):
        before = max((state[j] for j in index.inputs[i] if j in state), default=-1)
        if before < 0:
            continue
        if index.heavy[i] and before in (0, 2):
            before += 1
        elif index.names[i] in NONLINEAR and before == 1:
            before = 2
        state[i] = before
        if before == 3:
            return True
    return False


def _common_module(nodes: list[fx.Node]) -> str:
    """The longest module path that all nodes were traced in."""
    paths = []
    for node in nodes:
        stack = node.meta.get("nn_module_stack") or {}
        names = [str(path) for path, _ in stack.values()]
        paths.append((names[-1] if names else "").split("."))
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if common[:1] == ["model"]:  # the capture's own wrapper
        common = common[1:]
    return ".".join(part for part in common if part)


def _name_apart(branches: list[Branch]) -> None:
    """Add the kind, then a number, to names that several branches share."""
    for numbered in (False, True):
        groups: dict[str, list[Branch]] = {}
        for branch in branches:
            groups.setdefault(branch.name, []).append(branch)
        for name, group in groups.items():
            if len(group) > 1 or not name:
                for k, branch in enumerate(group):
                    suffix = str(k) if numbered else branch.kind
                    branch.name = f"{branch.name}.{suffix}" if branch.name else suffix
