"""Denoisers from local folders in diffusers' layout."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import InputError, MissingExtraError


def load_denoiser(folder: str | Path) -> nn.Module:
    """The denoising model in a folder: a single model's (`config.json`), or a pipeline's (`model_index.json`).

    Raises:
        InputError: the folder is neither, or its class is not one that diffusers has.
        MissingExtraError: diffusers is not installed.
    """
    path = Path(folder)
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers", "train", "loading a model from a folder") from error
    index = path / "model_index.json"
    if index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))
        owned = [name for name, value in parts.items() if isinstance(value, list) and value[0] == "diffusers"]
        models = [name for name in owned if issubclass_of(diffusers, parts[name][1])]
        denoisers = [name for name in models if not hasattr(getattr(diffusers, parts[name][1]), "decode")]
        if len(denoisers) != 1:
            raise InputError(
                f"{path} is a pipeline with {len(denoisers)} denoisers ({', '.join(denoisers)}): name one of its folders"
            )
        return load_denoiser(path / denoisers[0])
    config = path / "config.json"
    if not config.is_file():
        raise InputError(f"{path} holds neither config.json nor model_index.json: not a folder of a diffusers model")
    name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    if not isinstance(name, str) or not issubclass_of(diffusers, name):
        raise InputError(f"{config}: diffusers has no model class {name!r}")
    model: Any = getattr(importlib.import_module("diffusers"), name)
    loaded: nn.Module = model.from_pretrained(path, local_files_only=True)
    return loaded.eval()


def issubclass_of(diffusers: Any, name: str) -> bool:
    """Whether diffusers has a model class of that name."""
    found = getattr(diffusers, name, None)
    return isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
