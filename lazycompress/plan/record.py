"""Calibrate a model inside the user's own denoising loop, forward only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..errors import InputError
from ..sampling import Sampler
from .calibration import Calibration, Floats, hash_of
from .kept import Kept, about
from .mixing import Mixing, mixing_of
from .respond import Skip, gain_of, respond, skips_of
from .runs import Denoise, Dense, Read, Reading
from .tape import Tape, check_repeats, record

__all__ = ["Denoise", "Read", "Reading", "calibrate"]


def calibrate(
    denoise: Denoise,
    sampler: Sampler,
    *,
    read: Read,
    images: int = 16,
    seed: int = 0,
    progress: bool = True,
    budget: float = 15.0,
    checkpoint: str | Path | None = None,
) -> Calibration:
    """Record dense runs of the sampler and measure how the model responds to calls that are forecast.

    Beyond what sampling takes, memory is needed for the outputs of one run, on the CPU.

    Args:
        denoise: computes one call. It is only run, without gradients, in the precision and the place that it has.
        sampler: runs one denoising loop with the callable it is given in the model's place, and returns the final latents
            [batch, ...]; draws new noise from torch's global generator.
        read: the timestep of a call, and its stream if there are several.
        images: to look at, at least; the sampler runs as often as it takes.
        seed: of the noise; runs take this one and those after it.
        progress: show a bar with the time left, and say how many calls there will be and how much memory they take.
        budget: calls to spend, in dense runs of all images; at least 2. What is useful is spent: 8 or 9.
        checkpoint: a folder in which finished runs are kept. A calibration that was cut off goes on from it: it repeats the
            dense run it was at, and none of the others.

    Raises:
        InputError: the sampler does not fit, or an output is not finite: names the call.
        ExportError: the checkpoint cannot be written.
    """
    if images < 1 or not budget >= 2:
        raise InputError(
            f"a calibration has an image at least, and a budget of 2 runs; there were {images} and {budget}"
        )
    weights = hash_of(denoise)
    kept = Kept(checkpoint, about(images, seed, budget, weights))
    dense = Dense(denoise, read)
    with tqdm(desc="calibrating", unit="call", disable=not progress) as bar:
        dense.advance = bar.update
        loop = _Loop(denoise, sampler, read, dense, kept)
        first = _recorded(loop, 0, seed, None)
        batch, calls = len(first.image), len(first.readings)
        runs = -(-images // batch)
        skips = [_dealt(first, budget, run, runs) for run in range(runs)]
        total = runs * calls + sum(skip.cost(calls) for own in skips for skip in own)
        if progress:
            bar.total = total
            where = f", and {first.bytes / 2**20:.1f} MiB for the outputs of a run" if first.bytes else ""
            tqdm.write(f"calibrating: {total} calls of the model for {runs * batch} images{where}", file=sys.stderr)
        found = [_responses(loop, 0, first, skips[0])]
        recorded = [first.without_tape()]
        for run in range(1, runs):
            other = _recorded(loop, run, seed + run, first)
            found.append(_responses(loop, run, other, skips[run]))
            recorded.append(other.without_tape())
    responses = [response for own in found for response in own]
    return Calibration(
        timesteps=tuple(reading.timestep for reading in first.readings),
        streams=tuple(reading.stream for reading in first.readings),
        gram=np.concatenate([run.gram for run in recorded]),
        reach=first.mixing.reach,
        gain=gain_of(calls, [skip for own in skips for skip in own], responses),
        image=np.concatenate([run.image for run in recorded]),
        weights=weights,
        calls=total,
    )


@dataclass(frozen=True, eq=False)
class _Loop:
    """What every run needs."""

    denoise: Denoise
    sampler: Sampler
    read: Read
    dense: Dense
    kept: Kept

    def tape(self, seed: int) -> Tape:
        return record(self.dense, self.denoise, self.sampler, self.read, seed)


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A dense run: what is kept of it, and its tape while it is needed; a run that was read from a checkpoint has none."""

    seed: int
    readings: tuple[Reading, ...]
    gram: Floats
    image: Floats
    mixing: Mixing
    bytes: int
    tape: Tape | None

    def without_tape(self) -> _Recorded:
        return _Recorded(self.seed, self.readings, self.gram, self.image, self.mixing, self.bytes, None)


