"""The stages in their order: capture -> locate -> insert -> lower -> train -> export. The only module that knows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .errors import InputError
from .graph.capture import ExampleInputs, call_of, capture
from .graph.locate import Branch, locate_branches
from .recipe import Recipe, load_recipe
from .runtime import LazyModel
from .sampling import Sampler, build_inputs, build_sampler, first_call


def locate(model: nn.Module, example_inputs: ExampleInputs) -> list[Branch]:
    """Find the branches of a Diffusion Transformer; nothing is changed.

    Args:
        model: any module that `torch.export` can capture.
        example_inputs: keyword arguments of one forward call, or a tuple of positional ones.

    Returns:
        The branches in the order in which they run: name, kind, streams, MACs per sample.

    Raises:
        InputError: the inputs do not fit the model.
        CaptureError: the model cannot be captured; names the operation and its source line.
        LocateError: the model holds no residual branch with attention.
    """
    captured = capture(model, call_of(model, example_inputs))
    return locate_branches(captured.graph_module.graph, captured.batch)


def apply(
    model_or_pipeline: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe = "lazy_dit.yaml",
    *,
    example_inputs: ExampleInputs | None = None,
    sampler: Sampler | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> LazyModel:
    """Make a model lazy: find its branches, put gates before them, learn when each may reuse.

    Args:
        model_or_pipeline: an `nn.Module`; whole pipelines are refused for now, with the way round it.
        recipe: a path, the name of a shipped recipe, a dictionary, or a `Recipe`.
        example_inputs: keyword arguments of one forward call, or a tuple of positional ones; left out, the first call
            that the sampler makes is taken.
        sampler: runs one denoising loop with the model it is given and returns the final latents [batch, ...], drawing
            new noise from torch's global generator at each call; left out, the recipe's `sampling` section builds one.
        overrides: dotted recipe keys and values, such as `{"target": 0.4}`.
        progress: show progress bars.

    Returns:
        A `LazyModel` that shares the model's weights; the model itself is left as it is.

    Raises:
        LazyCompressError: the recipe, the inputs or the model are at fault; one line says what to do.
    """
    chosen = load_recipe(recipe, overrides)
    if not isinstance(model_or_pipeline, nn.Module):
        raise InputError(
            f"apply takes an nn.Module, there was {type(model_or_pipeline).__name__}; of a pipeline, pass its denoiser "
            f"(pipe.transformer, say) and sampler= (your denoising loop, returning the final latents)"
        )
    model = model_or_pipeline
    if sampler is None and chosen.sampling is not None:
        sampler = build_sampler(chosen.sampling)
    if sampler is None and chosen.train.enabled:
        raise InputError(
            "nothing to learn the gates on: pass sampler= (a callable that runs one denoising loop with the model it is "
            "given), or give the recipe a sampling section, or set train.enabled: false"
        )
    if example_inputs is None:
        if sampler is None:
            raise InputError("no inputs to capture the model with: pass example_inputs= or sampler=")
        sampling = chosen.sampling
        example_inputs = build_inputs(model, sampling) if sampling is not None else first_call(model, sampler)
    lazy = LazyModel(model, call_of(model, example_inputs), timestep_input=chosen.timestep_input or None)
    lazy.recipe = chosen
    if chosen.train.enabled and sampler is not None:
        from .train.trainer import train_gates

        lazy.training_report = train_gates(lazy, sampler, chosen, progress=progress)
    return lazy
