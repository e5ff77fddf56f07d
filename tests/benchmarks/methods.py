"""Other ways of spending fewer MACs, to compare with: published implementations where they accept the model.

Each is a function from a budget (computed share of the branches' MACs) to a `Run`. What counts as computed is measured on
the modules that ran, with hooks of this file, not taken from the method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lazycompress.plan.plan import Plan
from lazycompress.plan.runs import Followed, play
from lazycompress.runtime import LazyModel

Sample = Callable[[Any, Tensor, int], Tensor]
STEPS = 50


@dataclass(frozen=True)
class Run:
    """Images of a method, [N, ...], the computed share of the branches' MACs, and the processor seconds that sampling took."""

    images: Tensor
    ratio: float
    seconds: float


class NotAccepted(Exception):
    """A published implementation does not take the model; says why."""


def timed(sample: Sample, model: Any, noise: Tensor, steps: int, ratio: Callable[[], float]) -> Run:
    started = time.process_time()
    with torch.no_grad():
        images = sample(model, noise, steps)
    return Run(images, ratio(), time.process_time() - started)


@contextmanager
def counted(model: nn.Module, blocks: nn.ModuleList) -> Iterator[Callable[[], float]]:
    """MACs of the linear layers in the blocks that run, of attention and MLP alike; gives their share of a whole run.

    Layers that see one row per sample (modulation) are not part of a branch.
    """
    run = [0.0]
    once: dict[int, float] = {}

    def hook(module: nn.Linear, args: Any, output: Tensor) -> None:
        if output.dim() >= 3:
            macs = output.numel() / len(output) * module.in_features
            once[id(module)] = macs
            run[0] += macs * len(output)

    linears = [m for m in blocks.modules() if isinstance(m, nn.Linear)]
    handles = [linear.register_forward_hook(hook) for linear in linears]
    seen = [0]
    handles.append(
        model.register_forward_pre_hook(
            lambda m, a, k: seen.__setitem__(0, seen[0] + len(first_of(a, k))), with_kwargs=True
        )
    )
    try:
        yield lambda: run[0] / (sum(once.values()) * seen[0])
    finally:
        for handle in handles:
            handle.remove()


def first_of(args: Any, kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


# -- published implementations --------------------------------------------------------------------------------------


def first_block_cache(build: Callable[[], nn.Module], sample: Sample, noise: Tensor, target: float) -> Run:
    """First-block cache of diffusers: all blocks but the first are reused while the first one's output hardly moves."""
    from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache

    def run(threshold: float, noise: Tensor) -> Run:
        model = build()
        blocks = blocks_of(model)
        try:
            apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))
            HookRegistry.check_if_exists_or_initialize(model)._set_context("comparison")
        except Exception as error:
            raise NotAccepted(f"{type(error).__name__}: {error}") from None
        with counted(model, blocks) as share:
            return timed(sample, model, noise, STEPS, share)

    return run(bisect(lambda threshold: run(threshold, noise[:64]).ratio, target, 0.0, 1.0), noise)


def taylorseer(
    build: Callable[[], nn.Module], sample: Sample, noise: Tensor, target: float, order: int, names: list[str]
) -> Run:
    """TaylorSeer of diffusers, at the smallest interval that stays within the budget, or just above it."""
    from diffusers.hooks import HookRegistry, TaylorSeerCacheConfig, apply_taylorseer_cache

    if not names:
        raise NotAccepted("attention is no module of its own: there is nothing to hook")
    model = build()
    blocks = blocks_of(model)
    config = TaylorSeerCacheConfig(
        cache_interval=interval_for(target), disable_cache_before_step=3, max_order=order,
        taylor_factors_dtype=torch.float32, cache_identifiers=names,
    )  # fmt: skip
    apply_taylorseer_cache(model, config)
    HookRegistry.check_if_exists_or_initialize(model)._set_context("comparison")
    with counted(model, blocks) as share:
        return timed(sample, model, noise, STEPS, share)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.children() if isinstance(m, nn.ModuleList) and len(m) > 1)


def interval_for(target: float) -> int:
    """Calls from one computation to the next that come closest to a budget."""
    return max(2, round(1 / target))