def _dealt(first: _Recorded, budget: float, run: int, runs: int) -> list[Skip]:
    """Skips of one of the runs: all measure the same number, at calls of their own where there are several runs."""
    streams = [reading.stream for reading in first.readings]
    # Half a run's worth is left over: a resumed calibration records one run again.
    return skips_of(streams, (budget - 1.5) * len(streams), phase=run / runs)


def _recorded(loop: _Loop, run: int, seed: int, first: _Recorded | None) -> _Recorded:
    """A dense run, from the checkpoint if it is there.

    Raises:
        InputError: it makes other calls than the first one.
    """
    name = f"dense-{run}"
    old = loop.kept.get(name)
    if old is not None and {"readings", "gram", "image", "samples", "weights", "reach", "bytes"} <= set(old):
        readings = tuple(Reading(float(t), int(s)) for t, s in old["readings"])
        mixing = Mixing(old["samples"].astype(np.int64), old["weights"], old["reach"])
        return _Recorded(seed, readings, old["gram"], old["image"], mixing, int(old["bytes"].item()), None)
    tape = loop.tape(seed)
    if first is not None and tape.readings != first.readings:
        raise InputError(
            f"the sampler made {len(first.readings)} calls at first and {len(tape.readings)} in run {run + 1}, or at other "
            "timesteps: planning needs a sampler whose runs all make the same calls"
        )
    check_repeats(tape, loop.denoise, loop.sampler)
    mixing = mixing_of(tape, loop.denoise, loop.sampler) if first is None else first.mixing
    if first is not None and len(first.image) != len(tape.final):
        raise InputError(f"the sampler made {len(first.image)} images at first, and {len(tape.final)} in run {run + 1}")
    image = tape.final.double().flatten(1).square().mean(dim=1).numpy()
    found = _Recorded(seed, tape.readings, gram_of(tape, mixing), image, mixing, tape.bytes, tape)
    arrays = {
        "readings": np.array(found.readings, dtype=np.float64),
        "gram": found.gram,
        "image": found.image,
        "samples": mixing.samples.astype(np.float64),
        "weights": mixing.weights,
        "reach": mixing.reach,
        "bytes": np.array([float(tape.bytes)]),
    }
    loop.kept.put(name, arrays)
    return found


def _responses(loop: _Loop, run: int, recorded: _Recorded, skips: Sequence[Skip]) -> list[Floats]:
    """Responses to the skips of one run, those in the checkpoint read."""
    tape = recorded.tape
    found = []
    for skip in skips:
        name = f"skip-{run}-{skip.calls[0]}-{len(skip.calls)}"
        old = loop.kept.get(name)
        if old is None or "response" not in old:
            if tape is None:
                tape = loop.tape(recorded.seed)
            old = {"response": respond(tape, recorded.mixing, skip, loop.dense, loop.denoise, loop.sampler)}
            loop.kept.put(name, old)
        found.append(old["response"])
    return found


def gram_of(tape: Tape, mixing: Mixing) -> Floats:
    """Mean products of the elements of all pairs of predictions, for each image: float64 [B, T, T]."""
    values = torch.stack(
        [mixing.prediction(tape.value(call), call, tape.final) for call in range(len(tape.outputs))], dim=1
    )
    # In single precision, small differences of large numbers would be lost; in blocks, memory stays small.
    gram = torch.zeros(values.shape[0], values.shape[1], values.shape[1], dtype=torch.float64)
    for block in torch.split(values, 65536, dim=2):
        exact = block.double()
        gram += exact @ exact.transpose(1, 2)
    found: Floats = (gram / values.shape[2]).numpy()
    return found
