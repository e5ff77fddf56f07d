"""Where the paper's training takes its pairs of calls from: dense sampling runs, or real images with noise added.

A pair is two calls of the model one step apart, as a sampler makes them one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, RecipeError
from ..models import evaluating
from ..noise import own_noise
from ..recipe import Sampling
from ..runtime import LazyModel
from ..sampling import Sampler, build_inputs, build_scheduler, first_tensor, prediction_of
from .trajectory import run

#: Arguments of one call of the model.
Arguments = tuple[Any, dict[str, Any]]

#: The file's entry that holds the images; all others are arguments of the model.
LATENTS = "latents"


class Source(Protocol):
    """Gives pairs of calls.

    Attributes:
        forwards: model calls that a pair takes to make.
    """

    forwards: float

    def pair(self, generator: torch.Generator) -> tuple[Arguments, Arguments]:
        """The arguments of a call and of the one after it, at a step drawn with `generator`."""


class Recorded:
    """Calls of dense sampling runs: the model's own trajectories."""

    forwards = 0.0

    def __init__(self) -> None:
        self._runs: list[list[list[Arguments]]] = []

    def add(self, lazy: LazyModel, sampler: Sampler, seed: int) -> None:
        """Record one dense sampling run with the noise of `seed`, one list for each state that takes turns."""
        calls: dict[int, list[Arguments]] = {}

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls.setdefault(module.context, []).append((args, kwargs))

        hook = lazy.register_forward_hook(after, with_kwargs=True)
        torch.manual_seed(seed)
        try:
            _ = run(lazy, sampler, None)
        finally:
            hook.remove()
        self._runs.append([context for context in calls.values() if len(context) > 1])

    def pair(self, generator: torch.Generator) -> tuple[Arguments, Arguments]:
        contexts = self._runs[_draw(len(self._runs), generator)]
        context = contexts[_draw(len(contexts), generator)]
        step = 1 + _draw(len(context) - 1, generator)
        return context[step - 1], context[step]


class RealLatents:
    """Images from a file, noised by the scheduler to a step; the dense model's prediction leads to the next one.

    Args:
        path: safetensors or npz with `latents` [N, ...] and, under the names of the model's arguments, conditions [N, ...].
            Conditions that it lacks are drawn as the sampling section says.
        sampling: the recipe's section.
        lazy: the model.

    Raises:
        InputError: the file cannot be read, or its tensors do not fit.
        RecipeError: the scheduler cannot add noise.
    """

    forwards = 1.0

    def __init__(self, path: str | Path, sampling: Sampling, lazy: LazyModel) -> None:
        self.sampling = sampling
        self.lazy = lazy
        self.tensors = read_tensors(Path(path), sampling)
        scheduler = build_scheduler(sampling)
        if not hasattr(scheduler, "add_noise") and not hasattr(scheduler, "scale_noise"):
            raise RecipeError(f"train.latents: {sampling.scheduler} cannot add noise to an image; choose another one")

    def pair(self, generator: torch.Generator) -> tuple[Arguments, Arguments]:
        with own_noise():
            torch.manual_seed(_draw(2**31, generator))
            return self._pair(generator)

    def _pair(self, generator: torch.Generator) -> tuple[Arguments, Arguments]:
        scheduler = build_scheduler(self.sampling)
        latents = self.tensors[LATENTS]
        rows = torch.randint(len(latents), (self.sampling.batch,), generator=generator)
        inputs = build_inputs(self.lazy.model, self.sampling)
        noise: Tensor = inputs[self.sampling.latents_input]
        inputs |= {name: values[rows].to(noise.device) for name, values in self.tensors.items() if name != LATENTS}
        timesteps = _once(scheduler.timesteps)
        step = _draw(len(timesteps) - 1, generator)
        now, after = timesteps[step], timesteps[step + 1]
        add = getattr(scheduler, "add_noise", None) or (lambda x, n, t: scheduler.scale_noise(x, t, n))
        sample = add(latents[rows].to(noise), noise, now.repeat(self.sampling.batch))
        before = self._arguments(scheduler, inputs, sample, now)
        with torch.no_grad(), evaluating(self.lazy.model):
            output = first_tensor(self.lazy.model(**before[1]))
        moved = scheduler.step(prediction_of(output, sample), now, sample).prev_sample
        return before, self._arguments(scheduler, inputs, moved, after)

    def _arguments(self, scheduler: Any, inputs: Mapping[str, Any], sample: Tensor, timestep: Tensor) -> Arguments:
        scale = getattr(scheduler, "scale_model_input", lambda value, timestep: value)
        return (), {
            **inputs,
            self.sampling.latents_input: scale(sample, timestep),
            self.sampling.timestep_input: timestep.to(sample.device).repeat(self.sampling.batch),
        }


def read_tensors(path: Path, sampling: Sampling) -> dict[str, Tensor]:
    """The tensors of a file of images, on the CPU: `latents` and conditions.

    Raises:
        InputError: there is no such file, it is neither safetensors nor npz, or its tensors do not fit; says what there was.
    """
    where = f"train.latents: {path}"
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                tensors = {name: torch.from_numpy(file[name]) for name in file.files}
        else:
            from safetensors.torch import load_file

            tensors = dict(load_file(path))
    except Exception as error:  # each format has errors of its own
        raise InputError(f"{where} cannot be read as safetensors or npz: {' '.join(str(error).split())}") from None
    if LATENTS not in tensors:
        raise InputError(f"{where} holds {', '.join(sorted(tensors)) or 'nothing'}, but no {LATENTS!r}")
    shape = list(tensors[LATENTS].shape)
    if shape[1:] != sampling.latents or not shape[0]:
        raise InputError(f"{where}: latents are {shape}, the sampling section says [N, {str(sampling.latents)[1:]}")
    for name, values in tensors.items():
        if name != LATENTS and name not in sampling.conditions:
            known = ", ".join(sampling.conditions) or "no conditions"
            raise InputError(f"{where} holds {name!r}; besides {LATENTS!r} the sampling section knows {known}")
        if len(values) != shape[0]:
            raise InputError(f"{where}: {name} is for {len(values)} images, there are {shape[0]} latents")
    return tensors


def _once(timesteps: Tensor) -> Tensor:
    """The timesteps of second-order schedulers come twice: each of them once, in their order."""
    return torch.stack(list({float(t): t for t in timesteps}.values()))


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
