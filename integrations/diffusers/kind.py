"""diffusers' pipelines as a kind of pipeline, see `lazycompress.pipelines.PipelineKind`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from . import pipelines
from .export import export_pipeline

__all__ = ["apply", "export_pipeline", "lazy_denoisers", "load_lazy", "owns", "switch"]

apply, load_lazy, switch = pipelines.apply_to_pipeline, pipelines.load_lazy, pipelines.switch


def owns(pipeline: Any) -> bool:
    return isinstance(pipeline, DiffusionPipeline)


def lazy_denoisers(pipeline: Any) -> Mapping[str, pipelines.Lazy]:
    return pipelines.lazy_denoisers(pipeline, needed=False)
