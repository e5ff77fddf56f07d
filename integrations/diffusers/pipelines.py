"""Pipelines: their denoisers are made lazy in place, learned in the pipeline's own loop."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...api import make_lazy
from ...errors import InputError, LazyCompressError, MissingExtraError
from ...files import kind_of, path_of
from ...graph.insert import is_timestep_name
from ...recipe import Recipe
from ...report import Summary
from ...runtime import LazyModel
from ...sampling import NotCalledError, Sampler, first_call
from ...storage import load as load_gates
from ...storage import save as save_gates

try:
    from diffusers import DiffusionPipeline, ModelMixin
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("diffusers", "train", "a diffusers pipeline") from _error

#: Where a pipeline keeps its lazy models while they are in use or switched off.
_KEPT = "_lazy_denoisers"

#: Folder of the gates inside the folder of a saved denoiser.
GATES_FOLDER = "lazy"


class LazyDenoiser(LazyModel, ModelMixin):  # type: ignore[misc]
    """A lazy model that diffusers takes for one of its own: pipelines save it, move it and ask for its config.

    `save_pretrained` writes the dense model, and the gates into `lazy/` beside it: the folder loads in diffusers without
    this package, and `load_lazy(pipe, folder)` makes it lazy again.
    """

    #: Calls a step, as seen while learning; more than one is guidance in calls that take turns.
    turns: int = 1

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        saved: Any = self.model
        saved.save_pretrained(
            save_directory, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size, **options
        )  # fmt: skip
        save_gates(self, Path(save_directory) / GATES_FOLDER, overwrite=True)

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Any:
        raise InputError(
            "load the pipeline with diffusers, then call lazycompress.integrations.diffusers.load_lazy(pipe, folder)"
        )


@dataclass(frozen=True)
class PipelineSummary:
    """Reuse per denoiser since the last reset. `str()` gives a table for each."""

    denoisers: dict[str, Summary]

    def __getitem__(self, name: str) -> Summary:
        return self.denoisers[name]

    @property
    def skip_ratio(self) -> float:
        """Share of branch runs that were reused, over all denoisers."""
        runs = [s.calls * len(s.branches) for s in self.denoisers.values()]
        skipped = sum(s.skip_ratio * n for s, n in zip(self.denoisers.values(), runs, strict=True))
        return skipped / max(sum(runs), 1)

    def __str__(self) -> str:
        return "\n\n".join(f"{name}\n{summary}" for name, summary in self.denoisers.items())


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
        recipe: its `pipeline` section says what to sample while learning.
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
    disable(pipeline)
    arguments = _Arguments(recipe, call_kwargs or {}, pipeline)
    calls = example_calls(pipeline, recipe, sampler=sampler, call_kwargs=call_kwargs)
    made: dict[str, LazyDenoiser] = {}
    hooks: list[Any] = []
    try:
        for name, inputs in calls.items():
            dense = getattr(pipeline, name)
            sample = sampler or _sampler(pipeline, name, arguments)
            contexts: set[int] = set()

            def make(*given: Any, name: str = name, contexts: set[int] = contexts, **options: Any) -> LazyDenoiser:
                made[name] = LazyDenoiser(*given, **options)
                hooks.append(made[name].register_forward_hook(lambda module, *_: contexts.add(module.context)))
                return made[name]

            own = recipe.checkpoint_of(name) if len(calls) > 1 else recipe
            lazy = make_lazy(dense, inputs, own, sample, make=make, progress=progress)
            for hook in hooks:
                hook.remove()
            hooks.clear()
            made[name].turns = max(1, len(contexts))
            _put(pipeline, name, lazy)
    except BaseException:
        for name, lazy in made.items():
            _put(pipeline, name, lazy.model)
        raise
    object.__setattr__(pipeline, _KEPT, made)
    reset(pipeline)
    return pipeline


def example_calls(
    pipeline: Any, recipe: Recipe, *, sampler: Sampler | None = None, call_kwargs: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The arguments of the first call that sampling makes of each denoiser.

    Raises:
        InputError: the pipeline has no denoiser, refuses the call, or calls none of them.
    """
    arguments = _Arguments(recipe, call_kwargs or {}, pipeline)
    names = denoisers(pipeline)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            found[name] = first_call(getattr(pipeline, name), sampler or _sampler(pipeline, name, arguments))
        except NotCalledError:
            continue  # a second denoiser that this call does not use
    if not found:
        raise InputError(f"sampling with {type(pipeline).__name__} called none of {', '.join(names)}")
    return found


