"""The `If`: the denoiser computes and its outputs are kept, or they are made of those that were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .ports import Port
from .symbols import Symbol, branch, concat


@dataclass(frozen=True)
class Given:
    """What a call gives.

    Attributes:
        outputs: of the denoiser.
        kept: whether outputs had the sizes of those kept so far, bool [1]; else nothing else is kept any more.
        histories: the last computed outputs, for the next call.
    """

    outputs: list[Symbol]
    kept: Symbol
    histories: list[Symbol]


@dataclass(frozen=True)
class Histories:
    """The last computed outputs of each stream.

    Attributes:
        ports: the denoiser's outputs.
        values: for each of them [batch, streams, depth, ...], of any sizes.
        streams, depth: sizes.
    """

    ports: Sequence[Port]
    values: Sequence[Symbol]
    streams: int
    depth: int

    def known(self, port: Port, value: Symbol, like: Symbol) -> Symbol:
        """A history that has the batch of `like`, with its sizes spelled out: no tool can infer them."""
        return value if None not in port.shape else value.of_sizes(self._sizes(port, like, value, 3))

    def fitting(self, port: Port, value: Symbol, fresh: Symbol) -> tuple[Symbol, Symbol]:
        """Whether a history is of outputs of these sizes, bool [1]; and it, or zeros in its place."""
        if None not in port.shape:
            return fresh.like(np.array([True])).identity(), value
        wanted = self._sizes(port, fresh, fresh, 1)
        fits = value.shape().equals(wanted).all(0, keep=True)
        [found] = branch(
            fits.reshape([]),
            [value, wanted],
            lambda given: [given[0].identity()],
            lambda given: [given[0].like(0.0).expand(given[1])],
        )
        return fits, found.of_sizes(wanted)

    def pushed(self, port: Port, value: Symbol, fresh: Symbol, mask: Symbol) -> Symbol:
        """A history with what was computed, in each sample's stream."""
        mask, flat = mask.insert(3), self._flat(value)
        old = mask.where(flat, 0.0).sum(1, keep=True)
        newest = concat([fresh.reshape([0, 1, 1, -1]), old], axis=2)
        found = mask.where(newest.take(range(self.depth), axis=2), flat)
        return found.reshape(self._sizes(port, fresh, fresh, 1))

    def forecast(self, port: Port, value: Symbol, mask: Symbol, weights: Sequence[tuple[Symbol, Symbol]]) -> Symbol:
        """The polynomial through the newest outputs of each sample's stream."""
        value = self.known(port, value, mask)
        outputs = mask.insert(3).where(self._flat(value), 0.0).sum(1)
        total: Symbol | None = None
        for k, (known, weight) in enumerate(weights):
            part = known.reshape([-1, 1]).where(outputs.take(k, axis=1), 0.0) * weight.reshape([-1, 1])
            total = part if total is None else total + part
        assert total is not None  # an order is at least 0
        sizes = self._sizes(port, mask, value, 3)
        return total.reshape(sizes.take([0, *range(3, 2 + len(port.shape))])).cast(port.dtype)

    def _flat(self, value: Symbol) -> Symbol:
        """[batch, streams, depth, numbers]: OpenVINO computes nonsense with the seven dimensions of a video's (2026.4)."""
        return value.reshape([0, self.streams, self.depth, -1])

    def _sizes(self, port: Port, batch: Symbol, others: Symbol, at: int) -> Symbol:
        """The sizes of a history, int64 [rank]: the batch of one tensor; what is open beyond as in another, from `at` on."""
        sizes = [
            others.size(k) if size is None else batch.like(np.array([size]))
            for k, size in enumerate(port.shape[1:], at)
        ]
        return concat([batch.size(0), batch.like(np.array([self.streams, self.depth])), *sizes], axis=0)


def compute_or_forecast(
    computes: Symbol,
    dense: Callable[[list[Symbol]], list[Symbol]],
    inputs: Sequence[Symbol],
    histories: Histories,
    mask: Symbol,
    weights: Sequence[tuple[Symbol, Symbol]],
) -> Given:
    """Write the `If`.

    Args:
        computes: bool scalar.
        dense: writes the denoiser, given handles of its inputs.
        inputs: of the denoiser.
        histories: of its outputs.
        mask: each sample's stream, bool [batch, streams, 1].
        weights: of the newest of them in the forecast, see `clock.weights`.
    """
    flat = [value for pair in weights for value in pair]
    ports, count = histories.ports, len(histories.ports)

    def then(given: list[Symbol]) -> list[Symbol]:
        fresh = dense(given[1 + len(flat) + count :])
        kept, after = [], []
        for port, value, history in zip(ports, fresh, given[1 + len(flat) :][:count], strict=True):
            fits, history = histories.fitting(port, history, value)
            kept.append(fits)
            after.append(histories.pushed(port, history, value.float(), given[0]))
        return [*(value.identity() for value in fresh), concat(kept, axis=0).all(0, keep=True), *after]

    def otherwise(given: list[Symbol]) -> list[Symbol]:
        pairs = list(zip(given[1 : 1 + len(flat) : 2], given[2 : 2 + len(flat) : 2], strict=True))
        own = given[1 + len(flat) :][:count]
        found = [histories.forecast(port, history, given[0], pairs) for port, history in zip(ports, own, strict=True)]
        return [*found, given[0].like(np.array([True])).identity(), *(history.identity() for history in own)]

    found = branch(computes, [mask, *flat, *histories.values, *inputs], then, otherwise)
    return Given(found[:count], found[count], found[count + 1 :])
