"""A pipeline as a sampler: what to call it with, and its latents in place of its images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError, LazyCompressError
from ...recipe import Recipe
from ...sampling import Sampler


class Arguments:
    """What to call the pipeline with: the recipe's prompts or labels, drawn anew for each run."""

    def __init__(self, recipe: Recipe, call_kwargs: Mapping[str, Any], pipeline: Any) -> None:
        section = recipe.pipeline
        taken = arguments_of(pipeline)
        self.fixed = {**(section.call if section else {}), **call_kwargs}
        self.drawn: dict[str, list[Any]] = {}
        self.batch = 0
        if section is not None:
            self.batch = section.batch
            for name, values in (("prompt", section.prompts), ("class_labels", section.class_labels)):
                if values and name not in self.fixed:
                    self.drawn[name] = list(values)
        unknown = [name for name in (*self.fixed, *self.drawn) if name not in taken]
        if unknown:
            raise InputError(
                f"{type(pipeline).__name__} takes no {unknown[0]!r}; it takes {', '.join(n for n in taken if n != 'self')}"
            )
        if "output_type" in taken:
            self.fixed["output_type"] = "latent"

    def draw(self) -> dict[str, Any]:
        chosen = dict(self.fixed)
        for name, values in self.drawn.items():
            count = min(self.batch or len(values), len(values))
            order = torch.randperm(len(values))[:count].tolist() if count < len(values) else range(len(values))
            chosen[name] = [values[i] for i in order]
        return chosen


def arguments_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments that calling a pipeline takes, `self` among them.

    A runtime's pipeline may hand on whatever it is given: then those of the class that it inherits from.
    """
    for kind in type(pipeline).__mro__:
        if "__call__" in vars(kind):
            found = inspect.signature(kind.__call__).parameters
            if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found.values()):
                return found
    return inspect.signature(type(pipeline).__call__).parameters


class _Latents(BaseException):
    """Carries the latents out at the decoder; not an Exception, so that no handler in between swallows it."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


def learning_sampler(pipeline: Any, name: str, arguments: Arguments) -> Sampler:
    """`pipeline(...)` as a sampler: from the global generator's noise to the latents, with gradients if they are on."""
    undecorated = inspect.unwrap(type(pipeline).__call__)  # pipelines run under torch.no_grad

    def sampler(model: Any) -> Tensor:
        with _in_place(pipeline, name, model):
            return _latents_of(pipeline, undecorated, arguments)

    return sampler


def sample(pipeline: Any, arguments: Arguments) -> Tensor:
    """`pipeline(...)` as its users call it, without gradients: from the global generator's noise to the latents.

    Raises:
        InputError: the pipeline refuses the call, or gives no latents.
    """
    return _latents_of(pipeline, type(pipeline).__call__, arguments)


def _latents_of(pipeline: Any, call: Callable[..., Any], arguments: Arguments) -> Tensor:
    with _stop_at_decoder(pipeline), _silent(pipeline):
        try:
            output = call(pipeline, **arguments.draw())
        except _Latents as stopped:
            return stopped.latents
        except LazyCompressError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{type(pipeline).__name__} refuses the call: {' '.join(str(error).split())[:300]}; say what to sample "
                f"with the recipe's pipeline section or call_kwargs="
            ) from error
    latents = output[0]
    if not isinstance(latents, Tensor):
        raise InputError(f"{type(pipeline).__name__} gives no latents but {type(latents).__name__}: pass sampler=")
    return latents


@contextmanager
def _in_place(pipeline: Any, name: str, model: Any) -> Iterator[None]:
    """`model` as that part of the pipeline, its config untouched."""
    before = getattr(pipeline, name)
    object.__setattr__(pipeline, name, model)
    try:
        yield
    finally:
        object.__setattr__(pipeline, name, before)


@contextmanager
def _stop_at_decoder(pipeline: Any) -> Iterator[None]:
    """Pipelines that decode whatever `output_type` says are left where they hand the latents to the decoder."""
    decoders = [
        part for part in pipeline.components.values() if isinstance(part, nn.Module) and hasattr(part, "decode")
    ]

    def stop(latents: Tensor, *_: Any, **__: Any) -> Any:
        raise _Latents(latents)

    for decoder in decoders:
        decoder.__dict__["decode"] = stop
    try:
        yield
    finally:
        for decoder in decoders:
            decoder.__dict__.pop("decode", None)


@contextmanager
def _silent(pipeline: Any) -> Iterator[None]:
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
