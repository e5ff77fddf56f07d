"""Pipelines: their denoisers are made lazy in place, learned in the pipeline's own loop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ...api import graph_is_needed
from ...errors import InputError
from ...files import kind_of, path_of
from ...graph.insert import is_timestep_name
from ...graph.untouched import untouched
from ...lazy.attach import Handle, attach, detach, handle_of, uncompiled
from ...lazy.learn import learn, unlearned
from ...lazy.store import PLAN_FILE, Loaded, load_plan
from ...lazy.watch import Watch
from ...pipelines import reset
from ...recipe import Recipe
from ...sampling import NotCalledError, Sampler, first_call
from ...storage import DESCRIPTION_FILE
from ...storage import load as load_gates
from .graph import GATES_FOLDER, LazyDenoiser, make_denoisers, register
from .sampling import Arguments, learning_sampler, sample
from .saving import save_plan_too
from .scopes import PipelineCalls, enabled_cache

#: Where a pipeline keeps lazy graphs while they are in use or switched off.
_KEPT = "_lazy_denoisers"

#: What a lazy denoiser is: the pipeline's own module with an engine before it, or a lazy graph in its place.
Lazy = Handle | LazyDenoiser


def apply_to_pipeline(
    pipeline: Any,
    recipe: Recipe,
    *,
    sampler: Sampler | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Any:
    """Make the denoisers of a diffusers pipeline lazy, in place.

    Args:
        pipeline: any diffusers pipeline whose denoiser is a Diffusion Transformer.
        recipe: its `pipeline` section says what to sample while learning, its `units` what is skipped.
        sampler: samples with the model it is given instead of the pipeline; for pipelines with one denoiser.
        call_kwargs: arguments of `pipeline(...)` that go before the recipe's.
        progress: show progress bars.

    Returns:
        The pipeline.

    Raises:
        InputError: it is no diffusers pipeline, none of its parts is a denoiser, or it refuses the call.
        LazyCompressError: a denoiser cannot be captured, located or trained.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise InputError(
            f"apply takes an nn.Module or a diffusers pipeline, there was {type(pipeline).__name__}: pass the model "
            f"that it calls, and sampler= (a denoising loop that returns the final latents)"
        )
    needs_graph = graph_is_needed(recipe)
    arguments = Arguments(recipe, call_kwargs or {}, pipeline)
    modules = {name: uncompiled(_dense(getattr(pipeline, name))) for name in denoisers(pipeline)}
    for name, module in modules.items():
        if enabled_cache(module):
            raise InputError(
                f"{name} has a cache of diffusers enabled, which skips by its own rules: call pipe.{name}.disable_cache() first"
            )
    for name, lazy in lazy_denoisers(pipeline, needed=False).items():
        if isinstance(lazy, LazyDenoiser):
            register(pipeline, name, lazy.stood_there)
    foreign = [name for name, module in modules.items() if not isinstance(module, nn.Module)]
    if foreign and needs_graph:
        raise InputError(
            f"{foreign[0]} of {type(pipeline).__name__} runs in a file, in which no branches are looked for: take a recipe "
            f"with units: calls, or apply it to the pipeline in torch and export that"
        )
    if needs_graph:
        calls = example_calls(pipeline, recipe, sampler=sampler, call_kwargs=call_kwargs)
        for name in calls:
            detach(modules[name])
        made = make_denoisers(pipeline, recipe, calls, arguments, sampler, progress)
        object.__setattr__(pipeline, _KEPT, made)
    else:
        for name, handle in _learn_calls(pipeline, modules, recipe, arguments, sampler, progress).items():
            pipeline.__dict__.get(_KEPT, {}).pop(name, None)
            save_plan_too(handle)
    reset(pipeline)
    return pipeline


