"""A lazy module beside the user's own: for models that come without a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from ..eager import around, eager
from ..models import InPlaceOf, evaluating
from ..scopes import opened
from .controls import Controls
from .engine import Engine, run


class LazyModule(Controls, InPlaceOf):
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

    _standin: Callable[..., Any] | None

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
