"""What is done with a whole pipeline, whatever kind it is of: diffusers', or one that another package brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import kinds, storage
from .errors import ExportError, InputError
from .export.card import Granularity, Weights
from .export.folder import export as export_model
from .graph.call import ExampleInputs
from .lazy.attach import Handle, handle_of
from .lazy.model import LazyModule
from .lazy.usage import CallSummary
from .recipe import Recipe
from .report import Summary
from .runtime import LazyModel
from .sampling import Sampler


class Denoiser(Protocol):
    """A lazy part of a pipeline: a `lazy.attach.Handle`, or a lazy model in the part's place."""

    def reset(self) -> None: ...

    def summary(self) -> Summary | CallSummary: ...

    def set_target(self, target: float, timesteps: Tensor | None = None) -> float: ...


class PipelineKind(Protocol):
    """What some package calls a pipeline; a module, or an object."""

    def owns(self, pipeline: Any) -> bool:
        """Whether an object is one of these. Asked of any object at all, a module too: imports nothing heavy, and never fails."""
        ...

    def apply(
        self,
        pipeline: Any,
        recipe: Recipe,
        *,
        sampler: Sampler | None,
        call_kwargs: Mapping[str, Any] | None,
        progress: bool,
    ) -> Any:
        """Make the denoisers of a pipeline lazy, see `lazycompress.apply`; after an error they are as they were.

        Returns:
            The pipeline.

        Raises:
            LazyCompressError: the recipe, or the pipeline, is at fault.
        """
        ...

    def lazy_denoisers(self, pipeline: Any) -> Mapping[str, Denoiser]:
        """The denoisers that are lazy, by name, in use or switched off; none before `apply`."""
        ...

    def switch(self, pipeline: Any, on: bool) -> None:
        """Use the lazy denoisers, or the dense ones."""
        ...


@runtime_checkable
class Exports(Protocol):
    """A kind whose pipelines can be exported whole."""

    def export_pipeline(
        self, pipeline: Any, directory: str | Path, format: str | None, *, telemetry: bool | None, overwrite: bool
    ) -> Path:
        """Write a lazy pipeline, see `export`."""
        ...


@runtime_checkable
class Loads(Protocol):
    """A kind whose pipelines get back what was saved of them."""

    def load_lazy(self, pipeline: Any, folder: str | Path, *, strict: bool) -> Any:
        """Make a pipeline lazy with what a folder holds, see `load`; after an error it is as it was.

        Returns:
            The pipeline.
        """
        ...


@dataclass(frozen=True)
class PipelineSummary:
    """Reuse per denoiser since the last reset. `str()` gives a table for each."""

    denoisers: Mapping[str, Summary | CallSummary]

    def __getitem__(self, name: str) -> Summary | CallSummary:
        return self.denoisers[name]

    @property
    def skip_ratio(self) -> float:
        """Share of what could have been reused that was, over all denoisers."""
        skipped = sum(summary.skip_ratio * summary.runs for summary in self.denoisers.values())
        return skipped / max(sum(summary.runs for summary in self.denoisers.values()), 1)

    def __str__(self) -> str:
        return "\n\n".join(f"{name}\n{summary}" for name, summary in self.denoisers.items())


def kind_of(pipeline: Any) -> PipelineKind | None:
    """The kind of a pipeline: the first, by name, that owns it; diffusers' for what nobody owns; None for such a module.

    Raises:
        LazyCompressError: a kind cannot be imported.
    """
    for name in kinds.others("pipelines"):
        kind: PipelineKind = kinds.find("pipelines", name)
        if kind.owns(pipeline):
            return kind
    return None if isinstance(pipeline, nn.Module) else _diffusers()


def lazy_parts(pipeline: Any) -> dict[str, Denoiser]:
    """The lazy denoisers of a pipeline by name.

    Raises:
        InputError: it has none.
    """
    found = dict((kind_of(pipeline) or _diffusers()).lazy_denoisers(pipeline))
    if not found:
        raise InputError(f"{type(pipeline).__name__} is not lazy: call lazycompress.apply(pipe, recipe) first")
    return found


def disable(pipeline: Any) -> Any:
    """Run the denoisers as they are; `enable` undoes it. Nothing happens where nothing is lazy."""
    (kind_of(pipeline) or _diffusers()).switch(pipeline, False)
    return pipeline


def enable(pipeline: Any) -> Any:
    """Use the lazy denoisers again.

    Raises:
        InputError: `lazycompress.apply` has not been called on this pipeline.
    """
    _ = lazy_parts(pipeline)
    (kind_of(pipeline) or _diffusers()).switch(pipeline, True)
    return pipeline


def reset(pipeline: Any) -> Any:
    """Forget images and statistics. Not needed between images: a new image is noticed."""
    for lazy in lazy_parts(pipeline).values():
        lazy.reset()
    return pipeline


def summary(pipeline: Any) -> PipelineSummary:
    """What has been computed and what has not in each denoiser since the last `reset`."""
    return PipelineSummary({name: lazy.summary() for name, lazy in lazy_parts(pipeline).items()})


def set_target(pipeline: Any, target: float, timesteps: Sequence[float] | Tensor | None = None) -> Any:
    """Set another budget on every lazy denoiser, without learning.

    Args:
        pipeline: a lazy one.
        target: share that may be computed, in (0, 1].
        timesteps: that the denoisers are going to be called at; left out, those that were learned at.

    Raises:
        LazyCompressError: the pipeline is not lazy, or this share cannot be.
    """
    for lazy in lazy_parts(pipeline).values():
        own = torch.as_tensor(timesteps) if timesteps is not None else None
        lazy.set_target(target, own)
    return pipeline


