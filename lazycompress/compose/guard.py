"""A limit on the error of a stage, and which layers to spare so that it is kept.

The error is the one that counts: of final latents from noise that nothing was fitted to, against the model before the
stage. Which layers hurt most is measured, not guessed from their names: on a few calls of the sampler's own loop, how much
nearer the output comes when one layer alone works with its old numbers. One forward pass a layer and call; the stage is not
run again for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.insert import LazyGraph
from ..graph.ops import is_heavy
from ..runtime import LazyModel
from ..sampling import Sampler

#: Shares of the layers that are left out, one after the other, until the limit is kept.
SHARES = (0.125, 0.25, 0.5, 0.75)

#: Calls that layers are compared on, and sampling runs that are held out.
CALLS, RUNS = 4, 2


@dataclass(frozen=True)
class HeldOut:
    """Final latents of the model before a stage, from noise that calibration and training never see."""

    lazy: LazyModel
    sampler: Sampler
    seeds: tuple[int, ...]
    images: tuple[Tensor, ...]

    @classmethod
    def of(cls, lazy: LazyModel, sampler: Sampler, seed: int) -> HeldOut:
        seeds = tuple(7_000_003 + RUNS * seed + k for k in range(RUNS))
        return cls(lazy, sampler, seeds, tuple(_final(lazy, sampler, k) for k in seeds))

    def error(self, flat: LazyGraph | None = None) -> float:
        """Mean squared error of the latents that `flat` gives in place of the model's own graph."""
        with self.lazy.instead(flat) if flat is not None else nullcontext():
            found = [_final(self.lazy, self.sampler, seed) for seed in self.seeds]
        pairs = zip(found, self.images, strict=True)
        return float(torch.stack([(a - b).float().square().mean() for a, b in pairs]).mean())


def _final(lazy: LazyModel, sampler: Sampler, seed: int) -> Tensor:
    state = torch.get_rng_state()
    lazy.reset()
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            return sampler(lazy).detach()
    finally:
        torch.set_rng_state(state)
        lazy.reset()


def counts(layers: int) -> list[int]:
    """How many layers are left out, one attempt after the other."""
    return sorted({min(layers, math.ceil(share * layers)) for share in SHARES})


def worst_first(
    before: LazyGraph, after: LazyGraph, calls: Sequence[Sequence[Tensor]], layers: Sequence[str]
) -> list[str]:
    """Names of layers, those first whose old numbers bring the output nearest to the old one.

    Args:
        before: the flat graph that the stage was given.
        after: what it made of it; nodes kept their names.
        calls: inputs of the graph.
        layers: names of nodes that are in both.
    """
    picked = torch.linspace(0, len(calls) - 1, min(CALLS, len(calls))).round().int().tolist()
    error = dict.fromkeys(layers, 0.0)
    with torch.no_grad():
        for call in (calls[k] for k in picked):
            expected = before.graph_module(*call)[: before.outputs]
            for name in layers:
                found = _Restored(before, after, name).run(*call)[: before.outputs]
                error[name] += sum(float((a - b).float().square().mean()) for a, b in zip(found, expected, strict=True))
    return sorted(layers, key=error.__getitem__)


class _Restored(fx.Interpreter):
    """Runs the graph after a stage with one layer's inputs, weight and bias as they were before it."""

    def __init__(self, before: LazyGraph, after: LazyGraph, name: str) -> None:
        super().__init__(after.graph_module, garbage_collect_values=False)
        self._old = before.graph_module
        self._before = {node.name: node for node in before.graph_module.graph.nodes}
        self._after = {node.name: node for node in after.graph_module.graph.nodes}
        self._name = name

    def run_node(self, n: fx.Node) -> Any:
        if n.name != self._name:
            return super().run_node(n)
        node = self._before[n.name]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: self._value(used, 6)[0])
        return _call(node, args, kwargs)

    def _value(self, node: fx.Node, depth: int) -> tuple[Any, bool]:
        """The value of a node of the old graph from the present ones, and whether it had to be computed.

        What the stage put between (rounding, scales) is passed by, through what lies between it and the layer.
        """
        if node.op == "get_attr":
            value: Any = self._old
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value, False
        ours = self._after.get(node.name)
        if ours is not None and (depth == 0 or is_heavy(node) or node.op == "placeholder" or not _tensors(node)):
            return self.env[ours], False
        found = {used: self._value(used, depth - 1) for used in node.all_input_nodes}
        same = ours is not None and all(used.name in self._before for used in ours.all_input_nodes)
        if same and not any(computed for _, computed in found.values()):
            assert ours is not None
            return self.env[ours], False
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: found[used][0])
        return _call(node, args, kwargs), True


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    operation: Any = node.target
    return operation(*args, **kwargs)


def _tensors(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
