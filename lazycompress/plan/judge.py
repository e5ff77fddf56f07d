"""What plans really do: true runs on noise that no calibration saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..sampling import Sampler
from .calibration import Floats
from .plan import Plan
from .runs import Denoise, Dense, Followed, Read, Reading, play, reading_of

#: Timesteps of a plan and of the calls may differ by rounding.
CLOSE = 1e-3


@dataclass(frozen=True, eq=False)
class Judgement:
    """True errors of a plan.

    Attributes:
        plan: that was followed.
        errors: mean squared error of the final latents to the dense ones, for each image: float64 [N].
        image: mean square of the dense final latents, for each image: float64 [N].
        peak: range (largest less smallest) of the dense final latents of each image: float64 [N].
        calls: of the model, those of the dense runs left out.
    """

    plan: Plan
    errors: Floats
    image: Floats
    peak: Floats
    calls: int

    def and_also(self, other: Judgement) -> Judgement:
        """Of the same plan, on the images of both."""
        return Judgement(
            self.plan,
            np.concatenate([self.errors, other.errors]),
            np.concatenate([self.image, other.image]),
            np.concatenate([self.peak, other.peak]),
            self.calls + other.calls,
        )

    @property
    def relative(self) -> Floats:
        """Errors as shares of the images' mean squares: float64 [N]."""
        return np.divide(self.errors, self.image, out=np.full_like(self.errors, np.inf), where=self.image > 0)

    @property
    def psnr(self) -> Floats:
        """Peak signal to noise ratio of each image, in dB, infinite where there is no error: float64 [N]."""
        with np.errstate(divide="ignore"):
            return np.asarray(10 * (2 * np.log10(self.peak) - np.log10(self.errors)))


@dataclass(frozen=True, eq=False)
class Reference:
    """Dense runs that plans are held against: final latents by seed, and the calls that they made."""

    finals: dict[int, Tensor]
    readings: tuple[Reading, ...]

    @property
    def calls(self) -> int:
        """Of the model, that the dense runs took."""
        return len(self.finals) * len(self.readings)

    @property
    def images(self) -> int:
        """In all runs together."""
        return sum(len(final) for final in self.finals.values())


def judge(
    denoise: Denoise, sampler: Sampler, plans: Sequence[Plan], *, read: Read, seeds: Sequence[int]
) -> list[Judgement]:
    """Run the sampler under each plan, and densely, from the same noise.

    Args:
        denoise, sampler, read: see `calibrate`.
        plans: for the calls that the sampler makes.
        seeds: one run of the sampler's batch for each.

    Raises:
        InputError: a plan does not fit the calls that the sampler makes, or an output is not finite.
    """
    reference = refer(denoise, sampler, read=read, seeds=seeds)
    return [judge_against(reference, denoise, sampler, plan) for plan in plans]


def refer(
    denoise: Denoise, sampler: Sampler, *, read: Read, seeds: Sequence[int], more: Reference | None = None
) -> Reference:
    """Dense runs of these seeds, and those of another reference."""
    if not seeds:
        raise InputError("plans are judged on one seed or more; there was none")
    dense = Dense(denoise, read)
    seen: list[Reading] = []
    finals = {} if more is None else dict(more.finals)
    for seed in seeds:
        seen.clear()

        def answer(call: int, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            seen.append(reading_of(read, args, kwargs))
            return dense(call, args, kwargs)

        finals[seed] = play(sampler, denoise, answer, seed).cpu().double()
    return Reference(finals, tuple(seen))


def judge_against(reference: Reference, denoise: Denoise, sampler: Sampler, plan: Plan) -> Judgement:
    """True errors of a plan on the noise of a reference."""
    _check(plan, reference.readings)
    errors, calls = [], 0
    for seed, dense in reference.finals.items():
        followed = Followed(denoise, plan)
        final = play(sampler, denoise, followed, seed).cpu().double()
        errors.append((final - dense).flatten(1).square().mean(dim=1))
        calls += followed.calls
    finals = torch.cat([final.flatten(1) for final in reference.finals.values()])
    found = torch.cat(errors).numpy()
    if not np.isfinite(found).all():
        raise InputError(
            "the final latents under a plan are not finite: the sampler does not take forecasts of this order"
        )
    peak = (finals.amax(dim=1) - finals.amin(dim=1)).numpy()
    return Judgement(plan, found, finals.square().mean(dim=1).numpy(), peak, calls)


def _check(plan: Plan, readings: Sequence[Reading]) -> None:
    if len(plan.timesteps) != len(readings):
        raise InputError(
            f"the plan is for {len(plan.timesteps)} calls of an image, and the sampler makes {len(readings)}"
        )
    scale = max(abs(reading.timestep) for reading in readings) or 1.0
    for call, (timestep, stream, reading) in enumerate(zip(plan.timesteps, plan.streams, readings, strict=True)):
        if abs(timestep - reading.timestep) > CLOSE * scale or stream != reading.stream:
            raise InputError(
                f"the plan's call {call + 1} is at timestep {timestep:g} of stream {stream}, and the sampler's at "
                f"{reading.timestep:g} of stream {reading.stream}: plan for the timesteps that the sampler makes"
            )
