"""From a recipe and a sampler to an engine: one dense run is watched, a calibration is made, and a plan is searched in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, RecipeError
from ..plan.calibration import Calibration
from ..plan.forecasts import Order
from ..plan.goals import cheapest, clock
from ..plan.learn import Learned, PlanReport, learn_plan
from ..plan.plan import Plan, dense
from ..plan.record import Reading
from ..plan.search import Guards as Ends
from ..plan.search import computed_of, least_share, plan_for
from ..recipe import Guards, Recipe
from ..sampling import Sampler
from ..scopes import Surroundings
from .attach import Handle, attach, detach, nothing_around
from .calls import Reader
from .engine import Engine
from .follow import in_turns
from .model import LazyModule
from .watch import Turns, Watch

#: Dense runs of all its images that a calibration takes, for `train.effort: 1`.
RUNS = 15.0


@dataclass(frozen=True)
class Search:
    """Plans searched in a calibration.

    Attributes:
        calibration: what the model told.
        forecast: highest order of the forecasts, or the name of one.
        guards: the recipe's.
        learned: the plan that true runs have chosen: for its own timesteps and as many calls there is no better one.
    """

    calibration: Calibration
    forecast: Order
    guards: Guards
    learned: Plan | None = None

    def plan(self, target: float, timesteps: tuple[float, ...] | None = None) -> Plan:
        """See `Planner.plan`."""
        guards = Ends(self.guards.warmup_steps, self.guards.last_steps, self.guards.max_reuse)
        times, streams = None, None
        if timesteps is not None:
            times, streams = in_turns(timesteps, max(self.calibration.streams) + 1)
            target = max(target, least_share(streams, guards))
        learned = self.learned
        same = learned is not None and (times is None or (times, streams) == (learned.timesteps, learned.streams))
        if learned is not None and same and sum(learned.computes) == computed_of(target, learned.streams):
            return learned
        return plan_for(
            self.calibration, target, times, streams=streams, orders=orders_of(self.forecast),
            first=guards.first, last=guards.last, max_reuse=guards.max_reuse,
        )  # fmt: skip


def unlearned(module: nn.Module, recipe: Recipe) -> Engine:
    """An engine that computes everything; it knows how to read calls, and nothing else."""
    engine = Engine(Reader.of(module, recipe.timestep_input), dense([1.0, 0.0]))
    engine.policy = "compute"
    return engine


def learn(watch: Watch, sampler: Sampler, recipe: Recipe, progress: bool) -> tuple[Engine, PlanReport | None]:
    """The engine of a recipe, for a run that was watched, and what learning found out; None if nothing is learned.

    Args:
        watch: of a dense run of the sampler.
        sampler: runs a loop that calls what it is given in the place of `watch.inner`.
        recipe: its `target`, `train`, `guards` and `forecast`.
        progress: show a bar.

    Raises:
        LazyCompressError: the sampler does not fit, or an output is not finite.
    """
    times, streams = tuple(c.timestep for c in watch.calls), tuple(c.stream for c in watch.calls)
    if not recipe.train.enabled:
        return Engine(watch.reader, Plan(times, (True,) * len(times), recipe.forecast, streams)), None
    if len(watch.batches) > 1:
        raise InputError(
            f"the sampler calls {watch.reader.model} with batches of {sorted(watch.batches)} in one run, and a plan is learned "
            "with one: learn without the calls of another size (skip-layer guidance), and sample with them then"
        )
    train, guards = recipe.train, recipe.guards
    least = len(set(streams)) / len(times)
    target = _timed(watch, sampler, recipe, least) if recipe.goal in ("speedup", "seconds") else recipe.targets[0]
    _check_times(times, streams, max(target, least) if recipe.goal else target)
    learn_at = partial(
        learn_plan, watch.inner, sampler, read=reading(watch.reader), orders=orders_of(recipe.forecast),
        guards=Ends(guards.warmup_steps, guards.last_steps, guards.max_reuse), images=train.images, seed=train.seed,
        progress=progress, budget=max(2.0, RUNS * train.effort), checkpoint=train.checkpoint or None,
    )  # fmt: skip
    if recipe.goal in ("psnr", "max_error"):
        found = _close_enough(learn_at, recipe, least)
    else:
        found = learn_at(target)
    planner = Search(found.calibration, recipe.forecast, guards, found.plan)
    return Engine(watch.reader, found.plan, planner, found.plan.share if recipe.goal else target), found.report


def _timed(watch: Watch, sampler: Sampler, recipe: Recipe, least: float) -> float:
    """The share of the calls that leaves the time that the recipe asks for.

    Raises:
        RecipeError: no share does.
    """
    found = clock(watch.inner, sampler, recipe.train.seed)
    wanted = found.run / recipe.speedup if recipe.speedup is not None else (recipe.seconds or 0.0) * found.images
    share = found.share(wanted)
    if share < least:
        fastest = found.run - found.calls * (1 - least)
        limit = (
            f"{found.run / fastest:.2f}" if recipe.speedup is not None else f"{fastest / found.images:.2g} s an image"
        )
        raise RecipeError(
            f"{recipe.goal}: {getattr(recipe, recipe.goal):g} cannot be reached: a dense run takes {found.run:.2g} s for "
            f"{found.images} images, {found.run - found.calls:.2g} s of it beside the model; at best it is {limit}"
        )
    return share


def _close_enough(learn_at: Callable[..., Learned], recipe: Recipe, least: float) -> Learned:
    """The cheapest plan that is as close to the dense images as the recipe asks for."""

    def good(found: Learned) -> bool:
        if recipe.psnr is not None:
            return found.report.psnr >= recipe.psnr
        return found.report.error <= (recipe.max_error or 0.0)

    first = learn_at(max(0.5, least))
    found = cheapest(first, partial(learn_at, calibration=first.calibration), good, least)
    if found is None:
        return learn_at(1.0, calibration=first.calibration)
    # What true runs told was about plans of half of the calls. Far from there, a calibration of its own may save a call more.
    calls = len(found.plan.computes)
    while sum(found.plan.computes) - 1 >= max(1, round(least * calls)):
        fewer = learn_at((sum(found.plan.computes) - 1) / calls)
        if not good(fewer):
            break
        found = fewer
    return found


def _check_times(times: Sequence[float], streams: Sequence[int], target: float) -> None:
    """Whether calls at these timesteps are an image's, some of which may be left out.

    Raises:
        InputError: they are not.
        RecipeError: the target leaves none of them.
    """
    shown = ", ".join(f"{time:g}" for time in times[:6])
    one = [time for time, stream in zip(times, streams, strict=True) if stream == streams[0]]
    steps = [after - before for before, after in pairwise(one)]
    if not steps:
        raise InputError("the sampler calls the model once: there is no call to reuse")
    if not any(steps):
        raise InputError(
            f"what is taken for the timestep was {shown} in the calls of one run: name the timestep with the recipe key "
            "timestep_input"
        )
    if min(steps) < 0 < max(steps):
        raise InputError(f"the sampler's timesteps neither rise nor fall: {shown}, ...")
    least = len(set(streams)) / len(times)
    if least > target:
        raise RecipeError(
            f"target {target:g}: the first of {len(one)} calls computes always, which is {least:.0%}: raise the target, or take "
            "more steps"
        )


def orders_of(highest: Order) -> Sequence[Order]:
    """The forecasts to choose from: polynomials, or the one that is named."""
    return [highest] if isinstance(highest, str) else range(highest + 1)


def reading(reader: Reader) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Reading]:
    """Reads timestep and stream of the calls of a run, one after the other."""
    turns = Turns()

    @torch.no_grad()
    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reading:
        return turns.see(reader.read(args, kwargs))

    return read


def lazy_module(model: nn.Module, recipe: Recipe, sampler: Sampler, progress: bool) -> LazyModule:
    """A lazy module that follows a plan for what `sampler` does.

    Raises:
        LazyCompressError: the sampler or the model is at fault.
    """
    lazy = LazyModule(model, unlearned(model, recipe))
    lazy.recipe = recipe
    watch = Watch(model, lazy.engine.reader)
    with torch.no_grad(), lazy.replaced(watch):
        sampler(lazy)
    watch.done()

    def loop(standin: Any) -> Tensor:
        with lazy.replaced(standin):  # the sampler gets something with the model's attributes and parameters
            return sampler(lazy)

    lazy.engine, lazy.training_report = learn(watch, loop, recipe, progress)
    lazy.example = watch.example
    return lazy


def lazy_in_place(
    module: nn.Module, recipe: Recipe, sampler: Sampler, progress: bool, surroundings: Surroundings = nothing_around
) -> Handle:
    """Put an engine before a module that follows a plan for what `sampler` does: for pipelines, which call the module itself.

    Args:
        module: the user's own; after an error it is as it was, but for an engine that it had.
        recipe: see `learn`.
        sampler: runs one loop that calls the module, whatever it is given itself, and returns the final latents.
        progress: show a bar.
        surroundings: finds the run that a call of the module belongs to.

    Raises:
        LazyCompressError: the sampler or the module is at fault.
    """
    handle = attach(module, unlearned(module, recipe), surroundings)
    watch = Watch(handle.inner, handle.engine.reader)
    try:
        with torch.no_grad(), handle.replaced(watch):
            sampler(module)
        watch.done()

        def loop(standin: Any) -> Tensor:
            with handle.replaced(standin):
                return sampler(module)

        handle.engine, handle.training_report = learn(watch, loop, recipe, progress)
    except BaseException:
        detach(module)
        raise
    handle.recipe, handle.example, handle.turns = recipe, watch.example, watch.streams
    return handle
