"""Which arguments change from call to call of a sampling run: the timestep has to, and a condition must not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.call import take_apart
from ..runtime import LazyModel


class Changing:
    """Watches the calls of one sampling run, and says why none of them goes on from another.

    Args:
        lazy: whose calls they are.
    """

    def __init__(self, lazy: LazyModel) -> None:
        flat = lazy.program(lazy.example).flat
        self.lazy = lazy
        self.names = [leaf.name for leaf in lazy.example.leaves]
        self.timestep = self.names[flat.timestep]
        self.conditions = [self.names[i] for i in flat.conditions]
        self.moved: set[str] = set()
        self._first: dict[str, Tensor] = {}

    def see(self, args: Any, kwargs: Any) -> None:
        """One call's arguments."""
        call = take_apart(self.lazy.model, args, kwargs)
        now = {leaf.name: value.detach().clone() for leaf, value in zip(call.leaves, call.tensors, strict=True)}
        self._first = self._first or now
        self.moved |= {name for name, value in now.items() if not torch.equal(value, self._first.get(name, value))}

    def check(self, tapes: Sequence[Sequence[float]]) -> None:
        """Args:
            tapes: the timesteps of the run's calls, in their order, a list for each state that takes turns.

        Raises:
            InputError: there is one call only, or no call goes on from another.
        """
        times = [time for tape in tapes for time in tape]
        if any(before != now for tape in tapes for before, now in pairwise(tape)):
            return
        if not self.moved:
            raise InputError(
                f"the sampler calls the model once, at {self.timestep} {listed(times)}: there is no call to reuse"
            )
        moved = [name for name in self.conditions if name in self.moved]
        what = f"{self.timestep!r} is taken for the timestep, and was {listed(times)}"
        what += f"; {', '.join(moved)} changed, which begins a new image" if moved else ""
        raise InputError(
            f"none of the sampler's {len(times)} calls goes on from another: {what}. If the timestep is another of "
            f"{', '.join(self.names)}, name it with the recipe key timestep_input"
        )


def listed(times: Sequence[float]) -> str:
    """The first of some timesteps."""
    return ", ".join(f"{time:g}" for time in times[:6]) + (", ..." if len(times) > 6 else "")
