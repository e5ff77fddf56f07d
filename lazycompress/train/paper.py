"""The paper's own training (LazyDiT, arXiv 2412.12444): two steps, soft blend, one gate per step and branch.

1. Dense sampling runs give the model's inputs at every step: a sampler is at hand for any model, a data set is not. Or real
   images do, with noise added, as in the paper.
2. An update takes one step: the dense model at the step before fills the caches and gives the input of this step; the
   loss is the squared difference between the dense output and that of the model with each branch blended,
   `keep F(Z) + (1 - keep) cache`, plus a penalty on the keep-scores.
3. The paper sets the penalty by hand. Here it rises while more than the target's share of the scores say "compute" and
   falls otherwise, and the threshold is put where hard decisions in the sampler's own loop meet the target.

Where it departs from the released code: every step's gate is trained, scores take the mean over tokens, and the learning
rate makes up for that (1e-4 per token of the first stream).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..gates import FORBIDDEN, Gates
from ..noise import own_noise
from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler, first_tensor
from .checkpoint import Checkpoint, about
from .distributed import Group
from .latents import RealLatents, Recorded, Source
from .memory import check_memory, training_mode
from .runs import errors_of_gates, progress_bar
from .trainer import TrainReport, clock_times, excluded_branches, tell_calls_apart

UPDATES = 500
RUNS = 4
LEARNING_RATE = 1e-4
#: Change of the penalty's logarithm per update and unit of excess.
PENALTY_RATE = 0.2
#: A training that is cut off loses at most so many updates, if it has a checkpoint.
KEEP_EVERY = 10
#: The checkpoint's name for the state of the updates.
KEPT = "updates"


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
    group = Group.find()
    updates = max(1, round(UPDATES * recipe.train.effort))
    seed = recipe.train.seed * 1_000_003 + 1
    with own_noise(), progress_bar(RUNS + updates, "step", progress and group.main) as bar:
        lazy.gates.order.fill_(0)
        calls = tell_calls_apart(lazy, sampler)
        check_memory(lazy, sampler, recipe, 1, group)
        checkpoint = Checkpoint(recipe.train.checkpoint, about(lazy, recipe, calls[0]), group.main)
        source: Source
        if recipe.train.latents and recipe.sampling is not None:
            source = RealLatents(recipe.train.latents, recipe.sampling, lazy)
            bar.advance(RUNS)
        else:
            source = Recorded()
            for k in range(RUNS):
                source.add(lazy, sampler, seed + k)
                bar.advance()
        lazy.set_gates(_new_gates(lazy, recipe, excluded, calls[0]))
        update = _Update(lazy, recipe, group, source, seed)
        kept = group.same(checkpoint.get(KEPT))
        first = 0 if kept is None else update.take_up(kept)
        bar.advance(first)
        for k in range(first, updates):
            update()
            bar.advance()
            bar.show(error=f"{update.error:.1e}", skipped=f"{update.skipped:.1%}", penalty=f"{update.penalty:.1e}")
            if group.main and (k + 1) % KEEP_EVERY == 0:
                checkpoint.put(KEPT, update.kept(k + 1))
        ratio = set_threshold(lazy, sampler, recipe.targets[0], seed + RUNS)
        judged = errors_of_gates(lazy, sampler, [seed + RUNS + 1])
    forwards = (5.0 + source.forwards) * updates * group.size + len(calls[0]) * (RUNS + 12)
    return TrainReport.of(
        recipe.targets[0],
        judged,
        macs_ratio=ratio,
        forwards=forwards,
        seconds=time.perf_counter() - started,
        history=[float(judged.errors.mean())],
    )


class _Update:
    """One update of the gates at a time. Processes draw pairs of their own and share the mean of their gradients.

    Attributes:
        penalty: on the share of scores that say "compute".
        error: of the last update. skipped: share of the MACs that its scores would reuse.
    """

    def __init__(self, lazy: LazyModel, recipe: Recipe, group: Group, source: Source, seed: int) -> None:
        self.lazy = lazy
        self.recipe = recipe
        self.group = group
        self.source = source
        macs = torch.tensor([float(branch.macs) for branch in lazy.branches])
        self.share = macs / macs.sum()
        stream = lazy.branches[0].streams[0]
        tokens = max(1, stream.entry.meta["val"][0].numel() // stream.width)
        self.optimiser = torch.optim.AdamW(lazy.gates.parameters(), lr=LEARNING_RATE * tokens, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.penalty = 1e-7
        self.error = self.skipped = 0.0

    def __call__(self) -> None:
        # Every process draws the pairs of all, and works on its own.
        states = torch.randint(2**62, (self.group.size,), generator=self.generator)
        pair = self.source.pair(torch.Generator().manual_seed(int(states[self.group.rank])))
        with training_mode(self.lazy, self.recipe):
            error, scores = _distance(self.lazy, *pair)
        keep = 1 - torch.stack([scores[b].float() for b in range(len(self.share))])
        loss = error.float() + self.penalty * (keep.mean(dim=1) * self.share.to(keep)).sum() * len(self.share)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.lazy.gates.bias.grad = None  # the paper's gates have none
        for weight in self.lazy.gates.weights:
            if weight.grad is not None:
                weight.grad = self.group.mean(weight.grad)
        self.optimiser.step()
        computed = ((keep >= 0.5).float().mean(dim=1) * self.share.to(keep)).sum()
        error, computed = self.group.mean(torch.stack([error.detach().float(), computed])).tolist()
        excess = computed - self.recipe.targets[0]
        self.error, self.skipped = error, 1 - computed
        self.penalty = min(1e3, max(1e-9, self.penalty * math.exp(PENALTY_RATE * excess)))

    def kept(self, done: int) -> dict[str, Any]:
        """All that the next update depends on."""
        return {
            "done": done,
            "gates": dict(self.lazy.gates.state_dict()),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "penalty": self.penalty,
        }

    def take_up(self, kept: dict[str, Any]) -> int:
        """Go on from what `kept` gave; returns how many updates it had done."""
        self.lazy.gates.load_state_dict(kept["gates"])
        self.optimiser.load_state_dict(kept["optimiser"])
        self.generator.set_state(kept["generator"])
        self.penalty = kept["penalty"]
        return int(kept["done"])


def _distance(lazy: LazyModel, before: tuple[Any, Any], now: tuple[Any, Any]) -> tuple[Tensor, dict[int, Tensor]]:
    """Mean squared difference between the blended and the dense output at `now`, and the scores of the branches."""
    blend = _Blend()
    lazy.reset()
    with lazy.programs.controlled(blend):
        with torch.no_grad():
            _ = lazy(*before[0], **before[1])
            first = dict(blend.kept)  # the next call overwrites it
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


def _new_gates(lazy: LazyModel, recipe: Recipe, excluded: list[int], timesteps: list[float]) -> Gates:
    direction = int(lazy.gates.direction)
    grid = torch.tensor(clock_times(lazy, timesteps))
    gates = Gates([b.name for b in lazy.branches], [b.width for b in lazy.branches], grid, direction)
    gates.phase.copy_(lazy.gates.phase.cpu())
    gates.kind = recipe.train.gate
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
