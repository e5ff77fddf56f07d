"""The states of a lazy model: one for each image that is under way, told apart by name, conditioning and latents.

Guidance calls the model twice a step, with the prompt and without it: in one batch, or one call after the other. The second
kind needs a state for each; so do requests that are served in turns, or in threads. Rules, in this order:

1. Only states of the call's own run of a sampler fit (where that is known), and inside `cache_context(name)` only those of that
   name.
2. The call goes on with the state whose conditioning is that of the call and whose last timestep it is past: for every sample,
   or for as many samples as there is one for.
3. Where several are so, with the one whose last latents and outputs explain the call's latents; where none of them does, with
   none.
4. Else the call begins a new image: with a new state, or with one whose past explains its latents, as where samplers call the
   model twice at a timestep.

States take turns: one that is neither at the timestep of this call nor at the last timestep of the state that is called was
left behind (an interrupted run, guidance that ended, a request that is slower than others). Only a call whose latents it
explains goes on with it, and an image that has come to its end is forgotten. So nothing outlives its image, whatever the order
of calls.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .continuity import EQUAL, FEWEST, UNEXPLAINED, unexplained
from .errors import LazyCompressError
from .gate import fingerprint, timestep_per_sample, valid
from .gates import Gates
from .graph.call import Call
from .graph.insert import LazyGraph
from .scopes import Scope

#: States that are kept at most: guidance needs two or three, and every request that is under way as many.
MOST = 32

#: Those of them that were left behind, and that were so after their first call: where conditioning moves, every call leaves one.
MOST_ASLEEP, MOST_BEGUN = 8, 4

#: Calls of others after which a state is forgotten.
PATIENCE = 64

#: Outputs that are kept: multistep samplers make the next latents of as many.
_OUTPUTS = 3

_names: ContextVar[tuple[tuple[int, str], ...]] = ContextVar("lazycompress_names", default=())


@dataclass(eq=False)
class State:
    """What one context keeps.

    Attributes:
        scope: the run of a sampler that its calls belong to, or None.
        kind: sizes, graph and name of its calls.
        number: its place among those that take turns.
        tensors: timesteps [batch], fingerprints [batch, k], past times, then one cache per branch stream.
        at: timesteps of its last call, that one included which runs now.
        step: from the timesteps of the call before to these; zeros in the first.
        latents, outputs: of its last calls, copies, the newest first, two and three at most; empty before the first.
        calls: that have gone on with it, the first included.
        idle: calls of other states since.
        asleep: whether it was left behind.
    """

    scope: Scope | None
    kind: Hashable
    number: int
    tensors: list[Tensor]
    at: Tensor
    step: Tensor
    latents: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    calls: int = 0
    idle: int = 0
    asleep: bool = False

    @property
    def timesteps(self) -> Tensor:
        return self.tensors[0]

    @property
    def prints(self) -> Tensor:
        return self.tensors[1]

    def keep(self, latents: Tensor, outputs: Sequence[Tensor], tensors: list[Tensor]) -> None:
        """What a call has left: its latents, the model's outputs, and the state for the next."""
        alike = [o.detach().clone() for o in outputs if o.dim() == latents.dim() and o.is_floating_point()]
        self.tensors = tensors
        self.latents = [latents.detach().clone(), *self.latents[:1]]
        self.outputs = [*alike[:1], *self.outputs][:_OUTPUTS]

    def sees(self, other: State, row: int, other_row: int) -> bool:
        """Whether a sample had the latents of its last call in common with one of another state: guidance.

        The other may be a call ahead.
        """
        mine = self.latents[0][row].float()
        return any(
            mine.shape == theirs[other_row].shape
            and mine.device == theirs.device
            and bool((mine - theirs[other_row]).norm() <= EQUAL * mine.norm())
            for theirs in other.latents
        )