def bisect(ratio: Callable[[float], float], target: float, low: float, high: float, rounds: int = 8) -> float:
    """The smallest argument at which a falling ratio is at most the target."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if ratio(middle) <= target else (middle, high)
    return high


# -- schedules, on the branches that were located -------------------------------------------------------------------


class Scheduled:
    """Controller that follows a schedule, bool [steps, branches], with forecasts of order 0, 1 or 2."""

    def __init__(self, lazy: LazyModel, schedule: np.ndarray, order: int) -> None:
        self.lazy, self.schedule, self.order = lazy, schedule, order
        self.history: dict[int, list[tuple[int, list[Tensor]]]] = {}
        self.call, self.step = -1, -1

    def __call__(
        self, branch: int, score: Tensor, valid: Tensor, fresh: list[Tensor], caches: Any
    ) -> tuple[list[Tensor], Tensor]:
        if self.call != self.lazy.usage.calls:
            self.call = self.lazy.usage.calls
            self.step = self.step + 1 if bool(valid.all()) else 0
            self.history = self.history if self.step else {}
        kept = self.history.setdefault(branch, [])
        reuse = bool(self.schedule[self.step, branch]) and bool(kept)
        if not reuse:
            kept.append((self.step, list(fresh)))
            del kept[: -1 - self.order]
            return list(fresh), torch.zeros_like(valid)
        times = [t for t, _ in kept]
        weights = [float(np.prod([(self.step - other) / (t - other) for other in times if other != t])) for t in times]
        parts = zip(*(values for _, values in kept), strict=True)
        outputs = [sum(w * v for w, v in zip(weights, values, strict=True)) for values in parts]
        # Not told: where all branches reuse, the graph would forecast the output.
        return outputs, torch.zeros_like(valid)  # type: ignore[return-value]


def follow(lazy: LazyModel, sample: Sample, noise: Tensor, schedule: np.ndarray, order: int) -> Run:
    """Images under a schedule. The branches are computed all the same, so the seconds say nothing."""
    lazy.reset()
    with lazy.programs.controlled(Scheduled(lazy, schedule, order)):
        run = timed(sample, lazy, noise, STEPS, lambda: share_of(lazy, schedule))
    return Run(run.images, run.ratio, float("nan"))


def planned(sample: Sample, model: nn.Module, noise: Tensor, plan: Plan) -> Run:
    """Images under a plan of whole calls."""
    followed = Followed(model, plan)
    steps = len(plan.timesteps)
    return timed(
        lambda m, x, n: play(lambda call: sample(call, x, n), m, followed, 0), model, noise, steps, lambda: plan.share
    )


def share_of(lazy: LazyModel, schedule: np.ndarray) -> float:
    macs = np.array([branch.macs for branch in lazy.branches], dtype=float)
    return float(1 - (schedule * macs).sum() / (macs.sum() * len(schedule)))


def smooth_cache(lazy: LazyModel, sample: Sample, noise: Tensor, target: float) -> np.ndarray:
    """SmoothCache (arXiv 2411.10510): one schedule per kind of branch, reused while its outputs hardly moved in calibration.

    The measure is the mean relative L1 distance between the outputs of two steps, averaged over the branches of the kind.
    """
    kinds = [branch.kind for branch in lazy.branches]
    outputs: list[list[Tensor]] = []

    def record(branch: int, score: Tensor, valid: Tensor, fresh: list[Tensor], caches: Any) -> Any:
        if branch == 0:
            outputs.append([])
        outputs[-1].append(fresh[0].detach())
        return list(fresh), torch.zeros_like(valid)

    lazy.reset()
    with torch.no_grad(), lazy.programs.controlled(record):
        sample(lazy, noise, STEPS)
    moved = np.zeros((len(kinds), STEPS, STEPS))
    for b in range(len(kinds)):
        for t in range(STEPS):
            for s in range(max(0, t - 8), t):
                change = (outputs[t][b] - outputs[s][b]).abs().mean() / outputs[t][b].abs().mean()
                moved[b, t, s] = float(change)

    def schedule_at(alpha: float) -> np.ndarray:
        schedule = np.zeros((STEPS, len(kinds)), dtype=bool)
        for kind in set(kinds):
            own = [b for b, k in enumerate(kinds) if k == kind]
            last = 0
            for t in range(1, STEPS):
                if t - last <= 8 and moved[own, t, last].mean() < alpha:
                    schedule[t, own] = True
                else:
                    last = t
        return schedule

    return schedule_at(bisect(lambda alpha: share_of(lazy, schedule_at(alpha)), target, 0.0, 2.0, 20))


def cache_dit_blocks(build: Callable[[], nn.Module], sample: Sample, noise: Tensor, target: float, order: int) -> Run:
    """The package cache-dit (first block always computed), with its TaylorSeer calibrator where `order` is above 0."""
    try:
        import cache_dit
        from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig
        from cache_dit.caching.patch_functors import DiTPatchFunctor
    except ImportError:
        raise NotAccepted("the package is not installed (pip install --no-deps cache-dit)") from None

    def run(threshold: float, noise: Tensor) -> Run:
        model = build()
        blocks = blocks_of(model)
        own = {"calibrator_config": TaylorSeerCalibratorConfig(taylorseer_order=order)} if order else {}
        with counted(model, blocks) as share:
            try:
                adapter = BlockAdapter(
                    pipe=None, transformer=model, blocks=blocks, forward_pattern=ForwardPattern.Pattern_3,
                    has_separate_cfg=False, patch_functor=DiTPatchFunctor(),
                )  # fmt: skip
                config = DBCacheConfig(
                    Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold,
                    num_inference_steps=STEPS, max_warmup_steps=2,
                )  # fmt: skip
                cache_dit.enable_cache(adapter, cache_config=config, **own)
            except Exception as error:
                raise NotAccepted(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None
            return timed(sample, model, noise, STEPS, share)

    return run(bisect(lambda threshold: run(threshold, noise[:64]).ratio, target, 0.0, 1.0), noise)
