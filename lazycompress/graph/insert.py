"""Stage 3, insert: captured graph and branches become the flat lazy graph.

The flat graph computes every branch and then selects; it is the reference that every lowered and exported form must
equal, and the form that quantization works on. Its placeholders, in order: the model's tensors, `lazy_threshold`,
`past_timestep` [batch], `past_prints` [batch, k], `past_times` [batch, 4 + branches] (when the image began, when the last call
was, when each branch was last computed, when any was, and when that was before), one cache per stream of each branch, then, where
gates have an order, the value, slope and half the curvature of each output that forecasts are for, up to that order.
Its outputs, one flat tuple: the model's outputs, then the state for the next call in the same order, then `lazy`
[branches, batch].
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx, nn

from ..errors import InputError, LocateError
from ..gate import PRINT
from ..gates import Gates
from .branch import Branch
from .call import Leaf, pattern
from .capture import Capture
from .ops import is_dynamic, size_hint
from .scoring import operator_of

_ops = torch.ops.lazycompress

#: What the state calls the value of an output's forecast, and its rates.
FORECAST = ("output", "slope", "curve")

#: Argument names that diffusion models give to the position in the denoising process.
_TIMESTEP = re.compile(
    r"(^|[._])(time_?steps?|t|time|times|sigmas?|noise_labels?|noise_levels?|t_emb_in)$", re.IGNORECASE
)


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a call leaves for the next: name, sizes, dtype, and what it belongs to.

    Of its sizes -1 is the batch, or `scale` times it, and -2 one that changes with the sizes of the inputs; `example` holds
    what they were at capture.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0
    scale: int = 1
    example: tuple[int, ...] = ()
    kind: Literal["clock", "cache", "forecast"] = "cache"

    @property
    def fixed(self) -> StateSpec:
        """The same state for the sizes at capture, and any batch."""
        sizes = zip(self.shape, self.example or self.shape, strict=True)
        return replace(self, shape=tuple(seen if size == -2 else size for size, seen in sizes))

    def fresh(self, batch: int, device: torch.device) -> Tensor:
        """The state before the first step of an image; what depends on the sizes of the inputs has size 1."""
        shape = [batch * self.scale if size == -1 else max(size, 1) for size in self.shape]
        return torch.full(shape, self.fill, dtype=self.dtype, device=device)


@dataclass
class LazyGraph:
    """A graph with gates: flat after `insert`, lowered after `lower`; the calling convention is the same."""

    graph_module: fx.GraphModule
    leaves: list[Leaf]
    state: list[StateSpec]
    branches: list[Branch]
    outputs: int
    latents: int
    timestep: int
    conditions: list[int]
    #: Inputs and dimensions whose sizes may differ between images.
    sized: list[tuple[int, int]]
    #: Positions of the outputs that forecasts are for.
    forecast: list[int]
    dynamic_batch: bool


def is_timestep_name(name: str) -> bool:
    """Whether diffusion models call the position in the denoising process so."""
    return _TIMESTEP.search(name) is not None


def find_timestep(leaves: list[Leaf], tensors: list[Tensor], name: str | None = None) -> int:
    """The position of the timestep among the inputs.

    Raises:
        InputError: none of the inputs of a plausible size goes by a name that timesteps have.
    """
    names = [leaf.name for leaf in leaves]
    if name is not None:
        if name not in names:
            raise InputError(f"recipe key timestep_input: no input is called {name!r}; there are {', '.join(names)}")
        return names.index(name)
    for i, (leaf, tensor) in enumerate(zip(leaves, tensors, strict=True)):
        if is_timestep_name(leaf.name) and (tensor.dim() <= 2 or tensor.numel() <= 64 * tensor.shape[0]):
            return i
    raise InputError(
        f"none of the inputs {', '.join(names)} looks like the timestep: name it with the recipe key timestep_input"
    )


def find_conditions(
    leaves: list[Leaf],
    tensors: list[Tensor],
    latents: int,
    timestep: int,
    outputs: Sequence[Sequence[int]] = (),
    moving: Collection[str] = (),
) -> list[int]:
    """Inputs that stay the same while one image is sampled: a change of any of them begins a new image.

    What moves from step to step has the sizes of an output (`outputs`, the batch left out): image and sound, where a
    model denoises both. If no input has, it is the latents. `moving` names others that were seen to move, as a ControlNet's
    residuals do; see `pattern`.
    """
    moved = {
        i for i, t in enumerate(tensors) if t.is_floating_point() and tuple(t.shape[1:]) in set(map(tuple, outputs))
    }
    moved = {i for i in moved if leaves[i].batched and tensors[i].dim() >= 2} or {latents}
    return [
        i
        for i, (leaf, t) in enumerate(zip(leaves, tensors, strict=True))
        if i not in moved
        and i != timestep
        and pattern(leaf.name) not in moving
        and not is_timestep_name(leaf.name)  # a second one, to go to
        and leaf.batched
        and (t.dim() >= 2 or not t.is_floating_point())
    ]


def insert_gates(
    captured: Capture, branches: list[Branch], gates: Gates, timestep: int, conditions: list[int]
) -> LazyGraph:
    """Build the flat lazy graph; the capture is left as it is, weights and gates are shared with it."""
    source = captured.graph_module.graph
    placeholders = [node for node in source.nodes if node.op == "placeholder"]
    batch = placeholders[captured.latents].meta["val"].shape[0]
    sized = captured.sizes.places
    state = [
        StateSpec("past_timestep", (-1,), torch.float32, fill=gates.never, kind="clock"),
        StateSpec("past_prints", (-1, PRINT * max(1, len(conditions) + len(sized))), torch.float32, kind="clock"),
        StateSpec("past_times", (-1, 4 + len(branches)), torch.float32, fill=gates.never, kind="clock"),
    ]
    clock = len(state)
    for i, branch in enumerate(branches):
        state += [
            cache_spec(f"past_{i}_{s}", node, batch, captured.sizes.symbols) for s, node in enumerate(branch.exits)
        ]
    caches_end = len(state)
    order = int(gates.order)
    results = list(next(node for node in source.nodes if node.op == "output").args[0])
    found = [_forecast_spec(node, batch, captured.sizes.symbols) for node in results]
    ahead = {position: spec for position, spec in enumerate(found) if spec is not None}
    for word in FORECAST[: 1 + order] if gates.forecasts else ():
        state += [replace(spec, name=f"past_{word}_{position}") for position, spec in ahead.items()]

    graph = fx.Graph()
    public: dict[fx.Node, fx.Node] = {node: graph.node_copy(node) for node in placeholders}
    threshold = graph.placeholder("lazy_threshold")
    past = [graph.placeholder(spec.name) for spec in state]
    latents = public[placeholders[captured.latents]]
    grid, direction, bias, slope, phase = (
        graph.get_attr(f"lazy_gates.{name}") for name in ("grid", "direction", "bias", "slope", "phase")
    )
    time = graph.call_function(_ops.timestep_per_sample, (public[placeholders[timestep]], latents))
    prints = graph.call_function(
        _ops.fingerprint,
        (
            [public[placeholders[c]] for c in conditions],
            latents,
            [public[placeholders[i]] for i, _ in sized],
            [dim for _, dim in sized],
        ),
    )
    valid = graph.call_function(_ops.valid, (time, past[0], prints, past[1], past[2], direction, phase))
    now = graph.call_function(_ops.clock, (time, past[0], valid, direction, phase))
    hats = graph.call_function(_ops.hat, (now, grid))
    elapsed = graph.call_function(_ops.elapsed, (now, past[2], direction))

    # Inside a branch its own values are read as they are; outside, its exits are read as selected.
    inside: list[dict[fx.Node, fx.Node]] = [{} for _ in branches]
    owner = {node: i for i, branch in enumerate(branches) for node in branch.nodes}
    entries: dict[fx.Node, list[tuple[int, int]]] = {}
    for i, branch in enumerate(branches):
        for position, stream in enumerate(branch.streams):
            entries.setdefault(stream.entry, []).append((i, position))
    streams = [(i, node) for i, branch in enumerate(branches) for node in branch.exits]
    cache_of = dict(zip(streams, past[clock:caches_end], strict=True))
    stored = [*((cache_of[key], key[1]) for key in streams)]
    stored += zip(past[caches_end:], (results[position] for _ in FORECAST for position in ahead), strict=False)
    for kept, node in stored:
        kept.meta["like"] = node.meta["val"].transpose(0, batch_dim(node, batch))  # whose sizes it has
    lazies: dict[int, fx.Node] = {}
    chosen: dict[tuple[int, fx.Node], fx.Node] = {}

    def read(node: fx.Node, reader: fx.Node) -> fx.Node | None:
        i = owner.get(reader)
        if i is not None and node in inside[i]:
            return inside[i][node]
        return public.get(node)

    marks_of: list[dict[fx.Node, fx.Node]] = [{} for _ in branches]

    def swapped(value: fx.Node, like: fx.Node, dim: int) -> fx.Node:
        """`value` with its batch brought to dim 0 or back; itself if it is there already."""
        if dim == 0:
            return value
        result = graph.call_function(torch.ops.aten.transpose.int, (value, 0, dim))
        result.meta = dict(value.meta if value is not like else like.meta)
        result.meta["val"] = value.meta["val"].transpose(0, dim)
        return result

    def enter(node: fx.Node) -> None:
        for i, position in entries.get(node, ()):
            dim = batch_dim(node, batch)
            value = swapped(public[node], node, dim)
            mark = graph.call_function(_ops.enter, (value, i, position))
            mark.meta = dict(value.meta if dim else node.meta)
            marks_of[i][node] = mark
            inside[i][node] = swapped(mark, node, dim)

    def leave(i: int, node: fx.Node) -> bool:
        branch = branches[i]
        if any(stream.entry not in inside[i] for stream in branch.streams):
            return False
        if i not in lazies:
            marks = [marks_of[i][stream.entry] for stream in branch.streams]
            dims = [
                stream.channel_dim if stream.channel_dim != batch_dim(stream.entry, batch) else 0
                for stream in branch.streams
            ]
            row = graph.call_function(torch.ops.aten.select.int, (bias, 0, i))
            since = graph.call_function(torch.ops.aten.select.int, (elapsed, 1, 2 + i))
            if int(gates.static) > 0:
                score = graph.call_function(_ops.scheduled, (marks, hats, row, since, slope))
            else:
                weight = graph.get_attr(f"lazy_gates.weights.{i}")
                score = graph.call_function(operator_of(gates.kind), (marks, dims, hats, weight, row, since, slope))
            lazies[i] = graph.call_function(_ops.decide, (score, valid, threshold))
        dim = batch_dim(node, batch)
        fresh = swapped(inside[i][node], node, dim)
        select = graph.call_function(_ops.select, (fresh, cache_of[i, node], lazies[i]))
        select.meta = dict(fresh.meta if dim else node.meta)
        chosen[i, node] = select
        public[node] = swapped(select, node, dim)
        enter(node)
        return True

    for node in placeholders:
        enter(node)
    waiting = [node for node in source.nodes if node.op not in ("placeholder", "output")]
    pending: list[tuple[int, fx.Node]] = []
    while waiting or pending:
        left: list[fx.Node] = []
        for node in waiting:
            if any(read(used, node) is None for used in node.all_input_nodes):
                left.append(node)
                continue
            copied = graph.node_copy(node, {used: read(used, node) for used in node.all_input_nodes}.__getitem__)
            part = owner.get(node)
            if part is None:
                public[node] = copied
                enter(node)
            else:
                inside[part][node] = copied
                if node in branches[part].exits:
                    pending.append((part, node))
            pending = [item for item in pending if not leave(*item)]
        if len(left) == len(waiting):
            stuck = sorted({branches[i].name for i, _ in pending})
            raise LocateError(f"branches {', '.join(stuck)} wait for each other: their streams cannot share one gate")
        waiting = left

    stacked = graph.call_function(torch.ops.aten.stack.default, ([lazies[i] for i in range(len(branches))], 0))
    given = [public[r] if isinstance(r, fx.Node) else r for r in results]
    present = [
        time,
        prints,
        graph.call_function(_ops.times, (now, past[2], valid, stacked, gates.never)),
        *(chosen[key] for key in streams),
    ]
    if gates.forecasts:
        whole = graph.call_function(torch.ops.aten.all.dim, (stacked, 0))
        pace = graph.call_function(_ops.pace, (elapsed, valid, gates.unit))
        table = graph.get_attr("lazy_gates.fitted") if gates.fits else None
        shares = graph.call_function(_ops.nudge, (hats, table, elapsed, gates.unit)) if gates.fits else None
        values: list[fx.Node] = []
        rates: list[list[fx.Node]] = []
        for k, (position, spec) in enumerate(ahead.items()):
            node = results[position]
            cache, *before = past[caches_end + k :: len(ahead)]
            dim = batch_dim(node, batch)
            known = (swapped(given[position], node, dim), cache, before, whole, pace, spec.scale)
            values.append(graph.call_function(_ops.forecast, known))
            rates.append([graph.call_function(_ops.hold, (*known, which)) for which in range(order)])
            values[-1].meta["val"] = node.meta["val"].transpose(0, dim)
            forecast = values[-1]
            if shares is not None:
                forecast = graph.call_function(_ops.adjust, (values[-1], rates[-1], whole, shares, spec.scale))
                forecast.meta["val"] = values[-1].meta["val"]
            result = swapped(forecast, node, dim)
            if node.meta["val"].dtype is not torch.float32:
                result = graph.call_function(torch.ops.aten.to.dtype, (result, node.meta["val"].dtype))
            given[position] = result
        present += [*values, *(rate for of_order in zip(*rates, strict=True) for rate in of_order)]
    graph.output((*given, *present, stacked))
    graph.lint()
    module = fx.GraphModule(_Root(captured.graph_module, gates), graph)
    return LazyGraph(
        module, captured.leaves, state, branches, len(results), captured.latents, timestep, conditions, sized, list(ahead),
        dynamic_batch=isinstance(batch, torch.SymInt),
    )  # fmt: skip


def _forecast_spec(node: Any, batch: int | torch.SymInt, sizes: Collection[sympy.Symbol]) -> StateSpec | None:
    """The state for an output's forecast; None for outputs that are no floating-point values for each sample."""
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        return None
    try:
        return replace(cache_spec("", node, batch, sizes), dtype=torch.float32, kind="forecast")
    except LocateError:
        return None


