"""diffusers: whole pipelines made lazy, exported, and loaded."""

from __future__ import annotations

from ...errors import MissingExtraError
from ...pipelines import PipelineSummary, disable, enable, reset, set_target, summary

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("diffusers", "train", "a diffusers pipeline") from _error

from .export import export_folder, export_pipeline, load_pipeline, local_folder, optimum_knows
from .exported import ExportedDenoiser, exported_summary, load_exported
from .graph import LazyDenoiser
from .loading import INDEX_FILE, load_denoiser
from .pipelines import apply_to_pipeline, denoisers, example_calls, lazy_denoisers, load_lazy, set_policy

__all__ = [
    "INDEX_FILE",
    "ExportedDenoiser",
    "LazyDenoiser",
    "PipelineSummary",
    "apply_to_pipeline",
    "denoisers",
    "disable",
    "enable",
    "example_calls",
    "export_folder",
    "export_pipeline",
    "exported_summary",
    "lazy_denoisers",
    "load_denoiser",
    "load_exported",
    "load_lazy",
    "load_pipeline",
    "local_folder",
    "optimum_knows",
    "reset",
    "set_policy",
    "set_target",
    "summary",
]
