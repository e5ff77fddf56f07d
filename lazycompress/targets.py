"""Budgets without training: the schedules that training left, moved to another share of the MACs, or to other timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .errors import LazyCompressError, shown
from .gates import FORBIDDEN, SLOPE, Gates
from .graph.branch import Branch


def shares(branches: Sequence[Branch]) -> Tensor:
    """Share of a call's branch MACs that each branch has, float64 [branches]."""
    macs = torch.tensor([float(branch.macs) for branch in branches], dtype=torch.float64)
    return macs / macs.sum()


def expected_ratio(gates: Gates, costs: Tensor, timesteps: Tensor | None) -> float:
    """Computed share of the branches' MACs over one image; see `LazyModel.expected_macs_ratio`."""
    if timesteps is not None:
        timesteps = _times(timesteps)
    else:
        timesteps = gates.grid.flip(0) if float(gates.direction) > 0 else gates.grid
    return 1.0 - float((costs * gates.decisions(timesteps)).sum(dim=1).mean())


def move(gates: Gates, costs: Tensor, target: float, timesteps: Tensor | None) -> float:
    """Have the gates compute at most `target`; see `LazyModel.set_target`."""
    if isinstance(target, bool) or not isinstance(target, Real) or not 0 < target <= 1:
        raise LazyCompressError(f"target: a share in (0, 1] is needed, there was {shown(target)}")
    timesteps = None if timesteps is None else _times(timesteps)
    if len(gates.frontier) == 0:
        raise LazyCompressError("set_target: these gates were not trained, they know no order of reuse")
    gates.follow(_near(gates, costs, target), gates.rank.isfinite().cpu())
    if timesteps is not None:
        _stretch(gates, costs, target, timesteps)
    return expected_ratio(gates, costs, timesteps)


def _times(timesteps: Any) -> Tensor:
    """Timesteps as a vector.

    Raises:
        LazyCompressError: they are no numbers, none, not finite, or do not run one way.
    """
    try:
        times = torch.as_tensor(timesteps).detach().reshape(-1)
        numbers = times.double().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise LazyCompressError(
            f"timesteps: a tensor or a list of numbers is needed, there was {shown(timesteps)}"
        ) from None
    steps = numbers[1:] - numbers[:-1]
    if not len(times) or times.is_complex() or times.dtype is torch.bool or not bool(numbers.isfinite().all()):
        raise LazyCompressError(f"timesteps: finite numbers, one a call, are needed, there was {shown(timesteps)}")
    if not bool((steps >= 0).all() or (steps <= 0).all()):
        raise LazyCompressError(f"timesteps: those of one image rise or fall; there was {shown(numbers.tolist())}")
    return times


def _stretch(gates: Gates, costs: Tensor, target: float, timesteps: Tensor) -> None:
    """Scale how long outputs are kept, the least that meets the target on these timesteps."""
    table = gates.bias.detach().clone()
    free = table > FORBIDDEN / 2

    def ratio(shift: float) -> float:
        with torch.no_grad():
            gates.bias.copy_(torch.where(free, table + shift, table))
        return expected_ratio(gates, costs, timesteps)

    low, high = -SLOPE * 6.0, SLOPE * 6.0
    if (least := ratio(high)) > target + 1e-9:
        ratio(0.0)
        raise LazyCompressError(f"target {target}: on these timesteps the gates allow {least:.2f} at least")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if ratio(middle) <= target + 1e-9 else (middle, high)
    ratio(high)


def _near(gates: Gates, costs: Tensor, target: float) -> Tensor:
    """A schedule, bool [branches, grid], with at most `target` of the MACs computed: from the nearest on the frontier.

    Raises:
        LazyCompressError: the guards allow no such share.
    """
    share = (costs / len(gates.grid)).unsqueeze(1)
    known = gates.frontier.cpu()
    ratios = [1.0 - float((share * schedule).sum()) for schedule in known]
    schedule = known[min(range(len(ratios)), key=lambda k: abs(ratios[k] - target))].clone()
    ratio = 1.0 - float((share * schedule).sum())
    units = _units(gates, schedule)
    falling, longest = float(gates.direction) > 0, int(gates.longest)
    for unit in units if ratio > target + 1e-9 else []:
        if ratio <= target + 1e-9:
            break
        more = [(branch, step) for branch, step in unit if not schedule[branch, step]]
        for branch, step in more:
            schedule[branch, step] = True
        if any(_longest_run(schedule[branch], falling) > longest for branch, _ in more):
            for branch, step in more:
                schedule[branch, step] = False
        else:
            ratio -= sum(float(share[branch]) for branch, _ in more)
    if ratio > target + 1e-9:
        raise LazyCompressError(f"target {target}: the gates and their guards allow {ratio:.2f} at least")
    for unit in reversed(units):
        less = [(branch, step) for branch, step in unit if schedule[branch, step]]
        freed = sum(float(share[branch]) for branch, _ in less)
        if ratio + freed <= target + 1e-9:
            for branch, step in less:
                schedule[branch, step] = False
            ratio += freed
    return schedule


def _units(gates: Gates, schedule: Tensor) -> list[list[tuple[int, int]]]:
    """Decisions (branch, step) that are taken together, the safest first: whole steps if the schedule is made of them."""
    rank = gates.rank.cpu()
    order = [divmod(int(k), rank.shape[1]) for k in rank.flatten().argsort()[: int(rank.isfinite().sum())]]
    if not torch.equal(schedule.all(dim=0), schedule.any(dim=0)):
        return [[decision] for decision in order]
    steps: dict[int, list[tuple[int, int]]] = {}
    for branch, step in order:
        steps.setdefault(step, []).append((branch, step))
    return list(steps.values())


def _longest_run(row: Tensor, falling: bool) -> int:
    """The longest run of reuse in bool [grid]; the first call of an image computes whatever it says."""
    longest = now = 0
    for reuse in (row.flip(0) if falling else row).tolist():
        now = now + 1 if reuse else 0
        longest = max(longest, now)
    return longest