def _learn_calls(
    pipeline: Any,
    modules: Mapping[str, Any],
    recipe: Recipe,
    arguments: Arguments,
    sampler: Sampler | None,
    progress: bool,
) -> dict[str, Handle]:
    """Put an engine before each denoiser that sampling calls. After an error the denoisers are as they were."""
    before = {name: (old, old.enabled) for name, module in modules.items() if (old := handle_of(module)) is not None}
    engines = {name: unlearned(module, recipe) for name, module in modules.items()}
    handles = {name: attach(module, engines[name], PipelineCalls()) for name, module in modules.items()}
    watches = {name: Watch(handle.inner, handle.engine.reader) for name, handle in handles.items()}
    try:
        with torch.no_grad(), ExitStack() as stack:
            for name, handle in handles.items():
                stack.enter_context(handle.replaced(watches[name]))
            sampler(getattr(pipeline, next(iter(modules)))) if sampler is not None else sample(pipeline, arguments)
        called = {name: watch for name, watch in watches.items() if watch.calls}
        if not called:
            raise InputError(f"sampling with {type(pipeline).__name__} called none of {', '.join(modules)}")
        for name, watch in called.items():
            own = recipe.checkpoint_of(name) if len(called) > 1 else recipe
            loop = _standing_in(pipeline, handles[name], arguments, sampler)
            engines[name], handles[name].training_report = learn(watch, loop, own, progress)
        for name, watch in called.items():
            handles[name].engine = engines[name]
            handles[name].recipe = recipe
            handles[name].example = watch.example
            handles[name].turns = watch.streams
    except BaseException:
        for name, module in modules.items():
            detach(module)
            if name in before:
                old, enabled = before[name]
                restored = attach(module, old.engine, PipelineCalls())
                restored.take_over(old)
                restored.enabled = enabled
                save_plan_too(restored)
        raise
    for name in modules.keys() - called.keys():
        detach(modules[name])
    return {name: handles[name] for name in called}


def _standing_in(pipeline: Any, handle: Handle, arguments: Arguments, own: Sampler | None) -> Sampler:
    """The pipeline, or the user's own sampler, with what it is given in the place of one of the denoisers."""

    def sampler(model: Any) -> Tensor:
        with handle.replaced(model):
            return sample(pipeline, arguments) if own is None else own(handle.module)

    return sampler


