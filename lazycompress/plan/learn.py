"""Learn a plan: calibrate, search, and keep what wins on held-out noise."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..sampling import Sampler
from .calibration import Calibration, Floats
from .fit import fit
from .forecasts import Order
from .judge import Judgement, Reference, judge_against, refer
from .plan import Plan
from .record import Denoise, Read, calibrate
from .search import Guards, evens, plans_for, predict

#: Held-out noise begins this far from the calibration's.
HELD_OUT = 100_000

#: How much of the differences between the gains of calls plans are searched with. Gains are responses to small errors; where a
#: plan steers an image far, an early call may matter less than they say, and a long gap between late ones more.
BELIEVED = (1.0, 0.5, 0.0)

#: An even plan is not tried that is priced at so many times the best one.
HOPELESS = 2.0

#: Plans that are tried on as many images again: among sixteen, one image may decide.
FINALISTS = 3


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

    def __str__(self) -> str:
        return (
            f"{self.share:.0%} of the calls computed (target {self.target:.0%}): error {self.error:.1e}, "
            f"{self.relative:.1e} of the images' size, PSNR {self.psnr:.1f} dB, {self.psnr_worst:.1f} dB at the worst "
            f"percentile, even calls {self.even:.1e}; {self.calls} calls ({self.runs:.1f} dense runs), "
            f"{self.seconds:.0f} s"
        )


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
    guards: Guards | None = None,
    orders: Sequence[Order] = (0, 1, 2),
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
        guards: that the plan keeps to.
        orders: forecasts to choose from, see `Plan.order`.
        budget: calls to spend in all, in dense runs of the calibration's images. The even plans that may be the best of them are
            always judged.

    Raises:
        InputError: see `calibrate` and `plan_for`.
    """
    started = time.perf_counter()
    spent = 0
    if calibration is None:
        share = max(2.0, 0.65 * budget)
        calibration = calibrate(
            denoise,
            sampler,
            read=read,
            images=images,
            seed=seed,
            progress=progress,
            budget=share,
            checkpoint=checkpoint,
        )
        spent = calibration.calls
    candidates = _candidates(calibration, target, orders, guards, seed)
    calls = len(calibration.timesteps)
    count = len(calibration.image)
    reference = _refer(denoise, sampler, read, seed + HELD_OUT, count)
    per_run = calls * len(reference.finals)
    spent += reference.calls
    judged: list[Judgement] = []
    ends = guards or Guards()
    equal = _promising(calibration, [plan for plan in evens(calibration, target, orders) if ends.keeps(plan)])
    final = per_run + sum(sorted((plan.share for plan in candidates), reverse=True)[:FINALISTS]) * per_run
    for plan in dict.fromkeys((*equal, *candidates)):
        if len(judged) > len(equal) and spent + plan.share * per_run + final > budget * per_run:
            break
        judged.append(judge_against(reference, denoise, sampler, plan))
        spent += judged[-1].calls
    if len(judged) > 1 and spent + final <= budget * per_run:
        more = _refer(denoise, sampler, read, seed + HELD_OUT + len(reference.finals), count)
        spent += more.calls
        for k in _finalists(_sizes(judged), len(equal)):
            again = judge_against(more, denoise, sampler, judged[k].plan)
            spent += again.calls
            judged[k] = judged[k].and_also(again)
    sizes = _sizes(judged)
    most = max(len(j.errors) for j in judged)
    tried = [k for k, j in enumerate(judged) if len(j.errors) == most]
    winner = judged[min(tried, key=lambda k: float(sizes[k]))]
    even = min((float(judged[k].errors.mean()) for k in tried if k < len(equal)), default=float("nan"))
    report = PlanReport(
        target=target,
        share=winner.plan.share,
        error=float(winner.errors.mean()),
        relative=float(winner.errors.mean() / max(winner.image.mean(), 1e-300)),
        psnr=float(np.median(winner.psnr)),
        psnr_worst=float(np.quantile(winner.psnr, 0.01, method="lower")),
        even=even,
        calls=spent,
        runs=spent / per_run,
        seconds=time.perf_counter() - started,
    )
    believed = calibration.evened(candidates.get(winner.plan, 1.0))
    return Learned(winner.plan, _scaled(believed, judged, sizes), report)


def _candidates(
    calibration: Calibration, target: float, orders: Sequence[Order], guards: Guards | None, seed: int
) -> dict[Plan, float]:
    """Plans to try, the most promising first, and how much of the gains' differences each was searched with."""
    found: dict[Plan, float] = {}
    for share in BELIEVED:
        count = len(orders) + (share == 1.0)
        believed = calibration.evened(share)
        for plan in plans_for(believed, target, orders=orders, guards=guards, count=count, seed=seed):
            found.setdefault(fit(believed, plan), share)
    return found


def _promising(calibration: Calibration, equal: list[Plan]) -> list[Plan]:
    """Even plans that may be the best of them: runs of the others are better spent on a candidate."""
    prices = [float(predict(calibration, plan).mean()) for plan in equal]
    most = HOPELESS * min(prices, default=0.0)
    return [plan for plan, price in zip(equal, prices, strict=True) if price <= most]


def _refer(denoise: Denoise, sampler: Sampler, read: Read, seed: int, images: int) -> Reference:
    """Dense runs of this seed and those after it, of so many images at least."""
    found = refer(denoise, sampler, read=read, seeds=[seed])
    while found.images < images:
        found = refer(denoise, sampler, read=read, seeds=[seed + len(found.finals)], more=found)
    return found


def _finalists(sizes: Floats, equal: int) -> list[int]:
    """The best plans, and the best even one (of those that come first) among them: what is reported of both is comparable."""
    best = [int(k) for k in sizes.argsort()[:FINALISTS]]
    if equal and min(best) >= equal:
        best[-1] = int(sizes[:equal].argmin())
    return best


def _sizes(judged: Sequence[Judgement]) -> Floats:
    """Error of each plan: mean over the images, and the same with large errors damped, one as good as the other.

    A mean alone would be decided by one image out of sixteen.
    """
    scale = 4 * min(float(np.median(j.errors)) for j in judged) or 1e-300
    damped = [scale * np.log1p(j.errors / scale).mean() for j in judged]
    means = [j.errors.mean() for j in judged]
    return np.asarray(np.sqrt((np.array(means) + 1e-300) * (np.array(damped) + 1e-300)))


def _scaled(calibration: Calibration, judged: Sequence[Judgement], sizes: Floats) -> Calibration:
    """The calibration with the scale that true runs have for each order.

    Errors of forecasts of a high order are larger than priced where images are steered far: what is priced is a response to
    small errors.
    """
    logs: dict[Order, list[float]] = {}
    for judgement, size in zip(judged, sizes, strict=True):
        priced = float(predict(calibration, judgement.plan).mean())
        logs.setdefault(judgement.plan.order, []).append(math.log(size / (priced + 1e-300) + 1e-300))
    found = {order: math.exp(sum(own) / len(own)) for order, own in logs.items()}
    # Of an order that was not tried, nothing good is known.
    scale = [factor * found.get(order, max(found.values())) for order, factor in enumerate(calibration.scale)]
    return replace(calibration, scale=tuple(scale))
