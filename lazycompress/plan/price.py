"""What plans cost in error, by a calibration: thousands a second.

    error(plan) = scale(order) * sum over windows r of v_r' K v_r
    v_r = sum over calls t of phi_r(t) gain(t) reach(t) (A[t] - e_t)

`A[t]` are the weights with which call t is forecast from the computed ones (e_t where it computes) and `K` is the Gram matrix
of the predictions. Errors of calls near in time add up as they are; those far apart come out of the model in directions of
their own, so that they cannot be counted on to cancel: the windows `phi_r`, whose squares add up to one, say what is near.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from .calibration import Calibration, Floats
from .forecasts import HIGHEST_ORDER, Order, forecast_of, weights_of
from .plan import Plan, stream_of

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

#: Windows over the loop.
WINDOWS = 6


@dataclass(frozen=True, eq=False)
class Pricing:
    """Prices plans of one loop. T calls.

    Attributes:
        timesteps: of the calls, float64 [T].
        streams: of the calls, int64 [T].
        reacted: gain times reach, float64 [T].
        gram: mean product of the elements of the predictions of two calls, float64 [T, T], or of each image [B, T, T].
        windows: over the loop; of 1, all errors add up as they are, as they do where the model responds by a factor.
        scale: factor for the plans of each order.
    """

    timesteps: Floats
    streams: Ints
    reacted: Floats
    gram: Floats
    windows: int = WINDOWS
    scale: tuple[float, ...] = (1.0,) * (HIGHEST_ORDER + 1)

    @staticmethod
    def of(calibration: Calibration, windows: int = WINDOWS) -> Pricing:
        """With the Gram matrix of each image."""
        return Pricing(
            np.array(calibration.timesteps),
            np.array(calibration.streams, dtype=np.int64),
            calibration.reach * calibration.gain,
            calibration.gram,
            windows,
            calibration.scale,
        )

    def mean(self) -> Pricing:
        """With the mean over the images: what a search needs."""
        return replace(self, gram=self.gram.mean(axis=0))

    def plan(self, plan: Plan) -> Floats:
        """Mean squared error of the final latents: float64 [B]."""
        if not any(plan.fitted):
            return np.asarray(self.error(np.array([plan.computes]), plan.order)[0])
        return np.asarray(self._error((self.weighted @ made_of(plan) - self.weighted)[None], plan.order)[0])

    def error(self, computes: Bools, order: Order) -> Floats:
        """Of plans bool [M, T]: float64 [M], or [M, B] for a Gram matrix of each image."""
        return self._error(self.shifts(computes, order), order)

    def _error(self, shifts: Floats, order: Order) -> Floats:
        """Of what is in the final error, by window: float64 [M, windows, T]."""
        if self.gram.ndim == 2:
            return np.asarray(((shifts @ self.gram) * shifts).sum(axis=(1, 2)).clip(0.0) * self._scale(order))
        each = [((shifts @ gram) * shifts).sum(axis=(1, 2)) for gram in self.gram]
        return np.asarray(np.stack(each, axis=1).clip(0.0) * self._scale(order))

    def _scale(self, order: Order) -> float:
        """Of polynomials: a forecast of another package has none to be told from."""
        return 1.0 if isinstance(order, str) else self.scale[order]

    @cached_property
    def weighted(self) -> Floats:
        """Windows times what a call's error becomes: float64 [windows, T]."""
        return _windows(len(self.reacted), self.windows) * self.reacted

    def shifts(self, computes: Bools, order: Order) -> Floats:
        """How much of each prediction is in the final error, by window: float64 [M, windows, T]."""
        many, calls = computes.shape
        weighted = self.weighted
        found = np.zeros(len(weighted) * many * calls)
        rows = np.arange(len(weighted) * many).reshape(-1, many, 1) * calls
        for stream in np.unique(self.streams):
            own = np.flatnonzero(self.streams == stream)
            points, weights = points_of(computes[:, own], self.timesteps[own], order)
            for point, weight in zip(points, weights, strict=True):
                where = rows + own[np.maximum(point, 0)]
                found += np.bincount(where.ravel(), (weight * weighted[:, None, own]).ravel(), len(found))
        return np.asarray(found.reshape(-1, many, calls).swapaxes(0, 1) - weighted)


