"""From a recipe and a sampler to an engine: one dense run is watched, then a plan is made for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..plan.plan import Plan, dense, even
from ..recipe import Recipe
from ..sampling import Sampler
from .calls import Reader
from .engine import Engine
from .follow import in_turns
from .model import LazyModule
from .watch import Watch


@dataclass(frozen=True)
class Even:
    """Plans that compute evenly spread calls, in each stream alike.

    Attributes:
        timesteps, streams: of the calls of the learned run.
        order: of the forecasts.
    """

    timesteps: tuple[float, ...]
    streams: tuple[int, ...]
    order: int = 2

    def plan(self, target: float, timesteps: tuple[float, ...] | None = None) -> Plan:
        """See `Planner.plan`."""
        times, streams = (
            (self.timesteps, self.streams) if timesteps is None else in_turns(timesteps, max(self.streams) + 1)
        )
        computes = [False] * len(times)
        for stream in set(streams):
            places = [k for k, own in enumerate(streams) if own == stream]
            for k, computed in zip(places, even([times[k] for k in places], target).computes, strict=True):
                computes[k] = computed
        return Plan(times, tuple(computes), self.order, streams)


def unlearned(module: nn.Module, recipe: Recipe) -> Engine:
    """An engine that computes everything; it knows how to read calls, and nothing else."""
    return Engine(Reader.of(module, recipe.timestep_input), dense([1.0, 0.0]))


def engine_from(watch: Watch, recipe: Recipe) -> Engine:
    """The engine of a recipe for a run that was watched."""
    times, streams = tuple(c.timestep for c in watch.calls), tuple(c.stream for c in watch.calls)
    planner = Even(times, streams, recipe.forecast)
    if not recipe.train.enabled:
        return Engine(watch.reader, Plan(times, (True,) * len(times), recipe.forecast, streams), planner)
    target = recipe.targets[0]
    return Engine(watch.reader, planner.plan(target), planner, target)


def lazy_module(model: nn.Module, recipe: Recipe, sampler: Sampler) -> LazyModule:
    """A lazy module that follows a plan for what `sampler` does.

    Raises:
        LazyCompressError: the sampler or the model is at fault.
    """
    lazy = LazyModule(model, unlearned(model, recipe))
    lazy.recipe = recipe
    watch = Watch(lazy.inner, lazy.engine.reader)
    with torch.no_grad(), lazy.replaced(watch):
        sampler(lazy)
    watch.done()
    lazy.engine = engine_from(watch, recipe)
    lazy.example = watch.example
    return lazy
