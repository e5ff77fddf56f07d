"""What a user does with a lazy module, whether an engine stands before it or a module stands in its place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..plan.plan import Plan
from .engine import Engine, Policy
from .usage import CallSummary, CallUsage


class Controls:
    """Policy, plan, budget and statistics of an engine.

    Attributes:
        engine: decides about the calls.
    """

    engine: Engine

    @property
    def policy(self) -> Policy:
        """ "learned" (the plan is followed), "compute" (everything is computed), "reuse" (all but first calls are not)."""
        return self.engine.policy

    @policy.setter
    def policy(self, value: Policy) -> None:
        self.engine.policy = value

    @property
    def plan(self) -> Plan:
        return self.engine.plan

    @property
    def usage(self) -> CallUsage:
        return self.engine.usage

    def reset(self) -> None:
        """Forget all images and the statistics. Not needed between images."""
        self.engine.reset()

    def summary(self) -> CallSummary:
        """What was computed and what was not since the last `reset()`."""
        return self.engine.summary()

    def set_target(self, target: float, timesteps: Sequence[float] | Tensor | None = None) -> float:
        """Plan for another share of the calls, without learning; see `Engine.set_target`."""
        return self.engine.set_target(target, timesteps)
