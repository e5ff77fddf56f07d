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


def compute_or_forecast(
    computes: Symbol,
    dense: Callable[[list[Symbol]], list[Symbol]],
    inputs: Sequence[Symbol],
    ports: Sequence[Port],
    histories: Sequence[Symbol],
    mask: Symbol,
    weights: Sequence[tuple[Symbol, Symbol]],
) -> Given:
    """Write the `If`.

    Args:
        computes: bool scalar.
        dense: writes the denoiser, given handles of its inputs.
        inputs: of the denoiser.
        ports: its outputs.
        histories: for each output the last computed ones, [batch, streams, depth, ...].
        mask: each sample's stream, bool [batch, streams, 1].
        weights: of the newest of them in the forecast, see `clock.weights`.
    """
    flat = [value for pair in weights for value in pair]
    count = len(ports)

    def then(given: list[Symbol]) -> list[Symbol]:
        fresh = dense(given[1 + len(flat) + count :])
        kept, after = [], []
        for port, value, history in zip(ports, fresh, given[1 + len(flat) :][:count], strict=True):
            fits, history = _fitting(port, value, history)
            kept.append(fits)
            after.append(_pushed(port, value.float(), history, given[0]))
        return [*(value.identity() for value in fresh), concat(kept, axis=0).all(0, keep=True), *after]

    def otherwise(given: list[Symbol]) -> list[Symbol]:
        pairs = list(zip(given[1 : 1 + len(flat) : 2], given[2 : 2 + len(flat) : 2], strict=True))
        own = given[1 + len(flat) :][:count]
        found = [_forecast(port, history, given[0], pairs) for port, history in zip(ports, own, strict=True)]
        return [*found, given[0].like(np.array([True])).identity(), *(history.identity() for history in own)]

    found = branch(computes, [mask, *flat, *histories, *inputs], then, otherwise)
    return Given(found[:count], found[count], found[count + 1 :])


def _fitting(port: Port, fresh: Symbol, history: Symbol) -> tuple[Symbol, Symbol]:
    """Whether a history is of outputs of these sizes, bool [1]; and it, or zeros in its place."""
    if None not in port.shape:
        return fresh.like(np.array([True])).identity(), history
    sizes, kept = fresh.shape(), history.shape().take([1, 2])
    wanted = concat(
        [sizes.take([0]), kept, *([sizes.take(range(1, len(port.shape)))] if port.shape[1:] else [])], axis=0
    )
    fits = history.shape().equals(wanted).all(0, keep=True)
    [found] = branch(
        fits.reshape([]),
        [history, wanted],
        lambda given: [given[0].identity()],
        lambda given: [given[0].like(0.0).expand(given[1])],
    )
    return fits, found


def _pushed(port: Port, fresh: Symbol, history: Symbol, mask: Symbol) -> Symbol:
    """The history with what was computed, in each sample's stream."""
    mask = _per_stream(mask, port)
    old = mask.where(history, 0.0).sum(1, keep=True)
    newest = concat([fresh.insert(1, 2), old], axis=2)
    depth = history.size(2)
    return mask.where(newest.first(depth, 2), history)


def _forecast(port: Port, history: Symbol, mask: Symbol, weights: Sequence[tuple[Symbol, Symbol]]) -> Symbol:
    """The polynomial through the newest outputs of each sample's stream."""
    ones = [1] * (len(port.shape) - 1)
    outputs = _per_stream(mask, port).where(history, 0.0).sum(1)
    total: Symbol | None = None
    for k, (known, weight) in enumerate(weights):
        value = known.reshape([-1, *ones]).where(outputs.take(k, axis=1), 0.0)
        part = value * weight.reshape([-1, *ones])
        total = part if total is None else total + part
    assert total is not None  # an order is at least 0
    return total.cast(port.dtype)


def _per_stream(mask: Symbol, port: Port) -> Symbol:
    """A mask of streams [batch, streams, 1] for histories of an output."""
    return mask.insert(*range(3, 3 + len(port.shape) - 1)) if port.shape[1:] else mask