def save(lazy: Any, directory: str | Path, *, overwrite: bool | None = None) -> Path:
    """Write what was learned, the plans or the gates, of a lazy model or pipeline; the weights are not written.

    Args:
        lazy: the model, a denoiser of a lazy pipeline, or the pipeline.
        directory: where to: a folder that is free or empty, or that holds gates or plans. Anything else is left alone. Of a
            pipeline with several lazy denoisers, each gets a folder of its name in it.
        overwrite: what happens to what is there: True replaces it, False never does; None does if it is of this kind of
            model, with these branches, so that a loop can save again and again.

    Returns:
        The folder.

    Raises:
        ExportError: the folder is not ours to replace, or cannot be written; or the gates hold NaN.
        InputError: nothing there is lazy, or it runs in a file.
    """
    if _is_model(lazy):
        return storage.save(lazy, directory, overwrite=overwrite)
    parts: Mapping[str, Any] = lazy_parts(lazy)
    return storage.save_parts(parts, directory, overwrite=overwrite)


def load(
    model_or_pipeline: Any,
    directory: str | Path,
    *,
    example_inputs: ExampleInputs | None = None,
    strict: bool = True,
) -> Any:
    """Make a model or a pipeline lazy with what `save` wrote; nothing is learned.

    Args:
        model_or_pipeline: the one that was learned with. A model is left as it is.
        directory: what `save`, `lazycompress apply` or the pipeline's own `save_pretrained` wrote.
        example_inputs: of a model with gates: arguments of one call; left out, tensors like those at training are made up.
        strict: refuse a model of another class, or with other weights, than the one that was learned with. Gates that version
            0.1 wrote do not tell.

    Returns:
        The lazy model, see `apply`; or the pipeline.

    Raises:
        ExportError: the folder holds nothing that was learned, or that of another model; one line says what is wrong, and
            where.
        LazyCompressError: the gates do not fit the model.
    """
    if _is_model(model_or_pipeline):
        return storage.load(model_or_pipeline, directory, example_inputs=example_inputs, strict=strict)
    kind = kind_of(model_or_pipeline)
    if not isinstance(kind, Loads):
        raise InputError(
            f"{type(model_or_pipeline).__name__} is of a kind that nothing is loaded for: load its denoisers"
        )
    return kind.load_lazy(model_or_pipeline, directory, strict=strict)


def export(
    lazy: Any,
    directory: str | Path,
    format: str | None = None,
    *,
    telemetry: bool | None = None,
    stateful: bool = True,
    overwrite: bool = False,
    weights: Weights = "f32",
    decide: Granularity | None = None,
    check: bool = True,
) -> Path:
    """Write a lazy model as a file, or a lazy pipeline as a folder, that skips by itself.

    Args:
        lazy: a model with a plan or with gates, or the denoiser of a lazy pipeline, under any policy; the file always follows
            them. Or a lazy pipeline, whole.
        directory: where to; written whole or not at all.
        format: "openvino" (caches as state), "onnx" or "executorch" (caches as inputs and outputs), or that of another package;
            None: the recipe's, or that of the files that a pipeline runs in.
        telemetry: add the output `lazy_decisions`, float32 [branches, batch]; None: the recipe's.
        stateful: of a model in OpenVINO only: caches as state; else as inputs `past_*` and outputs `present_*`.
        overwrite: replace a folder that an export wrote before.
        weights: of a model only: "f32", "f16" or "bf16", how float32 weights are stored; they compute as the runtime's
            precision says.
        decide: of a model only: "sample" (each sample of a batch decides for itself), or "batch" (a branch runs for all if any
            needs it); None: "sample", or "batch" where the format knows nothing else.
        check: of a model only: run the file on recorded calls and write how it compares with torch; `verify` needs the
            record. Loads the written model once.

    Returns:
        The folder.

    Raises:
        InputError: the model or the pipeline is not lazy.
        ExportError: unknown format, a folder that is not ours to replace, or a graph that a converter does not take.
        MissingExtraError: the format's packages are not installed.
    """
    kind = None if _is_model(lazy) else kind_of(lazy)
    if kind is None:
        return export_model(
            lazy, directory, format, telemetry=telemetry, stateful=stateful, overwrite=overwrite, weights=weights,
            decide=decide, check=check,
        )  # fmt: skip
    _ = lazy_parts(lazy)
    if (stateful, weights, decide, check) != (True, "f32", None, True):
        raise ExportError(
            "stateful, weights, decide and check are for models: export the pipeline's denoiser with them"
        )
    if not isinstance(kind, Exports):
        raise ExportError(f"{type(lazy).__name__} is of a kind that is not exported whole: export its denoisers")
    return kind.export_pipeline(lazy, directory, format, telemetry=telemetry, overwrite=overwrite)


def _is_model(found: Any) -> bool:
    """Whether it is a model, or what is lazy about one, and no pipeline."""
    if isinstance(found, LazyModel | LazyModule | Handle) or handle_of(found) is not None:
        return True
    return isinstance(found, nn.Module) and kind_of(found) is None


def _diffusers() -> PipelineKind:
    found: PipelineKind = kinds.find("pipelines", "diffusers")
    return found