class _Root(nn.Module):
    """The capture's parameters and buffers under their names, and the gates beside them."""

    def __init__(self, weights: nn.Module, gates: Gates) -> None:
        super().__init__()
        self.__dict__["_modules"] = {**weights._modules, "lazy_gates": gates}
        self.__dict__["_parameters"] = dict(weights._parameters)
        self.__dict__["_buffers"] = dict(weights._buffers)
        for name, value in vars(weights).items():
            if isinstance(value, Tensor):
                setattr(self, name, value)


def batch_dim(node: fx.Node, batch: int | torch.SymInt) -> int:
    """The dimension of a value that holds the batch, or a multiple of it: 0, unless the graph says another one."""
    if not isinstance(batch, torch.SymInt):
        return 0
    symbols = batch.node.expr.free_symbols
    sizes = enumerate(node.meta["val"].shape)
    dims = [dim for dim, size in sizes if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols]
    return 0 if not dims or 0 in dims else dims[0]


def cache_spec(name: str, node: fx.Node, batch: int | torch.SymInt, sizes: Collection[sympy.Symbol] = ()) -> StateSpec:
    """The state that holds the value of `node`, whose first dimension is the batch or a multiple of it."""
    value = node.meta["val"].transpose(0, batch_dim(node, batch))
    scale, rest = divmod(size_hint(value.shape[0]), size_hint(batch))
    first: Any = value.shape[0]
    if rest or scale == 0 or (is_dynamic(first) and first.node.expr.free_symbols & set(sizes)):
        raise LocateError(
            f"the first dimension of {node.name} {list(value.shape)} is not the batch or a multiple of it"
        )
    shape = (-1, *(-2 if is_dynamic(size) else size_hint(size) for size in value.shape[1:]))
    return StateSpec(name, shape, value.dtype, scale=scale, example=tuple(map(size_hint, value.shape)))
