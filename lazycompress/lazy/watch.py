"""One dense run, watched: which timesteps a model is called at, what moves from call to call, and the first call itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..continuity import EQUAL
from ..plan.record import Reading
from ..sampling import NotCalledError
from .calls import Call, Reader
from .prints import Eye, Print


class Turns:
    """Tells the calls of guidance, which take turns at one timestep, from those of a sampler that calls twice at it.

    The first have the same latents, and so are of different streams; the second have others, and are of the same streams.
    """

    def __init__(self) -> None:
        self._eye = Eye()
        self._time: float | None = None
        self._latents: list[Print] = []
        self._stream = 0
        self._last: tuple[Any, ...] = ()
        self._constants: tuple[Any, ...] = ()

    def see(self, call: Call) -> Reading:
        """The timestep of the next call, and its stream: the how manieth it is with its latents. Asked again, the same."""
        values = (call.latents, call.timesteps, *(item.tensor for item in call.inputs))
        same = len(values) == len(self._last) and all(a is b for a, b in zip(values, self._last, strict=True))
        if self._time is not None and same and call.constants == self._constants:
            return Reading(self._time, self._stream)
        self._last, self._constants = values, call.constants
        sight = self._eye.look(call, [])
        time, latents = max(sight.times), sight.latents[0]
        if time != self._time:
            self._latents.clear()
        if self._latents and latents.same(self._latents[-1], EQUAL):
            self._stream += 1
        else:
            self._stream = 0
        self._time = time
        self._latents.append(latents)
        return Reading(time, self._stream)


class Watch:
    """What is learned of a run while it goes on. Call it in the place of the model.

    Attributes:
        inner: calls the model itself.
        reader: reads the calls; after the run it knows what moves.
        calls: timestep and stream of each.
        batches: sizes that they had.
        example: arguments of the first call.
    """

    def __init__(self, inner: Callable[..., Any], reader: Reader) -> None:
        self.inner, self.reader = inner, reader
        self.calls: list[Reading] = []
        self.example: tuple[Sequence[Any], dict[str, Any]] | None = None
        self.batches: set[int] = set()
        self._turns = Turns()
        self._before: list[Call] = []
        self._now: list[Call] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._see(args, kwargs)
        return self.inner(*args, **kwargs)

    @property
    def streams(self) -> int:
        """Calls with the same latents: more than one is guidance in calls that take turns."""
        return 1 + max(reading.stream for reading in self.calls)

    def done(self) -> None:
        """After the run.

        Raises:
            NotCalledError: the model was not called.
        """
        if not self.calls:
            raise NotCalledError("the sampler returned without calling the model it was given")

    def _see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = self.reader.read(args, kwargs)
        if self.example is None:
            self.example = args, dict(kwargs)
        self.batches.add(call.batch)
        with torch.no_grad():
            reading = self._turns.see(call)
            if self.calls and reading.timestep != self.calls[-1].timestep:
                self._before, self._now = self._now, []
            self.calls.append(reading)
            self._compare(call)
            copies = tuple(replace(item, tensor=item.tensor.detach().clone()) for item in call.inputs)
            self._now.append(replace(call, inputs=copies))

    def _compare(self, call: Call) -> None:
        """Learn from the most similar call of the last timestep what moved since."""
        found = [self.reader.comparing(before, call) for before in self._before if before.batch == call.batch]
        if found:
            self.reader = min(found, key=lambda reader: len(reader.moving))
