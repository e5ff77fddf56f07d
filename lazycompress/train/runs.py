"""The sampling runs of a training: spread over the processes there are, and kept in the checkpoint as they finish.

Whatever searches for a schedule asks here for effects around schedules and for true errors. What it gets depends on nothing
but its arguments, so a training on several processes, or one that goes on after it was cut off, takes the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler
from .checkpoint import Checkpoint
from .distributed import Group
from .memory import training_mode
from .schedule import Bools
from .trajectory import Effects, linearise, run


class Runs:
    """Makes the sampling runs of one training.

    Attributes:
        group: the processes that share the work.
        steps: of a sampling run.
        forwards: model calls spent by all processes together, a backward pass counted as two; those that a checkpoint
            saved count as well.
    """

    def __init__(
        self,
        lazy: LazyModel,
        sampler: Sampler,
        recipe: Recipe,
        group: Group,
        *,
        steps: int,
        checkpoint: Checkpoint | None = None,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Args:
        lazy, sampler, recipe: of the training.
        group, steps: see there.
        checkpoint: where results are kept; None keeps none.
        advance: is told how many runs were finished.
        """
        self.lazy = lazy
        self.sampler = sampler
        self.recipe = recipe
        self.group = group
        self.steps = steps
        self.forwards = 0.0
        self._checkpoint = checkpoint or Checkpoint(None, {})
        self._advance = advance
        #: Final latents of the dense model by seed: of runs with gradients, and of those that judge.
        self._finals: dict[int, Tensor] = {}
        self._dense: dict[int, Tensor] = {}

    def effects(self, schedule: Bools | None, seeds: Sequence[int], *, probes: int) -> Effects:
        """First-order effects around a schedule (None: dense), one sampling run for each seed, joined."""
        name = f"effects of order {int(self.lazy.gates.order)}, {probes} probes, {self.recipe.guards.max_reuse} steps"
        pieces = [
            (f"{name}, {_name(schedule, seed)}", partial(self._linearised, schedule, seed, probes)) for seed in seeds
        ]
        parts = [Effects(**part) for part in self._all(pieces)]
        if schedule is None:
            # In the precision of these runs: an offset must not hold the difference of two precisions.
            self._finals |= dict(zip(seeds, (part.final for part in parts), strict=True))
        self.forwards += sum(part.forwards for part in parts)
        return Effects.join(parts)

    def errors(self, candidates: Sequence[Bools], seeds: Sequence[int]) -> list[Tensor]:
        """Mean squared error of each final image to the dense one, for each schedule: float32 [images of all seeds].

        In the model's own precision, whatever the runs with gradients take.
        """
        missing = [seed for seed in seeds if seed not in self._dense]
        self._dense |= dict(zip(missing, self._images([(None, seed) for seed in missing]), strict=True))
        images = self._images([(schedule, seed) for schedule in candidates for seed in seeds])
        found = []
        for k in range(len(candidates)):
            pairs = zip(images[k * len(seeds) : (k + 1) * len(seeds)], seeds, strict=True)
            found.append(torch.cat([square_error(image, self._dense[seed]) for image, seed in pairs]))
        return found

    def variance(self, seeds: Sequence[int]) -> float:
        """Variance of the dense model's final latents for these seeds, by which errors are measured."""
        return variance_of([self._dense[seed] for seed in seeds])

    def _linearised(self, schedule: Bools | None, seed: int, probes: int) -> dict[str, Any]:
        chosen = None if schedule is None else torch.from_numpy(schedule)
        dense = self._finals.get(seed) if schedule is not None else None
        with training_mode(self.lazy, self.recipe):
            found = linearise(
                self.lazy, self.sampler, chosen, seed=seed, probes=probes,
                max_age=min(self.recipe.guards.max_reuse, self.steps),
                dense=None if dense is None else dense.to(self.lazy.device),
            )  # fmt: skip
        values = {field.name: getattr(found, field.name) for field in fields(Effects)}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}

    def _images(self, asked: Sequence[tuple[Bools | None, int]]) -> list[Tensor]:
        """Final latents of sampling runs that follow schedules, on the CPU."""

        def one(schedule: Bools | None, seed: int) -> Tensor:
            torch.manual_seed(seed)
            return run(self.lazy, self.sampler, None if schedule is None else torch.from_numpy(schedule)).cpu()

        name = f"image of order {int(self.lazy.gates.order)}"
        self.forwards += self.steps * len(asked)
        return self._all([(f"{name}, {_name(*which)}", partial(one, *which)) for which in asked])

    def _all(self, pieces: Sequence[tuple[str, Callable[[], Any]]]) -> list[Any]:
        """Results of runs by name: read if they were kept, else made and kept."""
        done = [0]

        def one(name: str, make: Callable[[], Any]) -> Any:
            value = self._checkpoint.get(name)
            if value is None:
                value = make()
                self._checkpoint.put(name, value)
            done[0] += 1
            self._advance(1)
            return value

        found = self.group.map([partial(one, name, make) for name, make in pieces])
        self._advance(len(pieces) - done[0])
        return found


class Progress:
    """The progress bar: sampling runs, error, share that is reused, time left. Only the main process has one."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def advance(self, count: int = 1) -> None:
        self._bar.update(count)

    def show(self, **values: str) -> None:
        """Numbers beside the bar."""
        self._bar.set_postfix(values)


@contextmanager
def progress_bar(total: int, unit: str, shown: bool) -> Iterator[Progress]:
    """A bar that is closed at the end of the block. It says how long is left."""
    with tqdm(total=total, desc="learning gates", unit=unit, disable=not shown) as bar:
        yield Progress(bar)


def square_error(image: Tensor, dense: Tensor) -> Tensor:
    """Mean squared error of each image, float32 [batch]; infinite where an image is not of finite numbers."""
    return (image - dense).float().square().reshape(image.shape[0], -1).mean(dim=1).nan_to_num(nan=torch.inf)


@dataclass(frozen=True)
class Judged:
    """Held-out images against the dense ones.

    Attributes:
        errors: mean squared error of each image, float32 [images].
        variance: of the dense latents.
    """

    errors: Tensor
    variance: float

    @property
    def relative(self) -> float:
        """The mean error as a share of the variance."""
        return float(self.errors.mean()) / self.variance if self.variance else float("inf")


def variance_of(images: Sequence[Tensor]) -> float:
    """Mean variance of the values of an image."""
    return float(torch.cat([image.float().flatten(1).var(dim=1, correction=0) for image in images]).mean())


def errors_of_gates(lazy: LazyModel, sampler: Sampler, seeds: Sequence[int]) -> Judged:
    """The images that the gates sample from the noise of some seeds, judged."""
    found, finals = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        lazy.reset()
        with torch.no_grad():
            image = sampler(lazy)
        torch.manual_seed(seed)
        finals.append(run(lazy, sampler, None))
        found.append(square_error(image, finals[-1]).cpu())
    lazy.reset()
    return Judged(torch.cat(found), variance_of(finals))


def _name(schedule: Bools | None, seed: int) -> str:
    """What a run depends on besides recipe and model."""
    if schedule is None:
        return f"dense, seed {seed}"
    return f"schedule {hashlib.sha256(schedule.tobytes()).hexdigest()}, seed {seed}"