class States:
    """The states of one lazy model. Not locked: its owner is.

    Attributes:
        now: timesteps of the call that runs, or ran last, float32 [batch].
    """

    def __init__(self) -> None:
        self.now = torch.zeros(0)
        self._last: State | None = None
        self._all: list[State] = []

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
        """Within the block, calls of this thread or task go on with states of that name."""
        token = _names.set((*_names.get(), (id(self), name)))
        try:
            yield
        finally:
            _names.reset(token)

    def clear(self) -> None:
        self._last = None
        self._all.clear()

    def drop(self, state: State) -> None:
        """Forget the state of a call that did not come about."""
        self._all = [other for other in self._all if other is not state]

    def end(self, scope: Scope) -> None:
        """The images of a run are over."""
        self._all = [state for state in self._all if state.scope != scope]

    def find(self, call: Call, graph: LazyGraph, gates: Gates, scope: Scope | None = None) -> State:
        """The state to run a call with.

        States of other sizes, of another batch, of another graph or of another run of a sampler (its `scope`, where that is
        known) never fit.
        """
        latents = call.tensors[call.latents]
        name = next((name for owner, name in reversed(_names.get()) if owner == id(self)), None)
        kind = (name, call.shapes, id(graph))
        timesteps = self.now = timestep_per_sample(call.tensors[graph.timestep], latents)
        prints = fingerprint(
            [call.tensors[i] for i in graph.conditions],
            latents,
            [call.tensors[i] for i, _ in graph.sized],
            [dim for _, dim in graph.sized],
        )
        fitting = [state for state in self._all if state.scope == scope and state.kind == kind]
        onward = [
            int(valid(timesteps, past, prints, past_prints, past_times, gates.direction, gates.phase).sum())
            for past, past_prints, past_times in (state.tensors[:3] for state in fitting)
        ]
        most = max(onward, default=0)
        found = [state for state, rows in zip(fitting, onward, strict=True) if rows == most > 0]
        alone = len(found) == 1 and not found[0].asleep
        state = found[0] if alone else self._explaining(found, latents)
        if state is None:  # a second call at a timestep is one of the same image, whether its gates know of such or not
            state = self._explaining([s for s in fitting if s.latents and torch.equal(s.prints, prints)], latents)
        self._leave_behind(scope, state, timesteps, gates)
        if state is None:
            fresh = [spec.fresh(call.batch, latents.device) for spec in graph.state]
            state = State(scope, kind, self._free_number(), fresh, timesteps, torch.zeros_like(timesteps))
        elif state.asleep:
            state.asleep, state.number = False, self._free_number()
        state.step, state.at, state.idle = timesteps - state.at, timesteps, 0
        state.calls += 1
        self._all = [state, *(other for other in self._all if other is not state)][:MOST]
        self._last = state
        return state

    def _free_number(self) -> int:
        taken = {state.number for state in self._all if not state.asleep}
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def _explaining(self, states: Sequence[State], latents: Tensor) -> State | None:
        """The state whose past explains the latents of a call best, sample by sample; None if none does."""
        left = [max(self._left(state, latents, row) for row in range(len(latents))) for state in states]
        best = min(left, default=1.0)
        return states[left.index(best)] if best <= UNEXPLAINED else None

    def _left(self, state: State, latents: Tensor, row: int) -> float:
        """What the past of a sample leaves unexplained of latents, as a share of their norm."""
        if not state.latents:
            return 1.0
        # Guidance makes the next latents of the outputs of all who had these.
        outputs = [
            output[k]
            for other in (state, *(s for s in self._all if s is not state and s.scope == state.scope))
            if other.latents
            for k in range(len(other.latents[0]))
            if (other is state and k == row) or state.sees(other, row, k)
            for output in other.outputs
        ]
        if latents[row].numel() < FEWEST * (1 + len(outputs)):  # they prove nothing
            return float(state.asleep)
        rest = float(unexplained(latents[row].detach(), state.latents[0][row], outputs))
        return rest if rest == rest else 1.0

    def _leave_behind(self, scope: Scope | None, state: State | None, timesteps: Tensor, gates: Gates) -> None:
        """Put to sleep what does not take turns with the call of a state, and forget what is over."""
        before = timesteps
        if state is not None:
            before = torch.where((state.at - timesteps) * gates.direction > 0, state.at, timesteps)
        kept, asleep, begun = [], 0, 0
        for other in self._all:
            if other is not state:
                other.idle += 1
                if other.scope == scope and not other.asleep:
                    other.asleep = not _take_turns(other, timesteps, before, gates)
                if other.idle > PATIENCE or ((other.asleep or other.scope != scope) and _at_its_end(other, gates)):
                    continue
                asleep += other.asleep
                begun += other.asleep and other.calls < 2
                if other.asleep and (asleep > MOST_ASLEEP or (begun > MOST_BEGUN and other.calls < 2)):
                    continue
            kept.append(other)
        self._all = kept


def _take_turns(state: State, now: Tensor, before: Tensor, gates: Gates) -> bool:
    """Whether a state is at the timestep of a call, or at the last one of the state that is called."""
    past = state.at
    if past.shape != now.shape:
        return bool(torch.isin(past, torch.cat([before, now])).all())
    in_turn = (past == now) | (past == before)
    if not bool(in_turn.any()):
        return False
    if not bool(in_turn.all()):  # samples at timesteps of their own: those that were left behind are over
        state.tensors[0] = torch.where(in_turn, state.timesteps, torch.full_like(past, gates.never))
    return True


def _at_its_end(state: State, gates: Gates) -> bool:
    """Whether all samples have had the last timestep of their run; or of those learned at, which the next would be past."""
    direction = float(gates.direction)
    seen = state.scope.seen_from(float(state.at.max())) if state.scope is not None else None
    last = seen[-1] if seen else float(gates.grid[0] if direction > 0 else gates.grid[-1])
    over = (state.at - last) * direction <= 0
    if seen is None:
        over = over | ((state.at + state.step - last) * direction < 0)
    return bool(over.all())
