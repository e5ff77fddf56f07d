"""Which image does a call go on with? Answered for each sample of the call; see `Images.find`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..continuity import EQUAL, UNEXPLAINED, unexplained
from ..scopes import Scope
from .calls import Call
from .follow import Pace
from .outputs import Form
from .prints import Print, Sight

#: At its own place of the batch, a sample that leaves no more than this is the one: no other is looked at.
SURE = 0.01

#: Samples that are kept at most, or so many batches; the longest unused ones go first.
MOST, MOST_BATCHES = 64, 4


@dataclass
class Record:
    """What one computed call gave one sample, and when."""

    time: float
    tensors: list[Tensor]


@dataclass
class Sample:
    """One sample of one image that is under way.

    Attributes:
        kind: sizes, dtypes and constants of its calls.
        scope: the scope that it was begun in, or None.
        row, batch: its place in its last call.
        timestep: of its last call.
        prints: of its latents, the newest first, two at most.
        conditions: prints of what it is conditioned on, by path.
        latents: of its last call; a copy.
        begun: the call that began it; two calls of guidance begin two samples with the same latents.
        records: its last computed outputs, the newest last.
        form: of its outputs.
    """

    kind: Hashable
    scope: Hashable
    row: int
    batch: int
    timestep: float
    prints: list[Print]
    conditions: Mapping[str, tuple[Hashable, Print]]
    latents: Tensor
    pace: Pace
    begun: object = None
    records: list[Record] = field(default_factory=list)
    form: Form | None = None

    def shares_latents(self, other: Sample) -> bool:
        """Whether both had the same latents at this sample's last call: they are two calls of guidance."""
        return any(p.same(self.prints[0], EQUAL) for p in other.prints)


