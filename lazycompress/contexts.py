"""The states of a lazy model: one for each image that is under way, told apart by name or by conditioning.

Guidance calls the model twice a step, with the prompt and without it: in one batch, or one call after the other. The second
kind needs a state for each. Rules, in this order:

1. Inside `cache_context(name)` the state is the one of that name.
2. Else it is the one whose conditioning is that of the call, for every sample.
3. Else it is one that some sample goes on with: same conditioning, timestep past the last one.
4. Else the call begins a new image, with a new state.

States take turns: one that is neither at the timestep of this call nor at the last timestep of the state that is called was
left behind (an interrupted run, guidance that ended), and its image is over. So nothing outlives its image, whatever the
order of calls.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LazyCompressError
from .gate import fingerprint, timestep_per_sample
from .gates import Gates
from .graph.call import Call
from .graph.insert import LazyGraph

#: More states than this are never in turn: guidance needs two or three.
MOST = 8


@dataclass
class State:
    """What one context keeps: timesteps [batch], fingerprints [batch, k], then one cache per branch stream."""

    kind: Hashable
    name: str | None
    number: int
    tensors: list[Tensor]

    @property
    def timesteps(self) -> Tensor:
        return self.tensors[0]

    @property
    def prints(self) -> Tensor:
        return self.tensors[1]


class States:
    """The states of one lazy model.

    Attributes:
        now: timesteps of the call that runs, or ran last, float32 [batch].
    """

    def __init__(self) -> None:
        self.now = torch.zeros(0)
        self._name: str | None = None
        self._last: State | None = None
        self._all: list[State] = []
        self._made = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def last(self) -> State:
        """The state of the last call.

        Raises:
            LazyCompressError: there was none.
        """
        if self._last is None:
            raise LazyCompressError("the lazy model has not been called since its last reset")
        return self._last

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Within the block, calls go on with the state of that name."""
        outer, self._name = self._name, name
        try:
            yield
        finally:
            self._name = outer

    def clear(self) -> None:
        self._last = None
        self._made = 0
        self._all.clear()

    def find(self, call: Call, graph: LazyGraph, gates: Gates, scope: Hashable = None) -> State:
        """The state to run a call with; what no longer takes turns with it is forgotten.

        States of other sizes, of another batch, of another graph or of another run of a sampler (its `scope`, where that is
        known) never fit.
        """
        latents = call.tensors[call.latents]
        kind = (call.shapes, id(graph), scope)
        timesteps = self.now = timestep_per_sample(call.tensors[graph.timestep], latents)
        prints = fingerprint(
            [call.tensors[i] for i in graph.conditions],
            latents,
            [call.tensors[i] for i, _ in graph.sized],
            [dim for _, dim in graph.sized],
        )
        direction = float(gates.direction)
        named = [state for state in self._all if state.name == self._name]
        fitting = [state for state in named if state.kind == kind]
        state: State | None = None
        if self._name is not None:
            state = next(iter(fitting), None)
            self._all = [other for other in self._all if other not in named or other is state]
        else:
            same = [(candidate.prints == prints).all(dim=1) for candidate in fitting]
            onward = [(c.timesteps - timesteps) * direction > 0 for c in fitting]
            whole = [i for i, rows in enumerate(same) if bool(rows.all())]
            going = [int((rows & on).sum()) for rows, on in zip(same, onward, strict=True)]
            if whole:
                state = fitting[whole[0]]
            elif going and max(going) > 0:
                state = fitting[going.index(max(going))]
        if state is None:
            state = State(
                kind, self._name, self._made, [spec.fresh(call.batch, latents.device) for spec in graph.state]
            )
            self._made += 1
        self._forget(state, timesteps, direction, gates.never)
        self._all = [state, *(other for other in self._all if other is not state)][:MOST]
        self._last = state
        return state

    def _forget(self, state: State, timesteps: Tensor, direction: float, never: float) -> None:
        before = state.timesteps
        onward = (before - timesteps) * direction > 0
        before = torch.where(onward, before, timesteps)
        kept = []
        for other in self._all:
            if other is state:
                kept.append(other)
                continue
            past = other.timesteps
            if past.shape != timesteps.shape:
                if bool(torch.isin(past, torch.cat([before, timesteps])).all()):
                    kept.append(other)
                continue
            in_turn = (past == timesteps) | (past == before)
            if not bool(in_turn.any()):
                continue
            if not bool(in_turn.all()):
                other.tensors[0] = torch.where(in_turn, past, torch.full_like(past, never))
            kept.append(other)
        self._all = kept
