"""Budgets in other words than a share of the calls: how fast, in how many seconds, how close to the dense images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..sampling import Sampler
from .learn import Learned
from .runs import Denoise, play

#: Runs that are timed; the fastest counts.
TIMED = 2

#: Shares that are tried until the cheapest good enough one is found, at most.
TRIES = 5


@dataclass(frozen=True)
class Clocked:
    """How long one dense run takes, in seconds.

    Attributes:
        run: all of it: the sampler, and what it calls beside the model.
        calls: of it, in the calls of the model.
        images: that a run makes.
    """

    run: float
    calls: float
    images: int

    def share(self, seconds: float) -> float:
        """The share of the calls that may be computed, at most 1, for a run to take so long; 0 or less: none may."""
        return min(1.0, (seconds - (self.run - self.calls)) / self.calls)


def clock(denoise: Denoise, sampler: Sampler, seed: int = 0) -> Clocked:
    """Time dense runs of the sampler.

    Raises:
        InputError: the sampler never called the model.
    """
    found: list[Clocked] = []
    for _ in range(TIMED):
        inside = [0.0]

        def answer(call: int, args: tuple[Any, ...], kwargs: dict[str, Any], inside: list[float] = inside) -> Any:
            started = time.perf_counter()
            output = denoise(*args, **kwargs)
            inside[0] += time.perf_counter() - started
            return output

        started = time.perf_counter()
        final = play(sampler, denoise, answer, seed)
        found.append(Clocked(time.perf_counter() - started, inside[0], len(final)))
        if not inside[0]:
            raise InputError("the sampler returned without calling the model it was given")
    return min(found, key=lambda one: one.run)


def cheapest(
    first: Learned, learn: Callable[[float], Learned], good: Callable[[Learned], bool], least: float
) -> Learned | None:
    """The plan of the smallest share that is good enough, by true runs on held-out noise; None if no share below 1 is.

    Args:
        first: a plan, for any share.
        learn: learns a plan for a share of the calls.
        good: whether what was measured of a plan is good enough.
        least: share of the calls that always compute.
    """
    calls = len(first.plan.timesteps)
    low, high = max(1, round(least * calls)) - 1, calls  # `low` calls are too few, `high` are enough
    best = first if good(first) else None
    known = sum(first.plan.computes)
    low, high = (low, known) if best else (known, high)
    for _ in range(TRIES):
        if high - low < 2:
            break
        # Quality falls faster and faster towards few calls: the geometric mean is nearer to what is sought.
        middle = min(max(round(((low + 1) * high) ** 0.5), low + 1), high - 1)
        found = learn(middle / calls)
        if good(found):
            best, high = found, middle
        else:
            low = middle
    return best
