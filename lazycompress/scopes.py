"""Scopes: within one, calls belong to images that began in it, and their timesteps may be known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn

#: A call is at a timestep if it differs by less than this share of the largest: bfloat16 rounds that much.
CLOSE = 0.005


@dataclass(frozen=True, eq=False)
class Scope:
    """The calls of one run of a sampler. Two scopes are never equal.

    Attributes:
        timesteps: those that the run will have, in its scheduler's unit, or None.
        in_place: whether each sample keeps its place in the batch.
    """

    timesteps: tuple[float, ...] | None = None
    in_place: bool = False

    def seen_from(self, first: float) -> tuple[float, ...] | None:
        """What a model sees of these timesteps from the call at `first` on; None if it sees other numbers, or none are known.

        Pipelines give them as they are, or a thousandth of them; image-to-image begins in their midst.
        """
        told = self.timesteps or ()
        for unit in (1.0, 1e-3):
            near = [k for k, t in enumerate(told) if abs(unit * t - first) <= CLOSE * unit * max(map(abs, told))]
            if near:
                start = min(near, key=lambda k: (abs(unit * told[k] - first), k))
                return tuple(unit * t for t in told[start:])
        return None


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
