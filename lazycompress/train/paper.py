"""The paper's own training (LazyDiT, arXiv 2412.12444): two steps, soft blend, one gate per step and branch.

1. Dense sampling runs give the model's inputs at every step. (The paper noises real images; a sampler is at hand for any
   model, a data set is not.)
2. An update takes one step: the dense model at the step before fills the caches and gives the input of this step; the
   loss is the squared difference between the dense output and that of the model with each branch blended,
   `keep F(Z) + (1 - keep) cache`, plus a penalty on the keep-scores.
3. The paper sets the penalty by hand. Here it rises while more than the target's share of the scores say "compute" and
   falls otherwise, and the threshold is put where hard decisions in the sampler's own loop meet the target.

Where it departs from the released code: every step's gate is trained, scores take the mean over tokens, and the learning
rate makes up for that (1e-4 per token of the first stream).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import RecipeError
from ..gate import FORBIDDEN, Gates
from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler, first_tensor
from .trainer import TrainReport, excluded_branches, tell_calls_apart
from .trajectory import run

UPDATES = 500
RUNS = 4
LEARNING_RATE = 1e-4
#: Change of the penalty's logarithm per update and unit of excess.
PENALTY_RATE = 0.2


class _Blend:
    """Controller: keeps what every branch computes; in the second of two calls, blends it with what the first gave."""

    def __init__(self) -> None:
        self.kept: dict[int, list[Tensor]] = {}
        self.scores: dict[int, Tensor] = {}
        self.blending = False

    def __call__(
        self, branch: int, score: Tensor, valid: Tensor, fresh: list[Tensor], caches: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        outputs = list(fresh)
        if self.blending:
            self.scores[branch] = score
            for k, (new, old) in enumerate(zip(fresh, self.kept[branch], strict=True)):
                lazy = score.repeat_interleave(new.shape[0] // score.shape[0]).to(new.dtype)
                lazy = lazy.reshape(-1, *[1] * (new.dim() - 1))
                outputs[k] = lazy * old + (1 - lazy) * new
        else:
            self.kept[branch] = [value.detach() for value in fresh]
        return outputs, torch.zeros_like(valid)


def train_paper(lazy: LazyModel, sampler: Sampler, recipe: Recipe, *, progress: bool = True) -> TrainReport:
    """Learn the gates of a lazy model as the paper does; arguments and errors as in `train_gates`."""
    started = time.perf_counter()
    excluded = excluded_branches(lazy, recipe.guards.exclude)
    generator_state = torch.get_rng_state()
    updates = max(1, round(UPDATES * recipe.train.effort))
    bar = tqdm(total=RUNS + updates, desc="learning gates", unit="step", disable=not progress)
    seed = recipe.train.seed * 1_000_003 + 1
    try:
        lazy.gates.order.fill_(0)
        tell_calls_apart(lazy, sampler)
        inputs = []
        for k in range(RUNS):
            inputs.append(_record(lazy, sampler, seed + k))
            bar.update()
        gates = _new_gates(lazy, recipe, excluded, inputs[0])
        lazy.set_gates(gates)
        macs = torch.tensor([float(branch.macs) for branch in lazy.branches])
        share = macs / macs.sum()
        tokens = max(1, lazy.branches[0].streams[0].entry.meta["val"][0].numel() // lazy.branches[0].streams[0].width)
        optimiser = torch.optim.AdamW(gates.parameters(), lr=LEARNING_RATE * tokens, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        penalty = 1e-7
        for _ in range(updates):
            calls = inputs[int(torch.randint(RUNS, (), generator=generator))]
            contexts = [c for c in calls if len(c) > 1]
            context = contexts[int(torch.randint(len(contexts), (), generator=generator))]
            step = 1 + int(torch.randint(len(context) - 1, (), generator=generator))
            error, scores = _distance(lazy, context[step - 1], context[step])
            keep = 1 - torch.stack([scores[b] for b in range(len(share))])
            loss = error + penalty * (keep.mean(dim=1) * share.to(keep)).sum() * len(share)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            gates.bias.grad = None  # the paper's gates have none
            optimiser.step()
            excess = float(((keep >= 0.5).float().mean(dim=1) * share).sum()) - recipe.target
            penalty = min(1e3, max(1e-9, penalty * float(torch.tensor(PENALTY_RATE * excess).exp())))
            bar.update()
            bar.set_postfix(error=f"{float(error.detach()):.1e}", penalty=f"{penalty:.1e}")
        ratio = set_threshold(lazy, sampler, recipe.target, seed + RUNS)
        lazy.reset()
        torch.manual_seed(seed + RUNS + 1)
        with torch.no_grad():
            image = sampler(lazy)
        torch.manual_seed(seed + RUNS + 1)
        errors = (image - run(lazy, sampler, None)).square().flatten(1).mean(dim=1)
        lazy.reset()
    finally:
        bar.close()
        torch.set_rng_state(generator_state)
    forwards = 5.0 * updates + len(gates.grid) * (RUNS + 12)
    return TrainReport(
        recipe.target, ratio, float(errors.mean()), float(errors.median()), float(errors.quantile(0.99)), forwards,
        time.perf_counter() - started, [float(errors.mean())],
    )  # fmt: skip


def _record(lazy: LazyModel, sampler: Sampler, seed: int) -> list[list[tuple[Any, Any]]]:
    """Arguments of every call of one dense sampling run, one list for each state that takes turns."""
    calls: dict[int, list[tuple[Any, Any]]] = {}

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(module.context, []).append((args, kwargs))

    hook = lazy.register_forward_hook(after, with_kwargs=True)
    torch.manual_seed(seed)
    try:
        _ = run(lazy, sampler, None)
    finally:
        hook.remove()
    return list(calls.values())


def _distance(lazy: LazyModel, before: tuple[Any, Any], now: tuple[Any, Any]) -> tuple[Tensor, dict[int, Tensor]]:
    """Mean squared difference between the blended and the dense output at `now`, and the scores of the branches."""
    blend = _Blend()
    lazy.reset()
    with lazy.controlled(blend):
        with torch.no_grad():
            _ = lazy(*before[0], **before[1])
            first = blend.kept
            dense = first_tensor(lazy(*now[0], **now[1]))
        blend.kept, blend.blending = first, True
        lazy.reset()
        frozen = [p for p in lazy.model.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            blended = first_tensor(lazy(*now[0], **now[1]))
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
    return (blended - dense).square().mean(), blend.scores


def _new_gates(lazy: LazyModel, recipe: Recipe, excluded: list[int], contexts: list[list[tuple[Any, Any]]]) -> Gates:
    timesteps: list[float] = []
    hook = lazy.register_forward_hook(lambda module, *_: timesteps.append(module.timestep))
    try:
        with torch.no_grad(), lazy.controlled(_Blend()):
            for args, kwargs in contexts[0]:
                _ = lazy(*args, **kwargs)
    finally:
        hook.remove()
    direction = int(lazy.gates.direction)
    gates = Gates([b.name for b in lazy.branches], [b.width for b in lazy.branches], torch.tensor(timesteps), direction)
    gates.phase.copy_(lazy.gates.phase.cpu())
    steps = len(timesteps)
    allowed = torch.ones(steps, len(lazy.branches), dtype=torch.bool)
    allowed[: recipe.guards.warmup_steps] = False
    allowed[max(0, steps - recipe.guards.last_steps) :] = False
    allowed[:, excluded] = False
    allowed = allowed.flip(0) if direction > 0 else allowed
    with torch.no_grad():
        gates.bias.copy_(torch.where(allowed.T, 0.0, FORBIDDEN))
    return gates.to(lazy.device)


def set_threshold(lazy: LazyModel, sampler: Sampler, target: float, seed: int) -> float:
    """The highest threshold, hence the best images, at which hard decisions compute at most the target's share."""

    def ratio(threshold: float) -> float:
        lazy.gates.threshold.fill_(threshold)
        lazy.reset()
        torch.manual_seed(seed)
        with torch.no_grad():
            _ = sampler(lazy)
        return lazy.summary().macs_ratio

    low, high = 0.0, 1.0
    if ratio(low) > target + 0.02:
        raise RecipeError(f"target {target}: the guards leave at most {1 - ratio(low):.0%} of the branch MACs to reuse")
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) <= target else (low, middle)
    return ratio(low)
