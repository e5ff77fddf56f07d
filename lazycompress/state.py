"""What a lazy graph keeps from call to call: of all samples of a batch, and of some of them anew."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .continuity import EQUAL
from .gate import fingerprint
from .graph.insert import StateSpec
from .scopes import Scope

#: Outputs that are kept: multistep samplers make the next latents of as many.
_OUTPUTS = 3


@dataclass(eq=False)
class State:
    """What one context keeps.

    Attributes:
        scope: the run of a sampler that its calls belong to, or None.
        kind: sizes but for the batch, graph and name of its calls.
        number: its place among those that take turns.
        tensors: timesteps [batch], fingerprints [batch, k], past times, then one cache per branch stream.
        at: timesteps of its last call, that one included which runs now.
        step: from the timesteps of the call before to these; zeros in the first.
        latents, outputs: of its last calls, copies, the newest first, two and three at most; empty before the first.
        calls: that have gone on with it, the first included.
        idle: calls of other states since.
        asleep: whether it was left behind.
        followed: whether the latents of its last call were explained by what was before.
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
    followed: bool = False
    _prints: list[list[list[float]]] | None = None

    def __len__(self) -> int:
        """How many samples it is of."""
        return len(self.at)

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
        self._prints = None

    def begin_anew(self, rows: Sequence[int], never: float) -> None:
        """Let some samples go on with nothing."""
        if not rows:
            return
        which = torch.tensor(rows, device=self.timesteps.device)
        self.tensors = [self.timesteps.index_fill(0, which, never), *self.tensors[1:]]
        self.step = self.step.index_fill(0, which.to(self.step.device), 0.0)
        self.latents = [value.index_fill(0, which.to(value.device), 0.0) for value in self.latents]
        self.outputs = [value.index_fill(0, which.to(value.device), 0.0) for value in self.outputs]
        self._prints = None

    def sees(self, other: State, row: int, other_row: int) -> bool:
        """Whether a sample had the latents of its last call in common with one of another state: guidance.

        The other may be a call ahead.
        """
        mine = self._seen()[0][row]
        return any(_alike(mine, theirs[other_row]) for theirs in other._seen())

    def _seen(self) -> list[list[list[float]]]:
        """By what the latents of each call and row are known again; read when first asked for."""
        if self._prints is None:
            self._prints = [fingerprint([latents], latents).tolist() for latents in self.latents]
        return self._prints


def joined(sources: Sequence[tuple[State, int] | None], specs: Sequence[StateSpec], never: float) -> State:
    """A state of samples from states of the same kind; None: of a sample that goes on with nothing. At least one is of some."""
    first = next(source for source in sources if source is not None)
    known = [source or first for source in sources]
    tensors = [torch.cat([_rows(state.tensors[k], row, spec) for state, row in known]) for k, spec in enumerate(specs)]
    state = State(
        first[0].scope,
        first[0].kind,
        first[0].number,
        tensors,
        torch.stack([state.at[row] for state, row in known]),
        torch.stack([state.step[row] for state, row in known]),
        _histories([(state.latents, row) for state, row in known]),
        _histories([(state.outputs, row) for state, row in known]),
        max(state.calls for state, _ in known),
        followed=all(state.followed for state, _ in known),
    )
    state.begin_anew([row for row, source in enumerate(sources) if source is None], never)
    return state


def _rows(tensor: Tensor, row: int, spec: StateSpec) -> Tensor:
    return tensor[row * spec.scale : (row + 1) * spec.scale]


def _histories(pasts: Sequence[tuple[list[Tensor], int]]) -> list[Tensor]:
    """Rows of what was kept of several calls: as many calls as all have."""
    depth = min(len(past) for past, _ in pasts)
    return [torch.stack([past[k][row] for past, row in pasts]) for k in range(depth)]


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether prints are of the same values. NaN is the same as nothing."""
    return all(abs(a - b) <= EQUAL * one[0] for a, b in zip(one, other, strict=True))
