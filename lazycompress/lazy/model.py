"""A lazy module beside the user's own: for models that come without a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..models import evaluating
from ..plan.plan import Plan
from .eager import around, eager
from .engine import Engine, Policy, run
from .scopes import opened
from .usage import CallSummary, CallUsage


class LazyModule(nn.Module):
    """A module some of whose calls are not computed.

    It has the forward signature, return type and attributes of the module that it was made from, runs that very module, and
    leaves it as it is. A module in training mode is run in evaluation mode, until `train()` is called here. State belongs to
    each sample and is found again by itself, see `Images.find`.

    Attributes:
        model: the user's own module.
        engine: decides about the calls.
        training_report: what learning found, or None.
    """

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.model = model
        self.engine = engine
        self.recipe: Any = None
        self.training_report: Any = None
        #: Positional and keyword arguments of one call.
        self.example: tuple[Sequence[Any], Mapping[str, Any]] | None = None
        self._set_standin(None)
        self.training = False  # this module's own; those of the user's are left as they are

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        own = getattr(self.model, "dtype", None)
        return own if isinstance(own, torch.dtype) else next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    _standin: Callable[..., Any] | None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "engine"):
                raise
            return getattr(super().__getattr__("model"), name)

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

    def cache_context(self, name: str, **options: Any) -> AbstractContextManager[Any]:
        """As the module's own, if it has one. Nothing depends on it here: calls are told apart by what they are given."""
        own = getattr(self.model, "cache_context", None)
        return own(name, **options) if own is not None else nullcontext()

    @contextmanager
    def replaced(self, standin: Callable[..., Any]) -> Iterator[None]:
        """Within the block, whoever calls this module calls `standin`."""
        before = self._standin
        self._set_standin(standin)
        try:
            yield
        finally:
            self._set_standin(before)

    def _set_standin(self, standin: Callable[..., Any] | None) -> None:
        self.__dict__["_standin"] = standin  # a module that stands in is no part of this one

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module itself."""
        return self.model(*args, **kwargs)

    @around
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._standin is not None:
            return eager(self._standin)(*args, **kwargs)
        in_its_mode = self.training or not self.model.training
        with nullcontext() if in_its_mode else evaluating(self.model):
            return run(self.engine, self.model, args, kwargs, opened(self) or opened(self.model))[0]
