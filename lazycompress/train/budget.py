"""A budget: the share of the branches' MACs that may be computed, of all branches or of each kind by itself.

Kinds with a share of their own meet it; the others meet what is then left of the whole. So a budget is a list of groups of
branches, each with its share, and a schedule is found for one group after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..errors import RecipeError
from ..graph.branch import Branch
from .schedule import Bools, Planner
from .whole import together

#: A schedule may compute this much more than asked for: decisions are whole.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Portion:
    """Branches that share a budget.

    Attributes:
        name: the kind, or "all branches" or "other branches".
        members: bool [branches].
        weight: their share of all branches' MACs.
        share: of their MACs, that may be computed.
    """

    name: str
    members: Bools
    weight: float
    share: float

    @property
    def reused(self) -> float:
        """What has to be reused, as a share of all branches' MACs."""
        return self.weight * (1.0 - self.share)


@dataclass(frozen=True)
class Budget:
    """How much each of some groups may compute.

    Attributes:
        target: computed share of the whole.
        groups: all branches, each in one group.
    """

    target: float
    groups: tuple[Portion, ...]

    @staticmethod
    def of(branches: Iterable[Branch], target: float, kind_targets: Mapping[str, float]) -> Budget:
        """The budget of a recipe.

        Raises:
            RecipeError: there is no branch of a kind, or the kinds compute more than the target by themselves.
        """
        branches = list(branches)
        kinds = np.array([branch.kind for branch in branches])
        macs = np.array([float(branch.macs) for branch in branches])
        macs = macs / macs.sum()
        unknown = sorted(set(kind_targets) - set(kinds.tolist()))
        if unknown:
            raise RecipeError(
                f"guards.kind_targets: no branch is of kind {unknown[0]!r}; there are {', '.join(sorted(set(kinds)))}"
            )
        groups = [
            Portion(kind, kinds == kind, float(macs[kinds == kind].sum()), share)
            for kind, share in kind_targets.items()
        ]
        spent = sum(group.weight * group.share for group in groups)
        others = ~np.isin(kinds, list(kind_targets))
        weight = float(macs[others].sum())
        if spent > target + 1e-9:
            raise RecipeError(
                f"guards.kind_targets: {', '.join(kind_targets)} compute {spent:.3f} of the branches' MACs by themselves, "
                f"target is {target}: raise target, or lower a kind's share"
            )
        if others.any():
            name = "other branches" if kind_targets else "all branches"
            groups.append(Portion(name, others, weight, min(1.0, (target - spent) / weight)))
        return Budget(target, tuple(groups))

    def out_of_reach(self, planner: Planner, fullest: Bools, tolerance: float = TOLERANCE) -> str:
        """What the guards leave to reuse of a group that needs more; empty if there is none.

        `fullest` is the schedule that reuses all that may be."""
        for group in self.groups:
            most = float((fullest * planner.cost)[:, group.members].sum()) / group.weight
            if 1.0 - most > group.share + tolerance:
                return f"at most {most:.0%} of the branch MACs{'' if len(self.groups) == 1 else f' of {group.name}'}"
        return ""

    def fill(self, planner: Planner) -> Bools:
        """A schedule that keeps the budget, decisions added one by one."""
        schedule: Bools = np.zeros(planner.shape, dtype=bool)
        for group in self.groups:
            goal = planner.macs_ratio(schedule) - group.reused
            schedule, _ = _only(planner, group).fill(goal, schedule)
        return schedule

    def swap(self, planner: Planner, schedule: Bools, rounds: int) -> Bools:
        """Exchanges decisions within each group."""
        for group in self.groups:
            others = planner.macs_ratio(schedule & ~group.members)
            schedule = _only(planner, group).swap(others - group.reused, schedule, rounds)
        return schedule

    def together(self, planner: Planner, whole: Planner) -> Bools | None:
        """A schedule that reuses all branches of a group at the same steps; None if the limits allow no such schedule.

        `whole` plans for the model as one, see `of_whole`.
        """
        schedule: Bools = np.zeros(planner.shape, dtype=bool)
        for group in self.groups:
            if group.reused <= 0:
                continue
            found = together(_only(planner, group), whole, 1.0 - group.reused)
            if found is None:
                return None
            schedule |= found
        return schedule


def _only(planner: Planner, group: Portion) -> Planner:
    """The same planner, which may decide over one group only."""
    restricted = copy.copy(planner)
    restricted.limits = replace(planner.limits, allowed=planner.limits.allowed & group.members)
    return restricted
