"""A module that stays what it is: its calls go through an engine, outside of everything else.

`nn.Module.__call__` looks up `_call_impl` on the instance. That is where the engine sits: outside of `forward` and of whatever
replaces it, now or later (accelerate's and diffusers' offloading, adapters, casting), so that a skipped call moves no weight and
whoever takes their hooks off again takes nothing of ours with them. `forward` itself, its signature and the class stay.

Pipelines of other runtimes have parts that are no modules, but objects whose calls go to their `forward`. There, the engine sits
before that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..eager import around, eager
from ..scopes import Scope, Surroundings, opened
from .controls import Controls
from .engine import Engine, run

_log = logging.getLogger(__name__)

_CALL = "_call_impl"
_FORWARD = "forward"
_COMPILED = "_compiled_call_impl"


def nothing_around(module: nn.Module) -> Scope | None:
    """No scope but those that are opened."""
    return None


class Handle(Controls):
    """A module with an engine before it.

    Attributes:
        module: the user's own; of a `PartHandle`, the part.
        engine: decides about its calls.
        enabled: false: calls go straight to the module.
    """

    def __init__(self, module: Any, engine: Engine, surroundings: Surroundings = nothing_around) -> None:
        self.module = module
        self.engine = engine
        self.enabled = True
        self.training_report: Any = None
        self.recipe: Any = None
        #: Positional and keyword arguments of one call.
        self.example: tuple[Sequence[Any], Mapping[str, Any]] | None = None
        #: Calls at a timestep, as seen while learning; more than one is guidance in calls that take turns.
        self.turns = 1
        self._surroundings = surroundings
        self._compiled: Callable[..., Any] | None = module.__dict__.get(_COMPILED)
        self._standin: Callable[..., Any] | None = None
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compiled": None, "_standin": None}

    def take_over(self, other: Handle) -> None:
        """Take what another handle knows beside its engine."""
        self.recipe, self.example = other.recipe, other.example
        self.training_report, self.turns = other.training_report, other.turns

    @contextmanager
    def replaced(self, standin: Callable[..., Any]) -> Iterator[None]:
        """Within the block, whoever calls the module calls `standin`; `inner` calls the module itself."""
        before, self._standin = self._standin, standin
        try:
            yield
        finally:
            self._standin = before

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module itself: its hooks, what offloads it, what compiled it."""
        if self._compiled is not None:
            return self._compiled(*args, **kwargs)
        return type(self.module)._call_impl(self.module, *args, **kwargs)

    # What runs outside of the module is not for compilers; what it calls is.
    @around
    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the module does."""
        if self._standin is not None:
            return eager(self._standin)(*args, **kwargs)
        if not self.enabled or torch.compiler.is_exporting():
            return self.inner(*args, **kwargs)
        if self._steps_aside(self.module):
            return self.inner(*args, **kwargs)
        output, computed = run(self.engine, self.inner, args, kwargs, self._scope())
        return output if computed else self._through_hooks(args, kwargs, output)

    def compiled(self, *args: Any, **kwargs: Any) -> Any:
        """What calling a module does that `module.compile()` compiled."""
        return self.call(*args, **kwargs)

    @eager
    def _scope(self) -> Scope | None:
        return opened(self.module) or self._surroundings(self.module)

    @eager
    def _steps_aside(self, module: Any) -> bool:
        """Whether another cache is enabled on the module: two that skip do not know of each other."""
        if not getattr(module, "is_cache_enabled", False):
            return False
        if not self._told:
            _log.warning(
                "lazycompress: %s has a cache of its own enabled; while it is, nothing is skipped here",
                type(module).__name__,
            )
        self._told = True
        self.engine.usage.add_dense(0, read=False)
        return True

    @eager
    def _through_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The module's own forward hooks see a skipped call as they see any other."""
        module = self.module
        for key, before in list(module._forward_pre_hooks.items()):
            if key in module._forward_pre_hooks_with_kwargs:
                changed = before(module, args, kwargs)
                args, kwargs = changed if changed is not None else (args, kwargs)
            else:
                changed = before(module, args)
                args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
        for key, after in list(module._forward_hooks.items()):
            if key in module._forward_hooks_with_kwargs:
                changed = after(module, args, kwargs, output)
            else:
                changed = after(module, args, output)
            output = output if changed is None else changed
        return output


class PartHandle(Handle):
    """The same for a part that is no module: it has no hooks, and nothing that compiles it."""

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """Call the part itself."""
        return getattr(type(self.module), _FORWARD)(self.module, *args, **kwargs)

    def _through_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return output


def attach(module: Any, engine: Engine, surroundings: Surroundings = nothing_around) -> Handle:
    """Put an engine before a module, or a part whose calls go to its `forward`, in place of one that is there."""
    detach(module)
    if not isinstance(module, nn.Module):
        part = PartHandle(module, engine, surroundings)
        module.__dict__[_FORWARD] = part.call
        return part
    handle = Handle(module, engine, surroundings)
    module.__dict__[_CALL] = handle.call
    if handle._compiled is not None:
        module.__dict__[_COMPILED] = handle.compiled
    return handle


def detach(module: Any) -> None:
    """Make a module, or a part, what it was before `attach`."""
    handle = handle_of(module)
    if handle is None:
        return
    handle.enabled = False  # `module.compile()` may have compiled it
    if isinstance(handle, PartHandle):
        del module.__dict__[_FORWARD]
        return
    del module.__dict__[_CALL]
    if handle._compiled is not None and _COMPILED in module.__dict__:
        module.__dict__[_COMPILED] = handle._compiled


def handle_of(module: Any) -> Handle | None:
    """The handle of a module or a part, or of the module that `torch.compile` wrapped; None if there is none."""
    inside = uncompiled(module)
    where = _CALL if isinstance(inside, nn.Module) else _FORWARD
    found = getattr(getattr(inside, "__dict__", {}).get(where), "__self__", None)
    return found if isinstance(found, Handle) else None


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile(module)` was given, or the module itself."""
    return getattr(module, "__dict__", {}).get("_modules", {}).get("_orig_mod", module)
