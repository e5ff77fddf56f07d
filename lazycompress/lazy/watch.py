"""One dense run, watched: which timesteps a model is called at, what moves from call to call, and the first call itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .calls import Call, Reader
from .images import EQUAL
from .prints import Eye, Print


@dataclass
class Watch:
    """What is learned of a run while it goes on. Call it in the place of the model.

    Attributes:
        inner: calls the model itself.
        reader: reads the calls; after the run it knows what moves.
        timesteps: of the calls of one image, in their order.
        example: arguments of the first call.
        streams: calls at the first timestep: more than one is guidance in calls that take turns.
    """

    inner: Callable[..., Any]
    reader: Reader
    timesteps: list[float] = field(default_factory=list)
    example: tuple[Sequence[Any], dict[str, Any]] | None = None
    streams: int = 0
    _before: list[Call] = field(default_factory=list)
    _now: list[Call] = field(default_factory=list)
    _latents: list[Print] = field(default_factory=list)
    _eye: Eye = field(default_factory=Eye)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.reader.read(args, kwargs)
        if self.example is None:
            self.example = tuple(args), dict(kwargs)
        with torch.no_grad():
            sight = self._eye.look(call, [])
            time, latents = max(sight.times), sight.latents[0]
            if not self.timesteps or time != self.timesteps[-1]:
                self._before, self._now, self._latents = self._now, [], []
            if len(self.timesteps) - len(self._latents) == 0:
                self.streams += 1
            # Calls at one timestep are one stream's if their latents differ: a second-order sampler's, not guidance's.
            if not any(latents.same(other, EQUAL) for other in self._latents):
                self._latents.append(latents)
                self.timesteps.append(time)
            self._compare(call)
            self._now.append(replace(call, inputs=tuple(replace(i, tensor=_copy(i.tensor)) for i in call.inputs)))
        return self.inner(*args, **kwargs)

    def done(self, model: str) -> None:
        """After the run.

        Raises:
            InputError: the model was not called.
        """
        if not self.timesteps:
            raise InputError(f"the sampler returned without calling {model}")

    def _compare(self, call: Call) -> None:
        """Learn from the most similar call of the last timestep what moved since."""
        found = [self.reader.comparing(before, call) for before in self._before if before.batch == call.batch]
        if found:
            self.reader = min(found, key=lambda reader: len(reader.moving))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
