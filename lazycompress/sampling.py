"""Samplers: a callable that runs one denoising loop with the model it is given. Here the ones a recipe describes."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, LazyCompressError, MissingExtraError, RecipeError, shortened, shown
from .free_memory import available, size_of
from .models import InPlaceOf, bind, by_name, evaluating, place_of
from .noise import own_noise
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
    except Exception as error:  # a scheduler checks little: a wrong value may raise anything
        raise RecipeError(
            f"sampling.scheduler_config does not fit {sampling.scheduler} with {sampling.steps} steps: "
            f"{type(error).__name__}: {shortened(str(error), 250)}"
        ) from None
    return scheduler


def build_inputs(model: nn.Module, sampling: Sampling, timestep: Tensor | None = None) -> dict[str, Any]:
    """Random forward arguments of one call, as the sampling section describes them.

    Raises:
        RecipeError: they do not fit into memory, or torch cannot make one of them.
    """
    dtype, device = place_of(model)
    batch = sampling.batch
    shapes = {sampling.latents_input: sampling.latents} | {n: c.shape for n, c in sampling.conditions.items()}
    _check_memory({name: [batch, *shape] for name, shape in shapes.items()}, device)
    latents = torch.randn(batch, *sampling.latents, dtype=dtype, device=device)
    if timestep is None:
        timestep = build_scheduler(sampling).timesteps[0]
    conditions = {
        name: _draw(name, condition, batch, dtype).to(device) for name, condition in sampling.conditions.items()
    }
    return {
        sampling.latents_input: latents,
        sampling.timestep_input: timestep.to(device).repeat(batch),
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


def checked(sampler: Sampler) -> Sampler:
    """The same sampler, held to what is asked of it: one argument, and final latents [batch, ...] of finite numbers.

    What its own code raises comes as one line, with the exception as its `__cause__`; what this package raises passes
    through, and so does what is no `Exception` (`KeyboardInterrupt`).

    Raises:
        InputError: it cannot be called with a model alone. The sampler made of it raises it too, for what comes back.
    """
    name = getattr(sampler, "__name__", type(sampler).__name__)
    if not callable(sampler):
        raise InputError(f"sampler: a callable that takes the model is needed, there was {shown(sampler)}")
    try:
        signature = inspect.signature(sampler)
    except (TypeError, ValueError):  # a builtin, of which Python knows no signature
        signature = inspect.Signature([inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY)])
    try:
        signature.bind(object())
    except TypeError:
        raise InputError(
            f"sampler: {name}{signature} has to take the model, and nothing else that is required"
        ) from None

    def run(model: Any) -> Tensor:
        try:
            image = sampler(model)
        except LazyCompressError:
            raise
        except Exception as error:
            raise InputError(f"the sampler raised {type(error).__name__}: {shortened(str(error), 300)}") from error
        _check_final(image)
        return image

    return run


def _check_final(image: Any) -> None:
    wanted = "it has to return the final latents, a floating-point tensor [batch, ...]"
    if not isinstance(image, Tensor):
        hint = ": it is a generator function, use return" if inspect.isgenerator(image) else ""
        raise InputError(f"the sampler returned {type(image).__name__}{hint}; {wanted}")
    if image.dim() < 2 or not image.is_floating_point() or not image.shape[0]:
        raise InputError(f"the sampler returned {str(image.dtype)[6:]} {list(image.shape)}; {wanted}")


class Enough(BaseException):
    """Leaves the sampler; not an Exception, so that no handler in between swallows it."""

    @classmethod
    def leave(cls, thread: threading.Thread) -> None:
        """Leave the sampler that this thread runs; in another thread, which must not be stopped so, nothing happens."""
        if threading.current_thread() is thread:
            raise cls


def first_call(model: nn.Module, sampler: Sampler) -> dict[str, Any]:
    """The arguments of the first forward call that `sampler` makes.

    Raises:
        InputError: the sampler never called the model, or failed before.
    """
    found: list[dict[str, Any]] = []
    thread = threading.current_thread()

    def take(args: Any, kwargs: Any) -> Any:
        found.append(by_name(bind(model, args, kwargs)))
        Enough.leave(thread)
        return model(*args, **kwargs)

    with own_noise(), torch.no_grad(), evaluating(model):
        try:
            checked(sampler)(StandIn(model, take))
        except Enough:
            pass
        except InputError:
            if not found:
                raise
    if not found:
        raise NotCalledError("the sampler returned without calling the model it was given")
    return found[0]


class StandIn(InPlaceOf):
    """Looks like a model, and hands every call to a function of its positional and keyword arguments."""

    def __init__(self, model: nn.Module, call: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)


def _check_memory(shapes: dict[str, list[int]], device: torch.device) -> None:
    """Say that tensors of four bytes a value do not fit before they are made: the system may end the process then."""
    there = available(device)
    needed = sum(4 * math.prod(shape) for shape in shapes.values())
    if there is not None and needed > there:
        name = max(shapes, key=lambda name: math.prod(shapes[name]))
        raise RecipeError(
            f"sampling: {name} {shapes[name]} and the other inputs need {size_of(needed)} of memory, {size_of(there)} are "
            f"free on {device}: lower sampling.batch or its sizes"
        )


def _draw(name: str, condition: Condition, batch: int, dtype: torch.dtype) -> Tensor:
    own = getattr(torch, condition.dtype, None) if condition.dtype else dtype
    if not isinstance(own, torch.dtype):
        raise RecipeError(f"sampling.conditions.{name}: torch has no dtype {shown(condition.dtype)}")
    shape = (batch, *condition.shape)
    try:
        if condition.kind == "integers":
            values = torch.randint(condition.low, condition.high, shape)
            return values.to(own) if condition.dtype else values
        if condition.kind == "constant":
            return torch.full(shape, condition.value, dtype=own)
        return torch.randn(shape).to(own)
    except (RuntimeError, OverflowError, TypeError, NotImplementedError) as error:
        raise RecipeError(
            f"sampling.conditions.{name}: torch makes no such values of {own}: {shortened(str(error), 200)}"
        ) from None
