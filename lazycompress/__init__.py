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
    from .graph.branch import Branch
    from .lazy.model import LazyModule
    from .pipelines import disable, enable, export, load, reset, save, set_target, summary
    from .recipe import Recipe
    from .runtime import LazyModel
    from .wrap.folder import wrap

# `lazycompress.export` and `lazycompress.wrap` are the functions. Importing the subpackages of these names once, and dropping
# the attributes that the import machinery sets, keeps it so: they are set at the first import only.
for _name in ("export", "wrap"):
    importlib.import_module(f".{_name}", __name__)
    globals().pop(_name, None)

_LAZY = {
    "apply": "api",
    "locate": "api",
    "export": "pipelines",
    "Branch": "graph.branch",
    "disable": "pipelines",
    "enable": "pipelines",
    "image": "api",
    "reset": "pipelines",
    "set_target": "pipelines",
    "summary": "pipelines",
    "Recipe": "recipe",
    "LazyModel": "runtime",
    "LazyModule": "lazy.model",
    "load": "pipelines",
    "save": "pipelines",
    "wrap": "wrap.folder",
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
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import lazycompress` stays light."""
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