def example_calls(
    pipeline: Any, recipe: Recipe, *, sampler: Sampler | None = None, call_kwargs: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The arguments of the first call that sampling makes of each denoiser.

    Raises:
        InputError: the pipeline has no denoiser, refuses the call, or calls none of them.
    """
    arguments = Arguments(recipe, call_kwargs or {}, pipeline)
    names = denoisers(pipeline)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        part = getattr(pipeline, name)
        try:
            # The run is cut off, and may have set something that it would have taken back, such as other processors.
            with untouched(part) if isinstance(part, nn.Module) else nullcontext():
                found[name] = first_call(part, sampler or learning_sampler(pipeline, name, arguments))
        except NotCalledError:
            continue  # a second denoiser that this call does not use
    if not found:
        raise InputError(f"sampling with {type(pipeline).__name__} called none of {', '.join(names)}")
    return found


def denoisers(pipeline: Any) -> list[str]:
    """Names of the parts that denoise: those that take a timestep and more, and are not made of other parts' calls.

    Raises:
        InputError: there is none; says what there is.
    """
    # Modules, or what stands in their place where a pipeline runs in another runtime.
    modules = {
        name: part for name, part in pipeline.components.items() if callable(getattr(type(part), "forward", None))
    }
    found = []
    for name, module in modules.items():
        try:
            parameters = inspect.signature(type(_dense(uncompiled(module))).forward).parameters
        except (TypeError, ValueError):  # a scripted module
            continue
        if any(is_timestep_name(parameter) for parameter in parameters) and not hasattr(module, "decode"):
            found.append(name)
    if not found:
        raise InputError(
            f"{type(pipeline).__name__} has no denoiser: none of {', '.join(modules) or 'its parts'} takes a timestep"
        )
    return found


def switch(pipeline: Any, on: bool) -> None:
    """Use the lazy denoisers, or the dense ones. Nothing happens where nothing is lazy."""
    for name, lazy in lazy_denoisers(pipeline, needed=False).items():
        if isinstance(lazy, Handle):
            lazy.enabled = on
        else:
            register(pipeline, name, lazy if on else lazy.stood_there)


def set_policy(pipeline: Any, policy: Any) -> Any:
    """Set `policy` ("learned", "compute", "reuse") on every lazy denoiser."""
    for lazy in lazy_denoisers(pipeline).values():
        lazy.policy = policy
    return pipeline


def load_lazy(pipeline: Any, folder: str | Path, *, strict: bool = True) -> Any:
    """Make a pipeline lazy with the plans or gates in a folder; nothing is learned. After an error it is as it was.

    Args:
        pipeline: with the denoisers that they were learned for.
        folder: what `lazycompress.save` or the pipeline's own `save_pretrained` wrote.
        strict: as for `lazycompress.load`: refuse those of other weights.

    Raises:
        InputError: the folder holds none for any of the pipeline's denoisers, or these run in files.
        ExportError: what it holds is broken, or of another model.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise InputError(
            f"gates are loaded for an nn.Module or a diffusers pipeline; there was {type(pipeline).__name__}"
        )
    graphs: dict[str, LazyDenoiser] = {}
    plans: dict[str, tuple[nn.Module, Loaded]] = {}
    names = denoisers(pipeline)
    for name in names:
        saved, module = _saved(path_of(folder), name, names), uncompiled(_dense(getattr(pipeline, name)))
        if not isinstance(module, nn.Module):
            raise InputError(
                f"{name} of {type(pipeline).__name__} runs in a file: lazycompress.wrap writes one that follows the plan in "
                f"{folder}"
            )
        if kind_of(saved / PLAN_FILE) == "file":
            plans[name] = module, load_plan(module, saved, strict=strict)
        elif kind_of(saved / DESCRIPTION_FILE) == "file":
            # There is no plan in it: that is what a LazyModule would be made of.
            graphs[name] = cast(LazyDenoiser, load_gates(module, saved, kind=LazyDenoiser, strict=strict))
    if not graphs and not plans:
        raise InputError(
            f"{folder} holds no gates and no plan of {', '.join(names)}: lazycompress.save(pipe, folder) writes them"
        )
    switch(pipeline, False)
    for module, loaded in plans.values():
        handle = attach(module, loaded.engine, PipelineCalls())
        handle.recipe, handle.example = loaded.recipe, loaded.example
        handle.turns = max(loaded.engine.plan.streams) + 1
        save_plan_too(handle)
    for name, lazy in graphs.items():
        lazy.take_the_place_of(getattr(pipeline, name))
        register(pipeline, name, lazy)
    object.__setattr__(pipeline, _KEPT, graphs)
    return pipeline


def _saved(folder: Path, name: str, names: list[str]) -> Path:
    """Where a folder has what was learned of a denoiser: in a saved pipeline, in a folder of its name, or directly."""
    if kind_of(folder / name / GATES_FOLDER) == "folder":
        return folder / name / GATES_FOLDER
    direct = len(names) == 1 and (kind_of(folder / PLAN_FILE) == "file" or kind_of(folder / DESCRIPTION_FILE) == "file")
    return folder if direct else folder / name


def lazy_denoisers(pipeline: Any, needed: bool = True) -> dict[str, Lazy]:
    """The lazy denoisers by name, in use or switched off; found at the components, so that pipelines which share them agree.

    Raises:
        InputError: there are none, and `needed` is true.
    """
    kept: Mapping[str, LazyDenoiser] = pipeline.__dict__.get(_KEPT, {}) if hasattr(pipeline, "__dict__") else {}
    found: dict[str, Lazy] = {}
    parts = cast(Any, pipeline).components if isinstance(pipeline, DiffusionPipeline) else {}
    for name, part in parts.items():
        lazy = part if isinstance(part, LazyDenoiser) else handle_of(part) or kept.get(name)
        if lazy is not None:
            found[name] = lazy
    if needed and not found:
        raise InputError(f"{type(pipeline).__name__} is not lazy: call lazycompress.apply(pipe, recipe) first")
    return found


def _dense(module: Any) -> Any:
    """The module that a lazy graph was made from, or the module itself."""
    return module.model if isinstance(module, LazyDenoiser) else module
