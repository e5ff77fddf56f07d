"""The graph around a denoiser: which image a call belongs to, whether it computes, and what it gives otherwise.

Written once for all formats, in `symbols`. For each sample there are a few *streams*: images, or passes of guidance, that
take turns. A stream is a row of three states:

- clock [batch, streams, columns], see `Columns`: when the stream's calls were, and prints of what it is conditioned on;
- latents [batch, streams, values] of its last call;
- outputs [batch, streams, order + 1, ...]: the last computed ones, the newest first; one state for each output.

A state of zeros is of no image. So is one of other sizes.

A call goes on with the stream whose conditions are the same, whose last timestep it is past, and whose latents are closest, at
least `CONTINUITY` in cosine. If there is none, it begins an image in the stream that waited longest. It computes if any
of its samples begins an image, or has to by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from .ports import Port, Roles
from .symbols import Symbol, branch, concat
from .timetable import Timetable

#: Cosine of the latents of two consecutive calls of one image, at least; those of two images have 0.3 or less early on.
CONTINUITY = 0.9

#: Conditions are the same if their prints differ by less than this share of their norm: rounding moves them by less.
FLOATING, WHOLE = 1e-4, 1e-6

#: A call is one of the plan's if it is this close to it, in calls of the plan.
_CLOSE = 0.1

#: Rounding of what adds up to one.
_ROUNDING = 1e-3

#: Latents are the same if they differ by less than this share of their norm: guidance calls a model with them twice.
_EQUAL = 1e-5

#: Streams that have not been used for so many calls are equally old.
_OLDEST = 1000.0

#: Positions are counted anew after so many: a large one times a fraction has no digits left in float32.
_PERIODS = ((4096, 0.6180339887498949), (4099, 0.7548776662466927))


@dataclass(frozen=True)
class Columns:
    """A stream's clock, or a part of it: each a float32 [batch, streams or 1, width].

    Attributes:
        timestep: of the last call, along the way.
        now: the same, but later where a timestep was named again.
        computed: how many of its calls computed.
        calls: how many there were.
        due: how much of a computed call has come near since the last one.
        age: calls since the stream was used.
        times: of the computed calls, the newest first, [.., order + 1].
        prints: of the conditions, and sizes.
    """

    timestep: Symbol
    now: Symbol
    computed: Symbol
    calls: Symbol
    due: Symbol
    age: Symbol
    times: Symbol
    prints: Symbol

    @classmethod
    def widths(cls, depth: int, prints: int) -> dict[str, int]:
        """The width of each column."""
        return {field.name: 1 for field in fields(cls)} | {"times": depth, "prints": prints}

    @classmethod
    def of(cls, clock: Symbol, depth: int, prints: int) -> Columns:
        """A clock taken apart."""
        found, at = {}, 0
        for name, width in cls.widths(depth, prints).items():
            found[name] = clock.take(range(at, at + width), axis=2)
            at += width
        return cls(**found)

    def clock(self) -> Symbol:
        """The columns put together."""
        return concat([getattr(self, field.name) for field in fields(self)], axis=2)

    def chosen(self, mask: Symbol) -> Columns:
        """Those of one stream for each sample, [batch, 1, width]; mask: [batch, streams, 1]."""
        return Columns(**{f.name: mask.where(getattr(self, f.name), 0.0).sum(1, keep=True) for f in fields(self)})


@dataclass(frozen=True)
class State:
    """What is kept from call to call, see the module."""

    clock: Symbol
    latents: Symbol
    outputs: tuple[Symbol, ...]


@dataclass(frozen=True)
class Controller:
    """Writes the graph around a denoiser.

    Attributes:
        table: of the plan.
        depth: how many computed outputs are kept: order + 1.
        streams: how many images or passes may take turns.
        roles: which input is what.
        outputs: of the denoiser.
    """

    table: Timetable
    depth: int
    streams: int
    roles: Roles
    outputs: tuple[Port, ...]

    @property
    def prints(self) -> int:
        """How many prints there are."""
        ports = (self.roles.latents, *self.roles.conditions)
        return max(1, 3 * len(self.roles.conditions) + sum(len(_open_sizes(port)) for port in ports))

    @property
    def layout(self) -> dict[str, int]:
        """The clock's columns and their widths, in their order."""
        return Columns.widths(self.depth, self.prints)

    @property
    def columns(self) -> int:
        """Width of the clock."""
        return sum(self.layout.values())

    def write(
        self, inputs: Mapping[str, Symbol], state: State, dense: Callable[[list[Symbol]], list[Symbol]]
    ) -> tuple[list[Symbol], State]:
        """Write it all.

        Args:
            inputs: of the denoiser, by name in their order.
            state: before the call.
            dense: writes the denoiser, given handles of its inputs.

        Returns:
            The denoiser's outputs, and the state after the call.
        """
        latents = inputs[self.roles.latents.name]
        rows = latents.reshape([0, -1]).float()
        batch = latents.size(0)
        if None in self.roles.latents.shape:
            state = self._fitting(state, rows)
        clock = Columns.of(state.clock, self.depth, self.prints)
        prints, allowed = self._prints(inputs, batch)
        timestep = self._time(inputs[self.roles.timestep.name], batch)

        onward = timestep > clock.timestep
        same = ((clock.prints - prints).abs() <= allowed).all(2, keep=True)
        alike = _alike(rows.insert(1), state.latents)
        again = timestep.equals(clock.timestep) & alike.moved
        going = (clock.computed > 0.5) & (onward | again) & same & alike.close
        positions = np.arange(self.streams).reshape(1, -1, 1)
        waiting = (clock.age + -0.1 * positions) * (0.5 / _OLDEST)
        mask = going.where(alike.cosine + 2.0, waiting).argmax(1).equals(positions)
        goes_on = (mask & going).any(1, keep=True)
        stream = clock.chosen(mask & going)
        now = (mask & going & again).any(1, keep=True).where(stream.now + self._gap(stream.now), timestep)

        due, wanted = self._planned(stream, now)
        computes = (~goes_on | wanted).any(0, 1, 2)
        weights = self._weights(stream, now)
        given, kept, history = self._outputs(computes, list(inputs.values()), state.outputs, mask, weights, dense)

        counted = computes.float().reshape([1, 1, 1])
        times = concat([now, stream.times.take(range(self.depth - 1), axis=2)], axis=2) if self.depth > 1 else now
        after = Columns(
            timestep=timestep,
            now=now,
            computed=stream.computed + counted,
            calls=stream.calls + 1.0,
            due=goes_on.where(due - counted, 0.0).clip(0.0, 1.0),
            age=goes_on.where(0.0, 0.0),
            times=computes.where(times, stream.times),
            prints=goes_on.where(stream.prints, prints),
        )
        others = Columns(
            **{f.name: getattr(clock, f.name) for f in fields(clock)}
            | {"age": (clock.age + 1.0).clip(0.0, _OLDEST), "computed": kept.where(clock.computed, 0.0)}
        )
        return given, State(
            clock=mask.where(after.clock(), others.clock()),
            latents=mask.where(rows.insert(1), state.latents),
            outputs=tuple(history),
        )

    def _fitting(self, state: State, rows: Symbol) -> State:
        """The state, or zeros where it is of another batch or of latents of another size."""
        batch, values = rows.size(0), rows.size(1)
        streams = rows.like(np.array([self.streams]))
        wanted = concat([batch, streams, values], axis=0)
        clock = concat([batch, streams, rows.like(np.array([self.columns]))], axis=0)
        fits = state.latents.shape().equals(wanted).all(0) & state.clock.shape().equals(clock).all(0)
        found = branch(
            fits,
            [state.clock, state.latents, clock, wanted],
            lambda given: [given[0].identity(), given[1].identity()],
            lambda given: [given[0].like(0.0).expand(given[2]), given[0].like(0.0).expand(given[3])],
        )
        return State(found[0], found[1], state.outputs)

    def _time(self, timestep: Symbol, batch: Symbol) -> Symbol:
        """Time along the way, [batch, 1, 1]; of per-token timesteps the largest, of one for all the same."""
        rank = len(self.roles.timestep.shape)
        rows = timestep.float().reshape([-1, 1] if rank < 2 else [0, -1]).max(1)
        picked = (batch.counted() * rows.size(0))._node("Div", batch)
        return rows.take(picked).reshape([-1, 1, 1]) * float(self.table.sign)

    def _prints(self, inputs: Mapping[str, Symbol], batch: Symbol) -> tuple[Symbol, Symbol]:
        """What an image keeps to, [batch, 1, prints], and by how much each may differ.

        For each condition its norm and two sums with weights that repeat nowhere; and all sizes.
        A condition without the batch says the same of all samples.
        """
        found, allowed = [], []
        for port in self.roles.conditions:
            value = inputs[port.name]
            flat = value.float().reshape([0, -1] if port.shape else [1, 1])
            places = flat.size(1).counted()
            sums = [(flat * flat).sum(1, keep=True)]
            for period, step in _PERIODS:
                ramp = (places % period).float() * step
                sums.append((flat * (ramp - ramp.floor() + -0.5)).sum(1, keep=True))
            each = concat(sums, axis=1)
            both = concat([each, each.sum(0, keep=True)], axis=0)  # of each row, and of all
            count = each.size(0)
            picked = count.equals(batch).where(batch.counted(), count)
            sums_of_rows = both.take(picked)
            norm = sums_of_rows.take([0], axis=1).sqrt()
            found += [norm, sums_of_rows.take([1, 2], axis=1)]
            allowed.append(concat([norm] * 3, axis=1) * (FLOATING if port.floating else WHOLE))
        sizes = [inputs[p.name].shape().take(_open_sizes(p)) for p in (self.roles.latents, *self.roles.conditions)
                 if _open_sizes(p)]  # fmt: skip
        if sizes or not found:
            row = concat(sizes, axis=0).float() if sizes else batch.like(np.zeros(1, np.float32))
            row = row.reshape([1, -1])
            full = row.expand(concat([batch, row.size(1)], axis=0))
            found.append(full)
            allowed.append(full * 0.0)
        return concat(found, axis=1).reshape([0, 1, -1]), concat(allowed, axis=1).reshape([0, 1, -1])

    def _planned(self, stream: Columns, now: Symbol) -> tuple[Symbol, Symbol]:
        """How much of a computed call is due, and whether this call has to compute; [batch, 1, 1].

        A call that follows the one before as in the plan is decided as there. Any other brings the next computed call nearer
        by the plan's share of computed calls between the two.
        """
        before, at = self._place(stream.now), self._place(now)
        passed = at.calls - before.calls
        share = (passed > _ROUNDING).where((at.computed - before.computed) / passed, self.table.share)
        due = (stream.due + share).clip(0.0, 1.0)
        near = self._near(at)
        listed = near.any(2, keep=True) & ((passed + -1.0).abs() <= _CLOSE)
        planned = (near & near.like(self.table.computes.reshape(1, 1, -1))).any(2, keep=True)
        return due, (listed & planned) | (~listed & (due >= 1.0 - _ROUNDING))

    def _place(self, time: Symbol) -> _Place:
        """Where in the plan a time is: linear between its calls."""
        times = self.table.times
        if len(times) < 2:
            return _Place(time * 0.0, time * 0.0)
        begins, gaps = times[:-1].reshape(1, 1, -1), np.diff(times).reshape(1, 1, -1)
        passed = ((time + -begins) / gaps).clip(0.0, 1.0)
        density = self.table.density[:-1].reshape(1, 1, -1)
        return _Place(passed.sum(2, keep=True), (passed * density).sum(2, keep=True))

    def _near(self, place: _Place) -> Symbol:
        """Which of the plan's calls a place is at, [batch, 1, calls]."""
        numbers = np.arange(len(self.table.times), dtype=np.float32).reshape(1, 1, -1)
        return (place.calls + -numbers).abs() <= _CLOSE

    def _gap(self, time: Symbol) -> Symbol:
        """How much later a call is that names the timestep of the last one, [batch, 1, 1].

        As much as in the plan, and as little as anywhere in it where that has no such call.
        """
        near, again = self._near(self._place(time)), self.table.again
        found = near.where(again.reshape(1, 1, -1), 0.0).sum(2, keep=True)
        return near.any(2, keep=True).where(found, float(again.min()))

    def _weights(self, stream: Columns, now: Symbol) -> list[tuple[Symbol, Symbol]]:
        """For each kept output, whether it is of this image and its weight in the polynomial (Lagrange's form); [batch]."""
        times = [stream.times.take(k, axis=2).reshape([-1]) for k in range(self.depth)]
        known = [(stream.computed > k + 0.5).reshape([-1]) for k in range(self.depth)]
        at, found = now.reshape([-1]), []
        for i, own in enumerate(times):
            weight = own * 0.0 + 1.0
            for j, other in enumerate(times):
                if i != j:
                    both = known[i] & known[j]
                    weight = weight * both.where((at - other) / both.where(own - other, 1.0), 1.0)
            found.append((known[i], weight))
        return found

    def _outputs(
        self,
        computes: Symbol,
        inputs: Sequence[Symbol],
        histories: Sequence[Symbol],
        mask: Symbol,
        weights: Sequence[tuple[Symbol, Symbol]],
        dense: Callable[[list[Symbol]], list[Symbol]],
    ) -> tuple[list[Symbol], Symbol, list[Symbol]]:
        """The `If`: outputs; whether states kept their sizes, so that other streams are still there; the outputs' states."""
        count = len(self.outputs)
        flat = [value for pair in weights for value in pair]

        def then(given: list[Symbol]) -> list[Symbol]:
            mask, given = given[0], given[1 + len(flat) :]
            fresh = dense(given[count:])
            kept, after = [], []
            for port, value, history in zip(self.outputs, fresh, given[:count], strict=True):
                fits, updated = self._pushed(port, value.float(), history, mask)
                kept.append(fits)
                after.append(updated)
            return [*(v.identity() for v in fresh), concat(kept, axis=0).all(0, keep=True), *after]

        def otherwise(given: list[Symbol]) -> list[Symbol]:
            mask, pairs, histories = given[0], given[1 : 1 + len(flat)], given[1 + len(flat) :][:count]
            found = [
                self._forecast(port, history, mask, list(zip(pairs[::2], pairs[1::2], strict=True)))
                for port, history in zip(self.outputs, histories, strict=True)
            ]
            return [*found, mask.like(np.array([True])).identity(), *(history.identity() for history in histories)]

        found = branch(computes, [mask, *flat, *histories, *inputs], then, otherwise)
        return found[:count], found[count], found[count + 1 :]

    def _pushed(self, port: Port, fresh: Symbol, history: Symbol, mask: Symbol) -> tuple[Symbol, Symbol]:
        """Whether the history has the sizes of what was computed, bool [1]; and the history with it, else with nothing else."""
        fits = fresh.like(np.array([True]))
        if None in port.shape:
            sizes = fresh.shape()
            rest = range(1, len(port.shape))
            wanted = concat(
                [sizes.take([0]), sizes.like(np.array([self.streams, self.depth])), sizes.take(rest)], axis=0
            )
            fits = history.shape().equals(wanted).all(0, keep=True)
            history = branch(
                fits.reshape([]),
                [history, wanted],
                lambda given: [given[0].identity()],
                lambda given: [given[0].like(0.0).expand(given[1])],
            )[0]
        ones = [1] * (len(port.shape) - 1)
        mask = mask.reshape([0, self.streams, 1, *ones])
        row = fresh.insert(1, 2)
        if self.depth > 1:
            old = mask.where(history, 0.0).sum(1, keep=True).take(range(self.depth - 1), axis=2)
            row = concat([row, old], axis=2)
        return fits, mask.where(row, history)

    def _forecast(self, port: Port, history: Symbol, mask: Symbol, weights: Sequence[tuple[Symbol, Symbol]]) -> Symbol:
        """The polynomial through the kept outputs of the call's stream."""
        ones = [1] * (len(port.shape) - 1)
        outputs = mask.reshape([0, self.streams, 1, *ones]).where(history, 0.0).sum(1)
        total: Symbol | None = None
        for k, (known, weight) in enumerate(weights):
            value = known.reshape([-1, *ones]).where(outputs.take(k, axis=1), 0.0)
            part = value * weight.reshape([-1, *ones])
            total = part if total is None else total + part
        assert total is not None  # depth is at least 1
        return total.cast(port.dtype)


@dataclass(frozen=True)
class _Place:
    """Calls of the plan, and computed ones, that have passed by a time."""

    calls: Symbol
    computed: Symbol


@dataclass(frozen=True)
class _Alike:
    """How latents are to those of each stream's last call, [batch, streams, 1]."""

    cosine: Symbol
    close: Symbol
    moved: Symbol


def _alike(rows: Symbol, past: Symbol) -> _Alike:
    """Compare latents [batch, 1, values] with [batch, streams, values]. Zeros and NaN are close to nothing."""
    product = (rows * past).sum(2, keep=True)
    square = (rows * rows).sum(2, keep=True)
    norms = (square * (past * past).sum(2, keep=True)).sqrt()
    difference = rows - past
    moved = (difference * difference).sum(2, keep=True) > square * _EQUAL**2
    return _Alike(product / norms, (product > 0.0) & (product >= norms * CONTINUITY), moved)


def _open_sizes(port: Port) -> list[int]:
    """Dimensions that may have any size, but for the batch."""
    return [k for k, size in enumerate(port.shape) if k and size is None]
