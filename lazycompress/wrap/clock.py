"""When the calls of an image were, and what the plan says of the next one."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .continuity import PRINT
from .symbols import Symbol, concat
from .timetable import Fitted, Timetable

#: A call is one of the plan's if it is this close to it, in calls of the plan.
_CLOSE = 0.1

#: Rounding of what adds up to one.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Columns:
    """The clock of each stream, or of one: float32 [batch, streams or 1, width].

    Attributes:
        timestep: of the last call, along the way.
        now: the same, but later where a timestep was named again.
        computed: how many of the image's calls computed.
        calls: how many there were.
        due: how much of a computed call has come near since the last one.
        age: calls since the stream was used.
        times: of the computed calls, the newest first, [.., depth].
        seen, before: prints of the latents of the last call and of that before it.
        conditions: prints and sizes, see `conditions`.
    """

    timestep: Symbol
    now: Symbol
    computed: Symbol
    calls: Symbol
    due: Symbol
    age: Symbol
    times: Symbol
    seen: Symbol
    before: Symbol
    conditions: Symbol

    @classmethod
    def widths(cls, depth: int, conditions: int) -> dict[str, int]:
        """The width of each column, in their order."""
        widths = {"times": depth, "seen": PRINT, "before": PRINT, "conditions": conditions}
        return {field.name: widths.get(field.name, 1) for field in fields(cls)}

    @classmethod
    def of(cls, clock: Symbol, depth: int, conditions: int) -> Columns:
        """A clock taken apart."""
        found, at = {}, 0
        for name, width in cls.widths(depth, conditions).items():
            found[name] = clock.take(range(at, at + width), axis=2)
            at += width
        return cls(**found)

    def joined(self) -> Symbol:
        """The columns put together."""
        return concat([getattr(self, field.name) for field in fields(self)], axis=2)

    def chosen(self, mask: Symbol) -> Columns:
        """Those of one stream for each sample, [batch, 1, width], or zeros; mask: bool [batch, streams, 1]."""
        return Columns(**{f.name: mask.where(getattr(self, f.name), 0.0).sum(1, keep=True) for f in fields(self)})


@dataclass(frozen=True)
class _Place:
    """How many of the plan's calls, and how many computed ones, have passed by a time; [batch, 1, 1]."""

    calls: Symbol
    computed: Symbol


def planned(table: Timetable, stream: Columns, now: Symbol) -> tuple[Symbol, Symbol]:
    """How much of a computed call is due, and whether this call has to compute; [batch, 1, 1].

    A call that follows the one before as in the plan is decided as there. Any other brings the next computed call nearer by
    the plan's share of computed calls between the two.
    """
    before, at = _place(table, stream.now), _place(table, now)
    passed = at.calls - before.calls
    share = (passed > _ROUNDING).where((at.computed - before.computed) / passed, table.share)
    due = stream.due + share
    near = _near(table, at)
    listed = near.any(2, keep=True) & ((passed + -1.0).abs() <= _CLOSE)
    computes = (near & near.like(table.computes.reshape(1, 1, -1))).any(2, keep=True)
    return due, (listed & computes) | (~listed & (due >= 1.0 - _ROUNDING))


def gap(table: Timetable, time: Symbol) -> Symbol:
    """How much later a call is that names the timestep of the last one again, [batch, 1, 1].

    As much as in the plan, and as little as anywhere in it where that has no such call.
    """
    near = _near(table, _place(table, time))
    found = near.where(table.again.reshape(1, 1, -1), 0.0).sum(2, keep=True)
    return near.any(2, keep=True).where(found, float(table.again.min()))


def weights(table: Timetable, stream: Columns, now: Symbol, count: int) -> list[tuple[Symbol, Symbol]]:
    """For each of the newest `count` outputs, whether the image has it, and its weight in the forecast; [batch].

    The plan's own weight, where the call and the outputs are those of the plan; else that in the polynomial, in Lagrange's form,
    as `plan.lagrange`.
    """
    times = [stream.times.take(k, axis=2).reshape([-1]) for k in range(count)]
    known = [(stream.computed > k + 0.5).reshape([-1]) for k in range(count)]
    at, found = now.reshape([-1]), []
    for i, own in enumerate(times):
        weight = known[i].where(1.0, 0.0)
        for j, other in enumerate(times):
            if i != j:
                both = known[i] & known[j]
                weight = weight * both.where((at - other) / both.where(own - other, 1.0), 1.0)
        found.append((known[i], weight))
    return _fitted(table.fitted, stream, now, found) if len(table.fitted.times) else found


def _fitted(
    fitted: Fitted, stream: Columns, now: Symbol, found: list[tuple[Symbol, Symbol]]
) -> list[tuple[Symbol, Symbol]]:
    """With the plan's weights where they fit."""
    here = (now + -fitted.times.reshape(1, 1, -1)).abs() <= fitted.close
    for k in range(fitted.points.shape[1]):
        points = fitted.points[:, k].reshape(1, 1, -1)
        lacks = np.isnan(points)
        known = stream.computed > k + 0.5
        there = (stream.times.take([k], axis=2) + -np.where(lacks, 0.0, points)).abs() <= fitted.close
        here = here & ((known & there & known.like(~lacks)) | (~known & known.like(lacks)))
    any_fits = here.any(2).reshape([-1])
    own = [
        here.where(fitted.weights[:, k].reshape(1, 1, -1), 0.0).sum(2).reshape([-1])
        for k in range(fitted.weights.shape[1])
    ]
    return [(known, any_fits.where(mine, weight)) for mine, (known, weight) in zip(own, found, strict=True)]


def _place(table: Timetable, time: Symbol) -> _Place:
    """Linear between the plan's calls."""
    times = table.times
    if len(times) < 2:
        nowhere = time.equals(time).where(0.0, 0.0)
        return _Place(nowhere, nowhere)
    begins, gaps = times[:-1].reshape(1, 1, -1), np.diff(times).reshape(1, 1, -1)
    passed = ((time + -begins) * (1 / gaps)).clip(0.0, 1.0)
    return _Place(passed.sum(2, keep=True), (passed * table.density[:-1].reshape(1, 1, -1)).sum(2, keep=True))


def _near(table: Timetable, place: _Place) -> Symbol:
    """Which of the plan's calls a place is at, [batch, 1, calls]."""
    return (place.calls + -np.arange(len(table.times), dtype=np.float32).reshape(1, 1, -1)).abs() <= _CLOSE
