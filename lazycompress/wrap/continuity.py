"""Whether latents go on with an image: what is left of them that its last latents and outputs do not explain.

A sampler of an ODE makes the next latents of the last ones and of outputs, its own and those of passes that had the same
latents (guidance): they are in the span of these, but for a hundredth of their norm. Latents of another image are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .symbols import Symbol, concat

#: Latents go on with an image if at most this share of their norm is unexplained, as in the module engine.
UNEXPLAINED = 0.1

#: Latents of fewer numbers than this for each vector that explains them prove nothing.
FEWEST = 8

#: Steps of the solver: as many as there are vectors of two passes with three outputs, and a few for rounding.
_STEPS = 10

#: Positions are counted anew after so many: a large one times a fraction has no digits left in float32.
_PERIODS = ((4096, 0.6180339887498949), (4099, 0.7548776662466927))

#: How many numbers a print has.
PRINT = 3


def print_of(rows: Symbol) -> Symbol:
    """By what rows [rows, values] are known again, [rows, 3].

    The square of the norm, and two sums with weights that repeat nowhere.
    """
    places = rows.size(1).counted()
    found = [(rows * rows).sum(1, keep=True)]
    for period, step in _PERIODS:
        ramp = (places % period).float() * step
        found.append((rows * (ramp - ramp.floor() + -0.5)).sum(1, keep=True))
    return concat(found, axis=1)


def same_print(one: Symbol, other: Symbol, tolerance: float) -> Symbol:
    """Whether prints [.., 3] are of the same values but for a share of their norm; [.., 1]. NaN is the same as nothing."""
    norm = one.take([0], axis=-1).sqrt()
    sums = (one.take([1, 2], axis=-1) - other.take([1, 2], axis=-1)).abs() <= norm * tolerance
    norms = (norm - other.take([0], axis=-1).sqrt()).abs() <= norm * tolerance
    return concat([norms, sums], axis=-1).all(-1, keep=True)


@dataclass(frozen=True)
class Past:
    """What streams have to explain latents with.

    Attributes:
        latents: [batch, streams, ...] of their last calls.
        outputs: [batch, streams, depth, ...], the newest first; None where an output is nothing like latents.
        known: how many of them there are, [batch, streams, 1].
        shared: which streams (the last two dimensions) had the latents of a stream, [batch, streams, batch, streams].
    """

    latents: Symbol
    outputs: Symbol | None
    known: Symbol
    shared: Symbol


def unexplained(latents: Symbol, past: Past, streams: int, depth: int, crop: Sequence[int]) -> Symbol:
    """What each stream leaves unexplained of latents [batch, ...], as a share of their square; [batch, streams, 1].

    Args:
        latents: float32.
        past: of the streams.
        streams, depth: sizes.
        crop: dimensions in which outputs may be of another size than latents: what is more is left out.
    """
    vectors = past.latents.insert(2)
    outputs = past.outputs
    for axis in crop:
        if outputs is None:
            break
        size = latents.size(axis)._node("Min", outputs.size(axis + 2))
        latents, vectors = latents.first(size, axis), vectors.first(size, axis + 2)
        outputs = outputs.first(size, axis + 2)
    rows = latents.reshape([0, -1])
    vectors = vectors.reshape([0, streams, 1, -1])
    count = 1
    if outputs is not None:
        vectors, count = concat([vectors, outputs.reshape([0, streams, depth, -1])], axis=2), 1 + depth
    pool = vectors.reshape(concat([rows.like(np.array([-1])), rows.size(1)], axis=0))
    mask = _usable(rows, past, streams, count)

    # All products at once: OpenVINO takes a factor that is made of states alone for a constant (2026.4).
    every = concat([pool, rows], axis=0)
    products = every.times(every)
    number = pool.size(0)
    target = products.take(rows.size(0).counted() + number).first(number, 1)
    products = products.first(number, 0).first(number, 1)

    square = (pool * pool).sum(1)
    finite = (square > 0.0) & (rows.like(3e38) >= square)
    unit = finite.where(square.like(1.0) / square.sqrt(), 0.0)
    products = finite.insert(1).where(finite.where(products, 0.0) * unit, 0.0) * unit.insert(1)
    target = (finite.where(target, 0.0) * unit).insert(1)
    total = (rows * rows).sum(1, keep=True).insert(1)
    flat = concat([rows.like(np.array([-1])), number], axis=0)
    every_total = (mask.any(2, keep=True).where(0.0, 0.0) + total).reshape([-1, 1])
    explained = _explained(products, mask.where(target, 0.0).reshape(flat), mask.reshape(flat), every_total)
    return (total - explained.reshape([-1, streams, 1])) / total


def _usable(rows: Symbol, past: Past, streams: int, count: int) -> Symbol:
    """Which vectors may explain the latents of each stream's image, bool [batch, streams, batch * streams * count]."""
    batch = rows.size(0).counted()
    own = batch.reshape([-1, 1, 1, 1]).equals(batch.reshape([1, 1, -1, 1]))
    numbers = np.arange(streams)
    own = own & own.like(numbers.reshape(1, -1, 1, 1) == numbers.reshape(1, 1, 1, -1))
    first = np.arange(count).reshape(1, 1, 1, 1, -1) == 0
    place = np.maximum(np.arange(count) - 1, 0).reshape(1, 1, -1) + 0.5
    known = (past.known > place).insert(0, 1)
    each = own.insert(4) & known
    rest = past.shared.insert(4) & known & known.like(~first)
    size = rows.size(1).float()
    enough = size >= (each | rest).float().sum(2, 3, 4, keep=True) * float(FEWEST)
    some = size >= float(FEWEST * count)
    found = each & (each.like(first) | some) | (rest & enough)
    return found.reshape([0, streams, -1])


def _explained(products: Symbol, target: Symbol, mask: Symbol, total: Symbol) -> Symbol:
    """How much of squares is in the span of vectors: least squares by conjugate gradients on the normal equations; [rows, 1].

    Args:
        products: of the vectors, which have norm 1, [vectors, vectors].
        target: products with what is to be explained, [rows, vectors], 0 where masked.
        mask: which vectors count.
        total: the squares, [rows, 1].
    """
    rest = step = target
    left = (rest * rest).sum(1, keep=True)
    explained = left * 0.0
    for _ in range(_STEPS):
        moved = mask.where(step.times(products), 0.0)
        curve = (step * moved).sum(1, keep=True)
        going = (left > total * 1e-10) & (curve > (step * step).sum(1, keep=True) * 1e-7)
        pace = going.where(left / curve, 0.0)
        explained = explained + pace * left
        rest = rest - pace * moved
        after = (rest * rest).sum(1, keep=True)
        step = rest + step * going.where(after / left, 0.0)
        left = after
    return explained
