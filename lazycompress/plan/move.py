"""A calibration for other timesteps and other samplers: interpolated in time, without a call of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..errors import InputError
from .calibration import Calibration, Floats
from .price import Ints

#: `reach(timesteps)`: how far an error of each call's output gets into the final latents, for these calls: float64 [T].
Reach = Callable[[Sequence[float]], Floats]


#: Calls that plans are made for, at most: what is looked at grows with their square.
MOST_CALLS = 2048


def moved(
    calibration: Calibration,
    timesteps: Sequence[float] | None,
    streams: Sequence[int] | None = None,
    reach: Reach | None = None,
) -> Calibration:
    """The calibration for other calls: predictions by splines in time, gains in the logarithm.

    Args:
        calibration: of the model.
        timesteps: of the other calls; None: its own.
        streams: of these calls, each of which the calibration has seen; left out, its own for its own timesteps, else all
            calls are of its first stream.
        reach: of the sampler that makes them; left out, that of the calibration, by step size.

    Raises:
        InputError: timesteps that are not finite or more than `MOST_CALLS`, a stream that is unknown, or a reach of another
            length.
    """
    own = timesteps is None or tuple(timesteps) == calibration.timesteps
    times = np.array(calibration.timesteps if timesteps is None else timesteps, dtype=np.float64)
    if not len(times) or not np.isfinite(times).all():
        raise InputError("plans are for one timestep or more, all of them finite numbers")
    if len(times) > MOST_CALLS:
        raise InputError(f"plans are for at most {MOST_CALLS} calls of an image; there were {len(times)}")
    if streams is None:
        streams = calibration.streams if own else (calibration.streams[0],) * len(times)
    if len(streams) != len(times):
        raise InputError(f"each timestep has a stream: there were {len(times)} timesteps and {len(streams)} streams")
    unknown = set(streams) - set(calibration.streams)
    if unknown:
        raise InputError(f"the calibration has no stream {min(unknown)}; it has {sorted(set(calibration.streams))}")
    if not own or tuple(streams) != calibration.streams:
        calibration = _interpolated(calibration, times, np.array(streams, dtype=np.int64))
    if reach is not None:
        found = np.asarray(reach([float(t) for t in times]), dtype=np.float64)
        if found.shape != times.shape:
            raise InputError(f"reach gave {list(found.shape)} numbers for {len(times)} timesteps")
        calibration = replace(calibration, reach=found)
    return calibration


def _interpolated(calibration: Calibration, times: Floats, streams: Ints) -> Calibration:
    old_times, old_streams = np.array(calibration.timesteps), np.array(calibration.streams)
    into = np.zeros((len(times), len(old_times)))
    line = np.zeros_like(into)
    density = np.zeros(len(times))
    for stream in np.unique(streams):
        old, new = np.flatnonzero(old_streams == stream), np.flatnonzero(streams == stream)
        at, first = np.unique(old_times[old], return_index=True)
        known = old[first]
        into[np.ix_(new, known)] = _cubic(at, times[new])
        line[np.ix_(new, known)] = _linear(at, times[new])
        density[new] = _step_sizes(times[new]) / (line[np.ix_(new, known)] @ _step_sizes(old_times[old])[first])
    smooth, rough = _parts(calibration.gram, old_times, old_streams)
    gram = into @ smooth @ into.T
    # What does not follow from one call to the next is drawn anew at each call.
    diagonal = np.arange(len(times))
    gram[:, diagonal, diagonal] += rough @ line.T
    return replace(
        calibration,
        timesteps=tuple(float(t) for t in times),
        streams=tuple(int(s) for s in streams),
        gram=gram,
        reach=(line @ calibration.reach) * density,
        gain=np.exp(line @ np.log(calibration.gain)),
    )


def _parts(gram: Floats, times: Floats, streams: Ints) -> tuple[Floats, Floats]:
    """Gram matrices [B, T, T] of what is smooth in time, and mean squares [B, T] of what is rough."""
    calls = len(times)
    smoother = np.eye(calls)
    freedom = np.ones(calls)
    for stream in np.unique(streams):
        own = np.flatnonzero(streams == stream)
        if len(own) < 8:
            continue
        for k, call in enumerate(own):
            begin = min(max(0, k - 3), len(own) - 7)
            near = own[begin : begin + 7]
            off = times[near] - times[call]
            scale = np.abs(off).max() or 1.0
            row = np.linalg.pinv(np.vander(off / scale, 5, increasing=True))[0]
            smoother[call] = 0.0
            smoother[call, near] = row
            rest = -row
            rest[near == call] += 1.0
            freedom[call] = max(float(rest @ rest), 1e-3)
    smooth = smoother @ gram @ smoother.T
    off_matrix = np.eye(calls) - smoother
    rough = np.einsum("ts,bsu,tu->bt", off_matrix, gram, off_matrix).clip(0.0) / freedom
    return smooth, rough


def _cubic(at: Floats, times: Floats) -> Floats:
    """Weights [n, m] of values at `at` (ascending, different) at other times: cubic through the four around; level outside."""
    if len(at) < 4:
        return _linear(at, times)
    inside = np.clip(times, at[0], at[-1])
    begin = np.clip(np.searchsorted(at, inside) - 2, 0, len(at) - 4)
    found = np.zeros((len(times), len(at)))
    rows = np.arange(len(times))
    for i in range(4):
        weight = np.ones(len(times))
        for j in range(4):
            if i != j:
                weight *= (inside - at[begin + j]) / (at[begin + i] - at[begin + j])
        found[rows, begin + i] = weight
    return found


def _linear(at: Floats, times: Floats) -> Floats:
    """Weights [n, m] of values at `at` (ascending) at other times: between the two around; level outside."""
    return np.stack([np.interp(times, at, unit) for unit in np.eye(len(at))], axis=1)


def _step_sizes(times: Floats) -> Floats:
    """How much time each call stands for; calls at one time share it."""
    if len(times) < 2:
        return np.ones(len(times))
    return np.asarray(np.abs(np.gradient(times)).clip(1e-12))
