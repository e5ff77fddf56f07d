"""Scopes: within one, calls belong to images that began in it, and their timesteps may be known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Scope:
    """The calls of one run of a sampler. Two scopes are never equal.

    Attributes:
        timesteps: those that the run will have, in its scheduler's unit, or None.
        in_place: whether each sample keeps its place in the batch.
    """

    timesteps: tuple[float, ...] | None = None
    in_place: bool = False


#: Finds the scope that a call of a module is made in, where nobody has opened one: the call of a pipeline, say.
Surroundings = Callable[[nn.Module], Scope | None]

_open: ContextVar[tuple[tuple[frozenset[int], Scope], ...]] = ContextVar("lazycompress_scopes", default=())


@contextmanager
def scope_of(modules: Sequence[nn.Module], timesteps: Sequence[float] | Tensor | None = None) -> Iterator[Scope]:
    """Within the block, calls of the modules in this thread or task belong to one run."""
    scope = Scope(tuple(float(t) for t in timesteps) if timesteps is not None else None)
    token = _open.set((*_open.get(), (frozenset(map(id, modules)), scope)))
    try:
        yield scope
    finally:
        _open.reset(token)


def opened(module: nn.Module) -> Scope | None:
    """The innermost scope that was opened for a module, or None."""
    for modules, scope in reversed(_open.get()):
        if id(module) in modules:
            return scope
    return None