def denoisers(pipeline: Any) -> list[str]:
    """Names of the parts that denoise: modules that take a timestep and more, and are not made of other parts' calls.

    Raises:
        InputError: there is none; says what there is.
    """
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    found = []
    for name, module in modules.items():
        parameters = inspect.signature(getattr(module, "model", module).forward).parameters
        if any(is_timestep_name(parameter) for parameter in parameters) and not hasattr(module, "decode"):
            found.append(name)
    if not found:
        raise InputError(
            f"{type(pipeline).__name__} has no denoiser: none of {', '.join(modules) or 'its parts'} takes a timestep"
        )
    return found


def disable(pipeline: Any) -> Any:
    """Put the original denoisers back; `enable` undoes it. Nothing happens where nothing is lazy."""
    for name, lazy in lazy_denoisers(pipeline, needed=False).items():
        _put(pipeline, name, lazy.model)
    return pipeline


def enable(pipeline: Any) -> Any:
    """Use the lazy denoisers again.

    Raises:
        InputError: `lazycompress.apply` has not been called on this pipeline.
    """
    for name, lazy in lazy_denoisers(pipeline).items():
        _put(pipeline, name, lazy)
    return pipeline


def reset(pipeline: Any) -> Any:
    """Forget caches and statistics. Not needed between images: a new image is noticed."""
    for lazy in lazy_denoisers(pipeline).values():
        lazy.reset()
    return pipeline


def summary(pipeline: Any) -> PipelineSummary:
    """What was found in each denoiser, and what has been reused since the last `reset`."""
    return PipelineSummary({name: lazy.summary() for name, lazy in lazy_denoisers(pipeline).items()})


def set_policy(pipeline: Any, policy: Any) -> Any:
    """Set `policy` ("learned", "compute", "reuse") on every lazy denoiser."""
    for lazy in lazy_denoisers(pipeline).values():
        lazy.policy = policy
    return pipeline


def load_lazy(pipeline: Any, folder: str | Path, *, strict: bool = True) -> Any:
    """Make a pipeline lazy with the gates that its `save_pretrained` wrote into `folder`; nothing is learned.

    Args:
        pipeline: with the denoisers that the gates were learned for.
        folder: what `pipe.save_pretrained` wrote.
        strict: as for `lazycompress.load`: refuse gates of other weights.

    Raises:
        InputError: the folder holds no gates for any of the pipeline's denoisers.
        ExportError: it holds broken ones, or those of another model.
    """
    disable(pipeline)
    made: dict[str, LazyDenoiser] = {}
    for name in denoisers(pipeline):
        gates = path_of(folder) / name / GATES_FOLDER
        if kind_of(gates) == "folder":
            made[name] = load_gates(getattr(pipeline, name), gates, kind=LazyDenoiser, strict=strict)
    if not made:
        raise InputError(f"{folder} holds no gates: pipe.save_pretrained of a lazy pipeline writes them")
    for name, lazy in made.items():
        _put(pipeline, name, lazy)
    object.__setattr__(pipeline, _KEPT, made)
    return pipeline


def lazy_denoisers(pipeline: Any, needed: bool = True) -> dict[str, LazyDenoiser]:
    """The lazy denoisers by name, in use or switched off.

    Raises:
        InputError: there are none, and `needed` is true.
    """
    found: dict[str, LazyDenoiser] = pipeline.__dict__.get(_KEPT, {}) if hasattr(pipeline, "__dict__") else {}
    if needed and not found:
        raise InputError(f"{type(pipeline).__name__} is not lazy: call lazycompress.apply(pipe, recipe) first")
    return found


def _put(pipeline: Any, name: str, module: nn.Module) -> None:
    """Register a part as the pipeline does itself, under the class that the saved pipeline is to name."""
    pipeline.register_modules(**{name: getattr(module, "model", module)})
    recorded = pipeline.config[name]
    pipeline.register_modules(**{name: module})
    pipeline.register_to_config(**{name: recorded})


class _Arguments:
    """What to call the pipeline with: the recipe's prompts or labels, drawn anew for each run."""

    def __init__(self, recipe: Recipe, call_kwargs: Mapping[str, Any], pipeline: Any) -> None:
        section = recipe.pipeline
        taken = inspect.signature(type(pipeline).__call__).parameters
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


class _Latents(BaseException):
    """Carries the latents out at the decoder; not an Exception, so that no handler in between swallows it."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


def _sampler(pipeline: Any, name: str, arguments: _Arguments) -> Sampler:
    """`pipeline(...)` as a sampler: from the global generator's noise to the latents, with gradients if they are on."""
    undecorated = inspect.unwrap(type(pipeline).__call__)  # pipelines run under torch.no_grad

    def sampler(model: Any) -> Tensor:
        with _in_place(pipeline, name, model), _stop_at_decoder(pipeline), _silent(pipeline):
            try:
                output = undecorated(pipeline, **arguments.draw())
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

    return sampler


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
