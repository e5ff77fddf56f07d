"""What plans really do: true runs on noise that no calibration saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..sampling import Sampler
from .calibration import Floats
from .plan import Plan
from .record import Denoise, Read


@dataclass(frozen=True, eq=False)
class Judgement:
    """True errors of a plan.

    Attributes:
        plan: that was followed.
        errors: mean squared error of the final latents to the dense ones, for each image: float64 [N].
        image: mean square of the dense final latents about their mean, for each image: float64 [N].
        peak: range (largest less smallest) of the dense final latents of each image: float64 [N].
        calls: of the model, those of the dense runs left out.
    """

    plan: Plan
    errors: Floats
    image: Floats
    peak: Floats
    calls: int


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
    raise NotImplementedError
