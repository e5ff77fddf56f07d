"""Denoisers from local folders in diffusers' layout. No name in a folder is imported but those of classes that diffusers has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import InputError, MissingExtraError
from ...files import kind_of, path_of, read_object

INDEX_FILE = "model_index.json"

#: Packages whose classes a pipeline's parts may be; diffusers itself imports whatever an index names.
_PACKAGES = ("diffusers", "transformers")

#: Files of a part that transformers reads the name of a module from.
_CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def load_denoiser(folder: str | Path) -> nn.Module:
    """The denoising model in a folder: a single model's (`config.json`), or a pipeline's (`model_index.json`).

    Raises:
        InputError: the folder is neither, its class is not one that diffusers has, or it does not load.
        MissingExtraError: diffusers is not installed.
    """
    path = path_of(folder, "model", InputError)
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers", "train", "loading a model from a folder") from error
    if kind_of(path / INDEX_FILE, InputError) == "file":
        parts = check_index(path)
        models = {name: model_class(kind) for name, (package, kind) in parts.items() if package == diffusers.__name__}
        denoisers = [name for name, kind in models.items() if kind is not None and not hasattr(kind, "decode")]
        if len(denoisers) != 1:
            raise InputError(
                f"{path} is a pipeline with {len(denoisers)} denoisers ({', '.join(denoisers)}): name one of its folders"
            )
        path = path / denoisers[0]
    config = path / "config.json"
    if kind_of(config, InputError) != "file":
        raise InputError(f"{path} holds neither config.json nor model_index.json: not a folder of a diffusers model")
    name = read_object(config, InputError).get("_class_name")
    model = model_class(name)
    if model is None:
        raise InputError(f"{config}: diffusers has no model class {str(name)[:80]!r}")
    try:
        loaded: nn.Module = model.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of many classes: whatever diffusers and safetensors meet in its files
        raise InputError(f"{path}: diffusers does not load it: {' '.join(str(error).split())[:300]}") from error
    return loaded.eval()


@contextmanager
def no_bars() -> Iterator[None]:
    """Without diffusers' progress bars while parts are loaded: what is wrong with them is one line on stderr."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def model_class(name: Any) -> Any:
    """The model class of that name in diffusers, or None."""
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, diffusers.ModelMixin) else None


def check_index(folder: Path) -> dict[str, tuple[str, str]]:
    """The parts that a pipeline's `model_index.json` names: of each the package, or module of diffusers, and the class.

    Raises:
        InputError: it is no index of a pipeline that diffusers has, or names a part of another package.
    """
    import diffusers

    path = folder / INDEX_FILE
    index = read_object(path, InputError)
    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise InputError(f"{path}: diffusers has no pipeline class {str(name)[:80]!r}")
    parts = {}
    for part, value in index.items():
        # Besides parts there are settings of the pipeline, which may be lists of numbers.
        if part.startswith("_") or not isinstance(value, list) or not any(isinstance(word, str) for word in value):
            continue
        if len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise InputError(f"{path}: {part} is {str(value)[:80]}; a part is named by its package and its class")
        package, kind = value
        if package not in _PACKAGES and not _is_module(package):
            raise InputError(
                f"{path}: {part} is of the package {package[:80]!r}; only classes of {' and '.join(_PACKAGES)} are loaded"
            )
        for name in _CONFIGS:
            config = path.parent / part / name
            if kind_of(config, InputError) == "file" and "auto_map" in read_object(config, InputError):
                raise InputError(
                    f"{config} asks for code of its own (auto_map), which is not run: load the pipeline yourself"
                )
        parts[part] = (package, kind)
    return parts


def _is_module(name: str) -> bool:
    """Whether diffusers keeps pipelines in a module of that name."""
    import diffusers.pipelines

    return name.isidentifier() and (Path(diffusers.pipelines.__file__).parent / name / "__init__.py").is_file()
