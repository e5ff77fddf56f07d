"""Samplers: a callable that runs one denoising loop with the model it is given. Here the ones a recipe describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, MissingExtraError, RecipeError
from .recipe import Condition, Sampling

#: `sampler(model) -> final latents`, drawing new noise from torch's global generator at each call.
Sampler = Callable[[Any], Tensor]


def build_scheduler(sampling: Sampling) -> Any:
    """A new diffusers scheduler with its timesteps set.

    Raises:
        RecipeError: diffusers has no scheduler of that name, or it does not take this configuration.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers", "train", "a recipe's sampling section") from error
    names = sorted(n for n in dir(diffusers) if n.endswith("Scheduler"))
    if sampling.scheduler not in names:
        raise RecipeError(
            f"sampling.scheduler: diffusers has no {sampling.scheduler!r}; it has {', '.join(names[:6])}, ... "
            f"({len(names)} in all)"
        )
    factory: Any = getattr(diffusers, sampling.scheduler)
    try:
        scheduler = factory(**sampling.scheduler_config)
        scheduler.set_timesteps(sampling.steps)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"sampling.scheduler_config does not fit {sampling.scheduler}: {error}") from None
    return scheduler


def build_inputs(model: nn.Module, sampling: Sampling, timestep: Tensor | None = None) -> dict[str, Any]:
    """Random forward arguments of one call, as the sampling section describes them."""
    parameter = next(model.parameters())
    batch = sampling.batch
    latents = torch.randn(batch, *sampling.latents, dtype=parameter.dtype, device=parameter.device)
    if timestep is None:
        timestep = build_scheduler(sampling).timesteps[0]
    conditions = {
        name: _draw(condition, batch, parameter).to(parameter.device) for name, condition in sampling.conditions.items()
    }
    return {
        sampling.latents_input: latents,
        sampling.timestep_input: timestep.to(parameter.device).repeat(batch),
        **conditions,
        **sampling.constants,
    }


def build_sampler(sampling: Sampling) -> Sampler:
    """The denoising loop of a recipe's sampling section; gradients can flow through all of it.

    Every call makes its own scheduler, draws its own noise and conditions, and returns latents [batch, *latents].
    """
    build_scheduler(sampling)  # a wrong name is an error now, not in the middle of training

    def sampler(model: Any) -> Tensor:
        scheduler = build_scheduler(sampling)
        inputs = build_inputs(model, sampling)
        sample: Tensor = inputs.pop(sampling.latents_input) * getattr(scheduler, "init_noise_sigma", 1.0)
        inputs.pop(sampling.timestep_input)
        # Schedulers of flow matching neither scale the noise nor the model's input, and say nothing of either.
        scale = getattr(scheduler, "scale_model_input", lambda value, timestep: value)
        for timestep in scheduler.timesteps.to(sample.device):
            output = model(
                **{
                    sampling.latents_input: scale(sample, timestep),
                    sampling.timestep_input: timestep.repeat(sampling.batch),
                },
                **inputs,
            )
            sample = scheduler.step(prediction_of(first_tensor(output), sample), timestep, sample).prev_sample
        return sample

    return sampler


def prediction_of(output: Tensor, sample: Tensor) -> Tensor:
    """What of a model's output the scheduler takes.

    Models that predict a variance too put it in a second half of the channels.
    """
    return output[:, : sample.shape[1]] if output.shape[1] == 2 * sample.shape[1] else output


def first_tensor(output: Any) -> Tensor:
    """The model's prediction: the output itself, or the first entry of a tuple or of an output object."""
    while not isinstance(output, Tensor):
        try:
            output = next(iter(output.values())) if hasattr(output, "values") else output[0]
        except (TypeError, IndexError, StopIteration):
            raise InputError(f"the model returned {type(output).__name__}, which holds no tensor") from None
    return output


class NotCalledError(InputError):
    """The sampler never called the model that it was given."""


def first_call(model: nn.Module, sampler: Sampler) -> dict[str, Any]:
    """The arguments of the first forward call that `sampler` makes.

    Raises:
        InputError: the sampler never called the model.
    """
    probe = _Probe(model)
    with torch.no_grad():
        try:
            sampler(probe)
        except _Called as called:
            return called.arguments
    raise NotCalledError("the sampler returned without calling the model it was given")


class _Called(BaseException):
    """Carries the arguments out of the sampler; not an Exception, so that no handler in between swallows it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


class _Probe(nn.Module):
    """Looks like the model and stops at its first call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        import inspect

        bound = inspect.signature(self.model.forward).bind(*args, **kwargs)
        raise _Called(dict(bound.arguments))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _draw(condition: Condition, batch: int, parameter: nn.Parameter) -> Tensor:
    shape = (batch, *condition.shape)
    if condition.dtype and not isinstance(getattr(torch, condition.dtype, None), torch.dtype):
        raise RecipeError(f"sampling.conditions: torch has no dtype {condition.dtype!r}")
    if condition.kind == "integers":
        values = torch.randint(condition.low, condition.high, shape)
        return values.to(getattr(torch, condition.dtype)) if condition.dtype else values
    dtype = getattr(torch, condition.dtype) if condition.dtype else parameter.dtype
    if condition.kind == "constant":
        return torch.full(shape, condition.value, dtype=dtype)
    return torch.randn(shape).to(dtype)
