"""Learn a plan: calibrate, search, and keep what wins on held-out noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..sampling import Sampler
from .calibration import Calibration
from .plan import Plan
from .record import Denoise, Read


@dataclass(frozen=True)
class PlanReport:
    """What learning found out; `str()` is one line.

    Attributes:
        target: share of the calls that was asked for.
        share: that the plan computes.
        error: mean squared error of the final latents on held-out noise, mean over the images.
        relative: the same, as a share of the dense latents' mean square.
        psnr: median over the images, in dB, against the range of the dense latents.
        psnr_worst: the lowest percentile of the images.
        even: error of the best even plan at the same share.
        calls: of the model that were spent.
        runs: the same in dense runs of the calibration's images.
        seconds: that learning took.
    """

    target: float
    share: float
    error: float
    relative: float
    psnr: float
    psnr_worst: float
    even: float
    calls: int
    runs: float
    seconds: float


@dataclass(frozen=True)
class Learned:
    """A plan, the calibration that it came from, and what is known about it."""

    plan: Plan
    calibration: Calibration
    report: PlanReport


def learn_plan(
    denoise: Denoise,
    sampler: Sampler,
    target: float,
    *,
    read: Read,
    calibration: Calibration | None = None,
    images: int = 16,
    seed: int = 0,
    progress: bool = True,
    budget: float = 15.0,
    checkpoint: str | Path | None = None,
) -> Learned:
    """The plan that wins on held-out noise, even plans among the candidates, and its report.

    Args:
        denoise, sampler, read, images, seed, progress, checkpoint: see `calibrate`.
        target: share of the calls to compute, in (0, 1].
        calibration: made before; left out, one is made.
        budget: calls to spend in all, in dense runs of the calibration's images.

    Raises:
        InputError: see `calibrate` and `plan_for`.
    """
    raise NotImplementedError