def made_of(plan: Plan) -> Floats:
    """Weights of all calls' outputs in what each call gives: float64 [T, T]."""
    made = np.zeros((len(plan.timesteps),) * 2)
    for stream in set(plan.streams):
        own = [k for k, other in enumerate(plan.streams) if other == stream]
        alone, computed = stream_of(plan, stream), list[int]()
        for call in own:
            if plan.computes[call]:
                computed.append(call)
                made[call, call] = 1.0
                continue
            past = [plan.timesteps[k] for k in computed]
            for position, weight in alone.forecast(past, plan.timesteps[call]):
                made[call, computed[position]] = weight
    return made


def points_of(computes: Bools, timesteps: Floats, order: Order) -> tuple[list[Ints], list[Floats]]:
    """The computed calls that each call is made of, and their weights: what `forecast` says, for many plans at once.

    Args:
        computes: of calls of one stream, bool [M, n].
        timesteps: of these calls, float64 [n].

    Returns:
        For each of the forecast's points: positions int64 [M, n], -1 where there is none, and weights float64 [M, n].
    """
    calls = len(timesteps)
    last = np.maximum.accumulate(np.where(computes, np.arange(calls), -1), axis=1)
    # Of several calls at one time the last one counts: the next point is sought before the first of them.
    starts = np.concatenate([[True], timesteps[1:] != timesteps[:-1]])
    before = np.maximum.accumulate(np.where(starts, np.arange(calls), 0)) - 1
    points = [last]
    for _ in range(forecast_of(order).points - 1):
        at = np.where(points[-1] >= 0, before[points[-1]], -1)
        points.append(np.where(at >= 0, np.take_along_axis(last, np.maximum(at, 0), axis=1), -1))
    times = [timesteps[np.maximum(point, 0)] for point in points]
    if isinstance(order, str):
        return points, _weights_one_by_one(points, times, timesteps, order)
    weights = []
    for i, point in enumerate(points):
        weight = np.where(point >= 0, 1.0, 0.0)
        for j, other in enumerate(points):
            if i != j:
                use = (point >= 0) & (other >= 0)
                gap = np.where(use, times[i] - times[j], 1.0)
                weight = weight * np.where(use, (timesteps - times[j]) / gap, 1.0)
        weights.append(weight)
    return points, weights


def _weights_one_by_one(points: list[Ints], times: list[Floats], timesteps: Floats, order: str) -> list[Floats]:
    """The weights of `points_of` for a forecast that only says them for one call at a time."""
    counts = np.stack([point >= 0 for point in points]).sum(axis=0)
    at = np.stack(times, axis=-1)
    found = np.zeros(at.shape)
    for m, call in np.argwhere(counts).tolist():
        if points[0][m, call] == call:
            found[m, call, 0] = 1.0  # it computes
        else:
            known = at[m, call, : counts[m, call]]
            found[m, call, : len(known)] = _weights(order, tuple(known.tolist()), float(timesteps[call]))
    return [found[..., k] for k in range(len(points))]


#: A search asks for the same weights again and again.
_weights = lru_cache(maxsize=1 << 16)(weights_of)


def _windows(calls: int, count: int) -> Floats:
    """Overlapping windows over the calls, [windows, T]: the sum of their squares is 1."""
    count = min(count, calls)
    if count < 2:
        return np.ones((1, calls))
    distance = np.abs(np.linspace(0, count - 1, calls) - np.arange(count)[:, None])
    return np.where(distance < 1, np.cos(distance * np.pi / 2), 0.0)
