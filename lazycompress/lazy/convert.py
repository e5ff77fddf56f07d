"""From a plan of whole calls to a lazy graph, for files: every branch's gate follows the plan, and outputs are forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import ExportError, InputError
from ..gate import SOONEST
from ..gates import Gates
from ..graph.branch import Branch
from ..graph.call import take_apart
from ..plan.forecasts import forecast
from ..plan.plan import Plan, stream_of
from ..runtime import LazyModel
from .attach import Handle, PartHandle, handle_of
from .model import LazyModule

_Lazy = TypeVar("_Lazy", bound=LazyModel)


def graph_of(lazy: Handle | LazyModule, kind: type[_Lazy] = LazyModel) -> _Lazy:  # type: ignore[assignment]
    """A lazy graph of the module, with the module's weights, that follows the same plan.

    Guidance in calls that take turns has one plan there: that of the first of them.

    Raises:
        ExportError: no call of the module is known.
        LazyCompressError: the module cannot be captured, or no branches are found in it.
    """
    module = lazy.module if isinstance(lazy, Handle) else lazy.model
    if lazy.example is None:
        raise ExportError(
            f"no call of {type(module).__name__} is known that a graph could be made of: apply the recipe again"
        )
    plan = stream_of(lazy.engine.plan, 0)
    call = take_apart(module, *lazy.example)
    reader = lazy.engine.reader
    made = kind(
        module,
        call,
        lambda branches: gates_of(plan, branches),
        timestep_input=reader.timestep or None,
        moving=reader.moving,
    )
    made.recipe, made.training_report = lazy.recipe, lazy.training_report
    return made


def lazy_of(model: LazyModel | LazyModule | Handle | nn.Module) -> LazyModel | LazyModule | Handle:
    """What is lazy about a model: itself, or the handle of a pipeline's own module.

    Raises:
        InputError: nothing is; or it is a part of a pipeline that runs in files.
    """
    found = model if isinstance(model, LazyModel | LazyModule | Handle) else handle_of(model)
    if found is None:
        raise InputError(f"{type(model).__name__} is not lazy: call lazycompress.apply first")
    if isinstance(found, PartHandle):
        raise InputError(
            f"{type(found.module).__name__} runs in a file and is not written alone: lazycompress.export(pipe, folder) writes "
            "the pipeline with it"
        )
    return found


def gates_of(plan: Plan, branches: Sequence[Branch]) -> Gates:
    """Gates that decide alike for all branches, as a plan of one stream does."""
    direction = 1.0 if plan.timesteps[0] >= plan.timesteps[-1] else -1.0
    times = torch.tensor(plan.timesteps, dtype=torch.float64)
    gaps = times.diff().abs()
    again = torch.cat([torch.zeros(1, dtype=torch.bool), gaps == 0])
    phase = float(gaps[gaps > 0].min()) / 2 if bool(again.any()) and bool((gaps > 0).any()) else 0.0
    order = _distinct(times - direction * phase * again, torch.tensor(plan.computes))
    gates = Gates(
        [b.name for b in branches], [b.width for b in branches], torch.tensor([t for t, _ in order]), int(direction)
    )
    gates.order.fill_(plan.polynomial)
    gates.holds = True
    gates.fitted.copy_(_nudges(plan, gates.grid))
    gates.static.fill_(1)
    gates.phase.fill_(phase)
    reuse = torch.tensor([not computes for _, computes in order]).expand(len(branches), -1)
    gates.follow(reuse, torch.ones_like(reuse))
    gates.rank.copy_(torch.where(reuse, torch.arange(len(order), dtype=torch.float32), torch.inf))
    gates.frontier = reuse.unsqueeze(0).clone()
    return gates


def _nudges(plan: Plan, grid: Tensor) -> Tensor:
    """`Gates.fitted` of a plan.

    A forecast of weights w of outputs that are e old differs from the polynomial, of weights p, by the sums of (w - p) (-e)^k
    times its value, slope and half its curvature, for k of 0, 1 and 2.
    """
    table = torch.zeros(len(grid), 5, dtype=torch.float64)
    for call, weights in enumerate(plan.fitted):
        if weights:
            now = plan.timesteps[call]
            past = [t for t, computes in zip(plan.timesteps[:call], plan.computes, strict=False) if computes]
            parts = forecast(past, now, plan.order)
            ages = [abs(now - past[position]) for position, _ in parts]
            change = [weight - own for weight, (_, own) in zip(weights, parts, strict=True)]
            moments = [sum(c * (-age) ** k for c, age in zip(change, ages, strict=True)) for k in range(len(ages))]
            known = [abs(now - t) for t in reversed(past[-2:])]
            row = int((grid.double() - now).abs().argmin())
            table[row] = torch.tensor(
                [*known, *[SOONEST] * (2 - len(known)), *moments, *[0.0] * (3 - len(moments))], dtype=torch.float64
            )
    return table.to(grid.dtype)


def _distinct(times: Tensor, computes: Tensor) -> list[tuple[float, bool]]:
    """Times in rising order, and whether any call at each of them computes."""
    found: dict[float, bool] = {}
    for time, computed in zip(times.to(torch.float32).tolist(), computes.tolist(), strict=True):
        found[time] = found.get(time, False) or computed
    return sorted(found.items())
