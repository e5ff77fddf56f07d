"""The graph around a denoiser: which image a call belongs to, whether it computes, and what it gives otherwise.

Written once for all formats, in `symbols`. For each sample there are a few *streams*: images, or passes of guidance, that
take turns. A stream is a row of three states:

- clock [batch, streams, columns], see `clock.Columns`;
- latents [batch, streams, ...] of its last call;
- outputs [batch, streams, depth, ...]: the last computed ones, the newest first; one state for each output.

A state of zeros is of no image. So is one of other sizes.

A call goes on with the stream that explains its latents best (see `continuity`), among those whose conditions are the same and
whose last timestep it is past, or names again with other latents. Of several that explain them all the same (a run that was
stopped and then repeated, passes that nothing but their order tells apart) it is the one that came furthest, then the one that
waited longest. If there is none, it begins an image in the stream that waited longest. It computes if any of its samples begins
an image, or has to by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from . import clock as timing
from .clock import Columns
from .continuity import PRINT, UNEXPLAINED, Past, print_of, same_print, unexplained
from .history import Histories, compute_or_forecast
from .ports import Port, Roles
from .symbols import Symbol, branch, concat
from .timetable import Timetable

#: Conditions are the same if their prints differ by less than this share of their norm; whole numbers have to be equal.
_FLOATING, _WHOLE = 1e-4, 1e-6

#: Latents are the same if theirs do: guidance calls a model with them twice.
_EQUAL = 1e-5

#: Streams explain latents the same if both leave less than this share of their square: more than bfloat16 loses.
_ALIKE = 1e-5

#: What counts then, in the measure of `_preference`: as much as 25 millionths of a square.
_TIE = 1e-3

#: Streams that have not been used for so many calls are equally old.
_OLDEST = 1000.0

#: Outputs that are kept at least: multistep samplers make the next latents of two.
_FEWEST = 2


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
        order: of the forecast.
        streams: how many images or passes may take turns.
        roles: which input is what.
        outputs: of the denoiser.
    """

    table: Timetable
    order: int
    streams: int
    roles: Roles
    outputs: tuple[Port, ...]

    @property
    def depth(self) -> int:
        """How many computed outputs are kept."""
        return max(self.order + 1, _FEWEST)

    @property
    def layout(self) -> dict[str, int]:
        """The clock's columns and their widths, in their order."""
        ports = (self.roles.latents, *self.roles.conditions)
        sizes = sum(len(_open_sizes(port)) for port in ports)
        return Columns.widths(self.depth, max(1, PRINT * len(self.roles.conditions) + sizes))

    def shapes(self) -> dict[str, list[int | None]]:
        """The states' names and sizes; None: any."""
        latents = self.roles.latents.shape
        found: dict[str, list[int | None]] = {
            "clock": [latents[0], self.streams, sum(self.layout.values())],
            "latents": [latents[0], self.streams, *latents[1:]],
        }
        for k, port in enumerate(self.outputs):
            found[f"output_{k}"] = [port.shape[0], self.streams, self.depth, *port.shape[1:]]
        return found

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
        latents = inputs[self.roles.latents.name].float()
        batch = latents.size(0)
        joined, past, left = self._remembered(latents, state)
        clock = self._columns(joined)
        conditions = self._conditions(inputs, batch)
        seen = print_of(latents.reshape([0, -1])).insert(1)
        timestep = self._time(inputs[self.roles.timestep.name], batch)

        again = timestep.equals(clock.timestep) & ~same_print(seen, clock.seen, _EQUAL)
        going = (clock.computed > 0.5) & ((timestep > clock.timestep) | again) & (left <= UNEXPLAINED**2)
        going = going & self._same_conditions(conditions, clock.conditions)
        waiting = (clock.age + -0.1 * self._positions) * (0.5 / _OLDEST)
        preference = self._preference(going, left, clock.timestep, waiting)
        mask = going.where(preference, waiting).argmax(1).equals(self._positions)
        own = mask & going
        goes_on = own.any(1, keep=True)
        stream = clock.chosen(own)
        now = (own & again).any(1, keep=True).where(stream.now + timing.gap(self.table, stream.now), timestep)

        due, wanted = timing.planned(self.table, stream, now)
        computes = (~goes_on | wanted).any(0, 1, 2)
        weights = timing.weights(self.table, stream, now, self.order + 1)
        histories = self._histories(state)
        given = compute_or_forecast(computes, dense, list(inputs.values()), histories, mask, weights)

        counted = computes.where(1.0, 0.0).reshape([1, 1, 1])
        times = concat([now, stream.times.take(range(self.depth - 1), axis=2)], axis=2)
        after = Columns(
            timestep=timestep,
            now=now,
            computed=stream.computed + counted,
            calls=stream.calls + 1.0,
            due=goes_on.where(computes.where(due + -1.0, due), 0.0).clip(0.0, 1.0),
            age=goes_on.where(0.0, 0.0),
            times=computes.where(times, stream.times),
            seen=seen,
            before=goes_on.where(stream.seen, seen),
            conditions=goes_on.where(stream.conditions, conditions),
        )
        others = {field.name: getattr(clock, field.name) for field in fields(clock)}
        others["age"] = (clock.age + 1.0).clip(0.0, _OLDEST)
        others["computed"] = given.kept.where(clock.computed, 0.0)
        return given.outputs, State(
            clock=mask.where(after.joined(), Columns(**others).joined()),
            latents=mask.reshape([0, 0, *[1] * (len(self.roles.latents.shape) - 1)]).where(latents.insert(1), past),
            outputs=tuple(given.histories),
        )

    def _preference(self, going: Symbol, left: Symbol, timestep: Symbol, waiting: Symbol) -> Symbol:
        """More for streams that a call would rather go on with, above all `waiting` (up to 0.5); [batch, streams, 1]."""
        first = going.where(timestep, -3e38).argmax(1).equals(self._positions)
        furthest = timestep.equals(first.where(timestep, 0.0).sum(1, keep=True)).where(_TIE, 0.0)
        worse = (left + -_ALIKE).clip(0.0, UNEXPLAINED**2) * (0.4 / UNEXPLAINED**2)
        return worse * -1.0 + 1.0 + furthest + waiting * _TIE

    @property
    def _positions(self) -> NDArray[np.int64]:
        return np.arange(self.streams).reshape(1, -1, 1)

    def _histories(self, state: State) -> Histories:
        return Histories(self.outputs, state.outputs, self.streams, self.depth)

    def _columns(self, clock: Symbol) -> Columns:
        return Columns.of(clock, self.depth, self.layout["conditions"])

    def _remembered(self, latents: Symbol, state: State) -> tuple[Symbol, Symbol, Symbol]:
        """Clock and latents of the streams, or zeros where sizes have changed; and what they leave unexplained."""
        inputs = [latents, state.clock, state.latents, state.outputs[0]]
        shapes = list(self.shapes().values())[:3]
        if all(shape[0] is not None for shape in shapes) and None not in shapes[1]:
            return state.clock, state.latents, self._left(*inputs)
        sizes = latents.shape()
        streams = sizes.like(np.array([self.streams]))
        clock = concat([sizes.take([0]), streams, sizes.like(np.array([sum(self.layout.values())]))], axis=0)
        wanted = concat([sizes.take([0]), streams, sizes.take(range(1, len(self.roles.latents.shape)))], axis=0)
        left = concat([sizes.take([0]), streams, sizes.like(np.array([1]))], axis=0)
        fits = state.clock.shape().equals(clock).all(0) & state.latents.shape().equals(wanted).all(0)
        fits = fits & state.outputs[0].size(0).equals(latents.size(0)).all(0)

        def known(given: list[Symbol]) -> list[Symbol]:
            now, before = given[1].of_sizes(given[4]), given[2].of_sizes(given[5])
            outputs = self._histories(state).known(self.outputs[0], given[3], given[0])
            return [now, before, self._left(given[0], now, before, outputs)]

        found = branch(
            fits,
            [*inputs, clock, wanted, left],
            known,
            lambda given: [
                given[0].like(value).expand(shape) for value, shape in zip((0.0, 0.0, 1.0), given[4:], strict=True)
            ],
        )
        return found[0], found[1], found[2]

    def _left(self, latents: Symbol, clock: Symbol, past: Symbol, outputs: Symbol) -> Symbol:
        """What streams leave unexplained of latents, [batch, streams, 1]."""
        columns = self._columns(clock)
        shape, given = self.roles.latents.shape, self.outputs[0].shape
        alike = len(shape) == len(given)
        crop = [k for k, (a, b) in enumerate(zip(shape, given, strict=False)) if k and (a is None or a != b)]
        whose = columns.seen.insert(2, 3)  # [batch, streams, 1, 1, 3]
        shared = [same_print(whose, seen.insert(0, 1), _EQUAL) for seen in (columns.seen, columns.before)]
        partners = (shared[0] | shared[1]).any(4)
        found = Past(past, outputs if alike else None, columns.computed, partners)
        return unexplained(latents, found, self.streams, self.depth, crop)

    def _time(self, timestep: Symbol, batch: Symbol) -> Symbol:
        """Time along the way, [batch, 1, 1]; of per-token timesteps the largest, of one for all the same."""
        rows = timestep.float().reshape([-1])
        if len(self.roles.timestep.shape) > 1:
            tokens = timestep.float().reshape([0, -1])
            rows = tokens.argmax(1).equals(tokens.size(1).counted()).where(tokens, 0.0).sum(1)
        picked = (batch.counted() * rows.size(0))._node("Div", batch)
        return rows.take(picked).reshape([-1, 1, 1]) * float(self.table.sign)

    def _conditions(self, inputs: Mapping[str, Symbol], batch: Symbol) -> Symbol:
        """What an image keeps to, [batch, 1, numbers]: a print of each condition, and the sizes of all inputs that have any.

        A condition without the batch says the same of all samples.
        """
        found = []
        for port in self.roles.conditions:
            rows = inputs[port.name].float().reshape([0, -1] if port.shape else [1, 1])
            each = print_of(rows)
            count = each.size(0)
            both = concat([each, each.sum(0, keep=True)], axis=0)  # of each row, and of all of them
            found.append(both.take(count.equals(batch).where(batch.counted(), count)))
        ports = [port for port in (self.roles.latents, *self.roles.conditions) if _open_sizes(port)]
        sizes = [inputs[port.name].shape().take(_open_sizes(port)).float() for port in ports]
        if sizes or not found:
            row = (concat(sizes, axis=0) if sizes else batch.like(np.zeros(1, np.float32))).reshape([1, -1])
            found.append(row.expand(concat([batch, row.size(1)], axis=0)))
        return concat(found, axis=1).insert(1)

    def _same_conditions(self, now: Symbol, past: Symbol) -> Symbol:
        """Which streams [batch, streams, 1] are conditioned on the same."""
        found, at = [], 0
        for port in self.roles.conditions:
            own, old = (value.take(range(at, at + PRINT), axis=2) for value in (now, past))
            found.append(same_print(own, old, _FLOATING if port.floating else _WHOLE))
            at += PRINT
        if at < self.layout["conditions"]:
            sizes = range(at, self.layout["conditions"])
            found.append(now.take(sizes, axis=2).equals(past.take(sizes, axis=2)).all(2, keep=True))
        return concat(found, axis=2).all(2, keep=True)


def _open_sizes(port: Port) -> list[int]:
    """Dimensions that may have any size, but for the batch."""
    return [k for k, size in enumerate(port.shape) if k and size is None]


def sizes_or(shape: Sequence[int | None], other: int) -> list[int]:
    """A shape with `other` where any size will do."""
    return [other if size is None else size for size in shape]


__all__ = ["Controller", "State", "sizes_or"]