class Images:
    """The samples that are under way in one module. Not locked: its owner is."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self._samples)

    def clear(self) -> None:
        self._samples.clear()

    def forget(self, samples: Sequence[Sample]) -> None:
        gone = {id(sample) for sample in samples}
        self._samples = [sample for sample in self._samples if id(sample) not in gone]

    def end(self, scope: Hashable) -> None:
        """The images of a scope are over."""
        self._samples = [sample for sample in self._samples if sample.scope != scope]

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        del self._samples[: -max(MOST, MOST_BATCHES * sample.batch)]

    def calls_before(self, scope: Scope | None, timestep: float, latents: Print) -> int:
        """How many calls have begun images of these very latents: the stream of another one that begins with them."""
        return len(
            {
                id(sample.begun)
                for sample in self._samples
                if sample.scope == scope and sample.timestep == timestep and sample.prints[0].same(latents, EQUAL)
            }
        )

    def find(
        self, kinds: Sequence[Hashable], call: Call, sight: Sight, scope: Scope | None, direction: float
    ) -> list[Sample | None]:
        """The sample that each row of a call goes on with, or None where it begins a new image.

        1. Sizes, dtypes, constants, scope and conditions are the same.
        2. The timestep is past the sample's last one; or it is the same, and the latents are not; or both are the same, inside a
           scope, and the plan has the timestep twice.
        3. Inside a scope: the one at the same place of a batch of the same size, if there is one such. Where samples may change
           places, it must also be the only one anywhere, and go on with nothing else.
        4. Else its last latents and outputs, and those of samples that shared its latents, explain these latents: they are in
           their span but for `UNEXPLAINED` of their norm, as any ODE sampler's are. Where several do so, the best one.

        Whatever is not finite goes on with nothing.
        """
        rows = range(call.batch)
        taken: dict[int, Sample] = {}
        if scope is None:
            taken = self._in_place(kinds, call, sight, direction)
            gone = {id(sample) for sample in taken.values()}
            free = [sample for sample in self._samples if id(sample) not in gone]
        else:
            free = self._samples
            if scope.in_place:
                taken = self._at_their_places(kinds, call, sight, scope, direction)
        if len(taken) == call.batch:
            return [taken[row] for row in rows]
        fitting = [
            [] if row in taken else [s for s in free if self._fits(s, kinds[row], row, sight, scope, direction)]
            for row in rows
        ]
        if scope is not None and not scope.in_place:
            for row in rows:
                here = fitting[row]
                if len(here) != 1 or not _at(here[0], row, call.batch) or here[0].timestep == sight.times[row]:
                    continue
                if not any(s is here[0] for k in rows if k != row for s in fitting[k]):
                    taken[row] = here[0]
        pairs = [(row, sample) for row in rows if row not in taken for sample in fitting[row]]
        left = self._unexplained(call, pairs)
        best: dict[int, float] = {}
        for residual, (row, _) in zip(left, pairs, strict=True):
            best[row] = min(residual, best.get(row, residual))
        ranked = sorted(
            # Where several explain the latents as well, as states of one and the same trajectory do, the place and the nearest
            # timestep decide.
            (residual > 2 * best[row] + 1e-4, sample.row != row, abs(sample.timestep - sight.times[row]), residual, k)
            for k, (residual, (row, sample)) in enumerate(zip(left, pairs, strict=True))
            if residual <= UNEXPLAINED
        )
        gone = {id(sample) for sample in taken.values()}
        for *_, k in ranked:
            row, sample = pairs[k]
            if row not in taken and id(sample) not in gone:
                taken[row] = sample
                gone.add(id(sample))
        return [taken.get(row) for row in rows]

    def _at_their_places(
        self, kinds: Sequence[Hashable], call: Call, sight: Sight, scope: Scope, direction: float
    ) -> dict[int, Sample]:
        """Samples that go on by rule 3 where none may change places, by row: each is looked for at its own place only."""
        places: dict[int, list[Sample]] = {}
        for sample in self._samples:
            if sample.scope is scope and sample.batch == call.batch:
                places.setdefault(sample.row, []).append(sample)
        found: dict[int, Sample] = {}
        for row in range(call.batch):
            here = [s for s in places.get(row, []) if self._fits(s, kinds[row], row, sight, scope, direction)]
            if len(here) == 1 and here[0].timestep != sight.times[row]:
                found[row] = here[0]
        return found

    def _in_place(self, kinds: Sequence[Hashable], call: Call, sight: Sight, direction: float) -> dict[int, Sample]:
        """Samples that go on at their place, by row: outside of scopes, what most calls are. Large batches need no search."""
        places: dict[int, list[Sample]] = {}
        for sample in self._samples:
            if sample.batch == call.batch:
                places.setdefault(sample.row, []).append(sample)
        pairs = [
            (row, sample)
            for row in range(call.batch)
            for sample in places.get(row, [])
            if self._fits(sample, kinds[row], row, sight, None, direction)
        ]
        found: dict[int, tuple[float, float, Sample]] = {}
        for residual, (row, sample) in zip(self._unexplained(call, pairs), pairs, strict=True):
            gap = abs(sample.timestep - sight.times[row])
            rank = (round(residual / SURE, 1), gap)
            if residual <= SURE and (row not in found or rank < found[row][:2]):
                found[row] = (*rank, sample)
        return {row: sample for row, (*_, sample) in found.items()}

    def _fits(
        self, sample: Sample, kind: Hashable, row: int, sight: Sight, scope: Scope | None, direction: float
    ) -> bool:
        """Rules 1 and 2."""
        seen, time = sight.latents[row], sight.times[row]
        if not seen.finite or sample.kind != kind or sample.scope != scope or not sample.records:
            return False
        passed = (sample.timestep - time) * direction
        twice = not sample.prints[0].same(seen, EQUAL) or (scope is not None and sample.pace.expects(time))
        if not (passed > 0 or (passed == 0 and twice)):
            return False
        return _same(sample.conditions, sight.conditions[row])

    def _unexplained(self, call: Call, pairs: Sequence[tuple[int, Sample]]) -> list[float]:
        """Share of the norm of a row's latents that a sample's past leaves unexplained, for each pair; one transfer."""
        if not pairs:
            return []
        outputs = {id(sample): self._outputs(sample) for sample in {id(sample): sample for _, sample in pairs}.values()}
        left = [unexplained(call.latents[row].detach(), sample.latents, outputs[id(sample)]) for row, sample in pairs]
        return [value if value == value else 1.0 for value in torch.stack(left).tolist()]

    def _outputs(self, sample: Sample) -> list[Tensor]:
        """Computed outputs of a sample and of those that shared its latents, its own and the newest first."""
        partners = [
            s for s in self._samples if s is not sample and s.scope == sample.scope and sample.shares_latents(s)
        ]
        return [record.tensors[0] for past in (sample, *partners) for record in reversed(past.records)]


def _at(sample: Sample, row: int, batch: int) -> bool:
    return (sample.row, sample.batch) == (row, batch)


def _same(before: Mapping[str, tuple[Hashable, Print]], now: Mapping[str, tuple[Hashable, Print]]) -> bool:
    return before.keys() == now.keys() and all(
        kind == now[path][0] and seen.same(now[path][1]) for path, (kind, seen) in before.items()
    )
