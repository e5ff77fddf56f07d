"""lazycompress: makes any Diffusion Transformer lazy, and ships it as ONNX or OpenVINO with real control flow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from .errors import (
    CaptureError,
    ExportError,
    InputError,
    LazyCompressError,
    LocateError,
    MissingExtraError,
    RecipeError,
)

if TYPE_CHECKING:
    from .api import apply, image, locate
    from .export.folder import export
    from .graph.locate import Branch
    from .integrations.diffusers import disable, enable, reset, set_target, summary
    from .lazy.model import LazyModule
    from .recipe import Recipe
    from .runtime import LazyModel
    from .storage import load, save

# `lazycompress.export` is the function. Importing the subpackage of that name once, and dropping the attribute that the
# import machinery sets, keeps it so: the attribute is set at the first import only.
importlib.import_module(".export", __name__)
globals().pop("export", None)

_LAZY = {
    "apply": "api",
    "locate": "api",
    "export": "export.folder",
    "Branch": "graph.locate",
    "disable": "integrations.diffusers",
    "enable": "integrations.diffusers",
    "image": "api",
    "reset": "integrations.diffusers",
    "set_target": "integrations.diffusers",
    "summary": "integrations.diffusers",
    "Recipe": "recipe",
    "LazyModel": "runtime",
    "LazyModule": "lazy.model",
    "load": "storage",
    "save": "storage",
}

__all__ = [
    "Branch",
    "CaptureError",
    "ExportError",
    "InputError",
    "LazyCompressError",
    "LazyModel",
    "LazyModule",
    "LocateError",
    "MissingExtraError",
    "Recipe",
    "RecipeError",
    "__version__",
    "apply",
    "disable",
    "enable",
    "export",
    "image",
    "load",
    "locate",
    "reset",
    "save",
    "set_target",
    "summary",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import lazycompress` stays light."""
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
