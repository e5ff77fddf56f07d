"""Stage 4, train: gates that meet a budget, judged by the final image, in the user's own sampling loop.

1. Around the dense trajectory, the effects of every decision are measured and a schedule is filled up to the target.
2. Around that schedule, the effects are measured again, with reuse as it really happens, and decisions are exchanged.
   A round is kept only if the true error on held-out noise fell.
3. The schedule becomes the gates' bias table on the sampler's own timesteps: positive where a branch reuses. How far from
   zero says how early it would be given up or taken, so that `set_target` can move the threshold afterwards.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, RecipeError
from ..gate import Gates
from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler
from .schedule import Bools, Limits, Planner
from .trajectory import Effects, linearise, run

PROBES = 4
ROUNDS = 4
RUNS = 4
SWAPS = 8

#: Bias of a decision that must not be taken: sigmoid(-20) is below any threshold.
_NEVER = -20.0


@dataclass
class TrainReport:
    """What training did.

    Attributes:
        target: asked-for computed share of the branches' MACs.
        macs_ratio: computed share of the schedule found.
        error: mean squared error of held-out final latents to the dense ones; median and 99th percentile too.
        forwards: model calls spent, a backward pass counted as two.
        seconds: wall time.
        history: error after each round.
    """

    target: float
    macs_ratio: float
    error: float
    median: float
    p99: float
    forwards: float
    seconds: float
    history: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"learned in {self.seconds:.0f} s ({self.forwards:.0f} forward passes): {self.macs_ratio:.1%} of the branch MACs "
            f"computed, error to dense {self.error:.1e} (median {self.median:.1e}, 99th percentile {self.p99:.1e})"
        )


def train_gates(lazy: LazyModel, sampler: Sampler, recipe: Recipe, *, progress: bool = True) -> TrainReport:
    """Learn the gates of a lazy model; its weights are left as they are.

    Args:
        lazy: the model; its gates are replaced.
        sampler: runs one denoising loop with the model it is given, with gradients, and returns the final latents
            [batch, ...]; it draws its noise from torch's global generator, which is restored afterwards.
        recipe: target, guards and training section.
        progress: show a progress bar.

    Raises:
        InputError: no gradient reaches the model through the sampler, or it makes a varying number of calls.
        RecipeError: a pattern of `guards.exclude` matches no branch, or the guards leave too little to reuse.
    """
    started = time.perf_counter()
    excluded = excluded_branches(lazy, recipe.guards.exclude)
    rounds = max(1, round(ROUNDS * recipe.train.effort))
    runs = max(1, round(RUNS * min(1.0, recipe.train.effort)))
    seeds = iter(range(recipe.train.seed * 1_000_003 + 1, 2**62))
    generator_state = torch.get_rng_state()
    bar = tqdm(total=(rounds + 1) * runs + rounds + 2, desc="learning gates", unit="run", disable=not progress)
    forwards = 0.0
    try:

        def measure(schedule: Tensor | None) -> Effects:
            parts = []
            for _ in range(runs):
                seed = next(seeds)
                parts.append(
                    linearise(lazy, sampler, schedule, seed=seed, probes=PROBES, max_age=recipe.guards.max_reuse)
                )
                bar.update()
            return Effects.join(parts)

        effects = measure(None)
        forwards += effects.forwards
        limits = _limits(effects, recipe, excluded, len(lazy.branches))
        macs = [branch.macs for branch in lazy.branches]
        planner = Planner(effects, macs, limits)
        schedule, _ = planner.fill(recipe.target)
        if planner.macs_ratio(schedule) > recipe.target + 0.02:
            raise RecipeError(
                f"target {recipe.target}: the guards leave at most {1 - planner.macs_ratio(schedule):.0%} of the branch MACs "
                f"to reuse over {effects.effects.shape[2]} steps; loosen guards (max_reuse, warmup_steps, last_steps, exclude)"
            )
        schedule = planner.swap(recipe.target, schedule, rounds=100)

        held_out = [next(seeds) for _ in range(2)]
        dense = [_seeded(lazy, sampler, None, seed) for seed in held_out]
        bar.update()

        def true_error(candidate: Bools) -> Tensor:
            images = [_seeded(lazy, sampler, torch.from_numpy(candidate), seed) for seed in held_out]
            pairs = zip(images, dense, strict=True)
            bar.update()
            return torch.cat([(a - b).square().reshape(a.shape[0], -1).mean(dim=1) for a, b in pairs])

        errors = true_error(schedule)
        history = [float(errors.mean())]
        steps = len(effects.timesteps)
        forwards += steps * len(held_out) * 2
        for _ in range(rounds):
            around = measure(torch.from_numpy(schedule))
            forwards += around.forwards + steps * len(held_out)
            local = Planner(around, macs, limits)
            candidate = local.swap(recipe.target, schedule, rounds=SWAPS)
            candidate_errors = true_error(candidate)
            if _robust(candidate_errors, errors) < _robust(errors, errors):
                schedule, errors = candidate, candidate_errors
            history.append(float(errors.mean()))
            bar.set_postfix(error=f"{history[-1]:.1e}", macs=f"{planner.macs_ratio(schedule):.3f}")
    finally:
        bar.close()
        torch.set_rng_state(generator_state)
    inner = Planner(effects, macs, Limits(schedule, recipe.guards.max_reuse))
    _, taken = inner.fill(planner.macs_ratio(schedule))
    _, further = planner.fill(0.0, schedule)
    lazy.set_gates(_gates_of(lazy, effects, schedule, taken, further, limits))
    return TrainReport(
        recipe.target, planner.macs_ratio(schedule), float(errors.mean()), float(errors.median()),
        float(errors.quantile(0.99)), forwards, time.perf_counter() - started, history,
    )  # fmt: skip


def excluded_branches(lazy: LazyModel, patterns: list[str]) -> list[int]:
    """Numbers of the branches that names, or patterns that begin with `re:`, match.

    Raises:
        RecipeError: a pattern matches nothing, or is not a regular expression; says what there was.
    """
    names = [branch.name for branch in lazy.branches]
    found: set[int] = set()
    for pattern in patterns:
        try:
            expression = re.compile(pattern[3:] if pattern.startswith("re:") else re.escape(pattern))
        except re.error as error:
            raise RecipeError(f"guards.exclude: {pattern!r} is not a regular expression: {error}") from None
        matched = {i for i, name in enumerate(names) if expression.fullmatch(name)}
        if not matched:
            raise RecipeError(f"guards.exclude: {pattern!r} matches none of the branches {', '.join(names)}")
        found |= matched
    return sorted(found)


def _limits(effects: Effects, recipe: Recipe, excluded: list[int], branches: int) -> Limits:
    steps = len(effects.timesteps)
    allowed = np.tile(effects.may_reuse.numpy()[:, None], (1, branches))
    allowed[: recipe.guards.warmup_steps] = False
    allowed[max(0, steps - recipe.guards.last_steps) :] = False
    allowed[:, excluded] = False
    return Limits(allowed, recipe.guards.max_reuse)


def _seeded(lazy: LazyModel, sampler: Sampler, schedule: Tensor | None, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return run(lazy, sampler, schedule)


def _robust(errors: Tensor, reference: Tensor) -> float:
    scale = 4 * float(reference.median()) or 1.0
    return float(torch.log1p(errors / scale).mean())


def _gates_of(
    lazy: LazyModel,
    effects: Effects,
    schedule: Bools,
    taken: list[tuple[int, int]],
    further: list[tuple[int, int]],
    limits: Limits,
) -> Gates:
    """Gates for a schedule: `taken` are its decisions from the safest on, `further` the others from the safest on."""
    times = effects.timesteps
    if bool((times[1:] > times[:-1]).all()) and len(times) > 1:
        direction = -1
    elif bool((times[1:] <= times[:-1]).all()):
        direction = 1
    else:
        raise InputError(
            f"the sampler's timesteps neither rise nor fall: {[round(t, 3) for t in times.tolist()[:6]]}, ..."
        )
    steps, branches = schedule.shape
    bias = np.where(limits.allowed, -4.5, _NEVER)
    for k, (t, b) in enumerate(taken):
        bias[t, b] = 4.0 - 3.0 * k / len(taken)
    for k, (t, b) in enumerate(further):
        bias[t, b] = -1.0 - 3.0 * k / len(further)
    grid, position = np.unique(times.double().numpy(), return_inverse=True)
    table = np.full((len(grid), branches), _NEVER)
    for t in range(
        steps
    ):  # calls that share a timestep (second-order samplers) share a gate: reuse if any of them does
        table[position[t]] = np.maximum(table[position[t]], bias[t])
    gates = Gates([b.name for b in lazy.branches], [b.width for b in lazy.branches], torch.from_numpy(grid), direction)
    with torch.no_grad():
        gates.bias.copy_(torch.from_numpy(table.T).to(gates.bias))
    return gates.to(lazy.device)
