"""The states of a lazy model: one for each image that is under way, told apart by name, conditioning and latents.

Guidance calls the model twice a step, with the prompt and without it: in one batch, or one call after the other. The second
kind needs a state for each; so do requests that are served in turns, or in threads. Rules, in this order:

1. Only states of the call's own run of a sampler fit (where that is known), and inside `cache_context(name)` only those of that
   name.
2. The call goes on with the state whose conditioning is that of the call and whose last timestep it is past.
3. Where several are so, with the one whose last latents and outputs explain the call's latents; where none of them does, with
   none. And with none if those of its last call were explained, and these are not.
4. Where no state is so for the whole batch, each sample looks for one of its own, at any place of any batch: samples join,
   leave, and change places.
5. Else the call begins a new image: with a new state, or with one whose past explains its latents, as where samplers call the
   model twice at a timestep.

States take turns: one that is neither at the timestep of this call nor at the last timestep of the state that is called was
left behind (an interrupted run, guidance that ended, a request that is slower than others). Only a call whose latents it
explains goes on with it, and an image that has come to its end is forgotten. So nothing outlives its image, whatever the order
of calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .continuity import FEWEST, UNEXPLAINED, unexplained
from .eager import eager
from .errors import LazyCompressError
from .gate import fingerprint, same, timestep_per_sample, valid
from .gates import Gates
from .graph.call import Call
from .graph.insert import LazyGraph, StateSpec
from .scopes import Scope
from .state import State, joined

#: States that are kept at most: guidance needs two or three, and every request that is under way as many.
MOST = 32

#: Those of them that were left behind, and that were so after their first call: where conditioning moves, every call leaves one.
MOST_ASLEEP, MOST_BEGUN = 8, 4

#: Calls of others after which a state is forgotten.
PATIENCE = 64

_names: ContextVar[tuple[tuple[int, str], ...]] = ContextVar("lazycompress_names", default=())


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

    @eager
    def find(self, call: Call, graph: LazyGraph, gates: Gates, scope: Scope | None = None) -> State:
        """The state to run a call with.

        States of other sizes, of another graph or of another run of a sampler (its `scope`, where that is known) never fit.
        """
        latents = call.tensors[call.latents]
        name = next((name for owner, name in reversed(_names.get()) if owner == id(self)), None)
        kind = (name, call.sizes, id(graph))
        timesteps = self.now = timestep_per_sample(call.tensors[graph.timestep], latents)
        prints = fingerprint(
            [call.tensors[i] for i in graph.conditions],
            latents,
            [call.tensors[i] for i, _ in graph.sized],
            [dim for _, dim in graph.sized],
        )
        seen = _Seen(latents, timesteps, prints, gates, scope)
        fitting = [state for state in self._all if state.scope == scope and state.kind == kind]
        state = self._going_on(seen, [state for state in fitting if len(state) == len(latents)])
        if state is None or not bool(seen.onward(state).all()):
            state = self._row_by_row(seen, fitting, graph.state) or state
        if state is None:  # a second call at a timestep is one of the same image, whether its gates know of such or not
            alike = [s for s in fitting if len(s) == len(latents) and s.latents and bool(same(prints, s.prints).all())]
            state = self._explaining(alike, latents)
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

    def _going_on(self, seen: _Seen, states: Sequence[State]) -> State | None:
        """The state of the call's batch that most of its samples go on with, each in its place; None if none of them is clear."""
        onward = [int(seen.onward(state).sum()) for state in states]
        most = max(onward, default=0)
        found = [state for state, rows in zip(states, onward, strict=True) if rows == most > 0]
        if len(found) != 1 or found[0].asleep:
            return self._explaining(found, seen.latents)
        state = found[0]
        if not seen.doubtful:
            return state
        left = [self._left(state, seen.latents, row) for row in range(len(state))]
        if max(left) > UNEXPLAINED:
            return None
        state.followed = True
        return state

    def _row_by_row(self, seen: _Seen, states: Sequence[State], specs: Sequence[StateSpec]) -> State | None:
        """A state of what each sample goes on with, wherever that was; None if no sample goes on with anything."""
        pairs = [(row, state, there) for state in states if state.latents for row, there in seen.pairs(state)]
        left = [self._left(state, seen.latents, row, there) for row, state, there in pairs]
        best = dict.fromkeys(seen.rows, 1.0)
        for rest, (row, *_) in zip(left, pairs, strict=True):
            best[row] = min(best[row], rest)
        ranked = sorted(
            # Where several explain the latents as well, the place decides.
            (rest > 2 * best[row] + 1e-4, row != there, rest, k)
            for k, (rest, (row, _, there)) in enumerate(zip(left, pairs, strict=True))
            if rest <= UNEXPLAINED
        )
        taken: dict[int, tuple[State, int]] = {}
        for *_, k in ranked:
            row, state, there = pairs[k]
            if row not in taken and (state, there) not in taken.values():
                taken[row] = (state, there)
        explained = bool(taken)
        if not explained:  # samplers that add noise: as long as only one state may be meant, each keeps its place
            for row, state, there in pairs:
                alone = all(other is state for k, other, _ in pairs if k == row)
                if row == there and len(state) == len(seen.latents) and alone and not (state.asleep or state.followed):
                    taken[row] = (state, there)
        if not taken:
            return None
        sources = [taken.get(row) for row in seen.rows]
        one, never = next(iter(taken.values()))[0], seen.gates.never
        if len(one) != len(sources) or sources != [(one, row) for row in seen.rows]:
            one = joined(sources, specs, never)
            self._take(list(taken.values()), specs, never)
            one.number = self._free_number()
        one.followed = explained
        return one

    def _take(self, taken: Collection[tuple[State, int]], specs: Sequence[StateSpec], never: float) -> None:
        """Leave in states what was not taken from them."""
        for state in {id(state): state for state, _ in taken}.values():
            rest = [(state, row) for row in range(len(state)) if (state, row) not in taken]
            where = self._all.index(state)
            left = [joined(rest, specs, never)] if rest else []
            for one in left:
                one.asleep, one.idle = state.asleep, state.idle
            self._all[where : where + 1] = left

    def _free_number(self) -> int:
        taken = {state.number for state in self._all if not state.asleep}
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def _explaining(self, states: Sequence[State], latents: Tensor) -> State | None:
        """The state whose past explains the latents of a call best, sample by sample; None if none does."""
        left = [max(self._left(state, latents, row) for row in range(len(latents))) for state in states]
        best = min(left, default=1.0)
        return states[left.index(best)] if best <= UNEXPLAINED else None

    def _left(self, state: State, latents: Tensor, row: int, there: int | None = None) -> float:
        """What the past of a sample (`there`, or at the same place) leaves unexplained of latents, as a share of their norm."""
        there = row if there is None else there
        if not state.latents:
            return 1.0
        # Guidance makes the next latents of the outputs of all who had these.
        outputs = [
            output[k]
            for other in (state, *(s for s in self._all if s is not state and s.scope == state.scope))
            if other.latents
            for k in range(len(other))
            if (other is state and k == there) or state.sees(other, there, k)
            for output in other.outputs
        ]
        if latents[row].numel() < FEWEST * (1 + len(outputs)):  # they prove nothing
            return float(state.asleep)
        rest = float(unexplained(latents[row].detach(), state.latents[0][there], outputs))
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
                    other.asleep = not _take_turns(other, timesteps, before)
                if other.idle > PATIENCE or ((other.asleep or other.scope != scope) and _at_its_end(other, gates)):
                    continue
                asleep += other.asleep
                begun += other.asleep and other.calls < 2
                if other.asleep and (asleep > MOST_ASLEEP or (begun > MOST_BEGUN and other.calls < 2)):
                    continue
            kept.append(other)
        self._all = kept


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is seen of a call, and by which rules."""

    latents: Tensor
    timesteps: Tensor
    prints: Tensor
    gates: Gates
    scope: Scope | None

    @property
    def rows(self) -> range:
        return range(len(self.latents))

    @cached_property
    def twins(self) -> bool:
        """Whether samples differ in nothing but their latents."""
        size = len(self.prints)
        one, other = torch.tril_indices(size, size, -1)
        return bool((same(self.prints[one], self.prints[other]) & (self.timesteps[one] == self.timesteps[other])).any())

    @property
    def doubtful(self) -> bool:
        """Whether another image may be here than the timesteps and conditions of a state say."""
        return self.scope is None or (not self.scope.in_place and self.twins)

    def onward(self, state: State) -> Tensor:
        """Which samples may go on with that of their place in a state."""
        places = torch.arange(len(state))
        return self._valid(state, places, places)

    def pairs(self, state: State) -> list[tuple[int, int]]:
        """Rows of the call, and rows of a state that they may go on with."""
        size = len(state)
        rows, there = (
            torch.arange(len(self.latents)).repeat_interleave(size),
            torch.arange(size).repeat(len(self.latents)),
        )
        found = self._valid(state, rows, there).cpu()
        return list(zip(rows[found].tolist(), there[found].tolist(), strict=True))

    def _valid(self, state: State, rows: Tensor, there: Tensor) -> Tensor:
        timesteps, prints, times = (value[there.to(value.device)] for value in state.tensors[:3])
        rows = rows.to(self.prints.device)
        direction, phase = self.gates.direction, self.gates.phase
        return valid(self.timesteps[rows], timesteps, self.prints[rows], prints, times, direction, phase)


def _take_turns(state: State, now: Tensor, before: Tensor) -> bool:
    """Whether a state is at the timestep of a call, or at the last one of the state that is called."""
    past = state.at
    if past.shape != now.shape:
        return bool(torch.isin(past, torch.cat([before, now])).all())
    return bool(((past == now) | (past == before)).all())


def _at_its_end(state: State, gates: Gates) -> bool:
    """Whether all samples have had the last timestep of their run; or of those learned at, which the next would be past."""
    direction = float(gates.direction)
    seen = state.scope.seen_from(float(state.at.max())) if state.scope is not None else None
    last = seen[-1] if seen else float(gates.grid[0] if direction > 0 else gates.grid[-1])
    over = (state.at - last) * direction <= 0
    if seen is None:
        over = over | ((state.at + state.step - last) * direction < 0)
    return bool(over.all())
