"""Whole pipelines as folders: the denoisers as lazy OpenVINO or ONNX files, the other parts as they run best.

Two layouts, chosen by what can read them:

1. OpenVINO, and optimum-intel knows the pipeline: its own layout, every part in OpenVINO. The lazy file takes the place of
   the dense one, name by name, so that `OVDiffusionPipeline.from_pretrained(folder)` runs it unmodified.
2. Else diffusers' layout, without the denoiser's weights: its folder holds the lazy file, `load_exported(folder)` runs it.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ...errors import ExportError, InputError
from ...export.card import read_card
from ...export.folder import export as export_model
from ...export.runtimes import runtime_of
from ...files import kind_of, path_of, read_object, write_json
from ...lazy.attach import PartHandle
from ...pipelines import disable, enable
from ...places import EXPORT, check_place, seal, whole_folder
from ...recipe import Recipe
from ...recipe_loading import load_recipe
from ...wrap.folder import wrap
from .graph import LazyDenoiser
from .loading import INDEX_FILE, check_index, load_denoiser, no_bars
from .optimum_layout import lazy_graph, optimum_knows, write_as_optimum
from .pipelines import apply_to_pipeline, lazy_denoisers

_log = logging.getLogger(__name__)

#: `owner/name`, as the hub has it.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def export_pipeline(
    pipeline: Any,
    directory: str | Path,
    format: str | None = None,
    *,
    telemetry: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a lazy pipeline as a folder that skips by itself.

    It makes images of the sizes that its files take. A pipeline of optimum-intel is written as it writes itself, but for its
    denoisers' files, which follow their plans.

    Args:
        pipeline: what `lazycompress.apply(pipe, recipe)` returned.
        directory: where to; written whole or not at all.
        format: "openvino", "onnx", or that of another package; None: that of the pipeline's own files, or for one in torch
            the recipe's.
        telemetry: add an output with the decisions of each step to the denoiser's file; None: the recipe's, which a pipeline
            that runs in files does without.
        overwrite: replace a folder that was exported before.

    Returns:
        The folder.

    Raises:
        ExportError: a folder that is not ours to replace, or a part that a converter does not take.
        InputError: the pipeline is not lazy.
        MissingExtraError: the format's packages are not installed.
    """
    found = lazy_denoisers(pipeline)
    target = check_place(directory, EXPORT, overwrite)
    if format is not None:
        _ = runtime_of(format)
    parts = {name: part for name, part in found.items() if isinstance(part, PartHandle)}
    if parts:
        return _wrapped(pipeline, parts, Path(directory), format, bool(telemetry), overwrite)
    recipe = next(iter(found.values())).recipe or Recipe()
    format = format or recipe.export.format
    telemetry = recipe.export.telemetry if telemetry is None else telemetry
    with whole_folder(target, EXPORT, overwrite) as folder:
        disable(pipeline)
        try:
            if format == "openvino" and optimum_knows(type(pipeline).__name__):
                loader = "optimum.intel.OVDiffusionPipeline"
                write_as_optimum(pipeline, found, folder, target, telemetry)
            else:
                loader = "lazycompress.integrations.diffusers.load_exported"
                _as_diffusers(
                    pipeline, {name: lazy_graph(part) for name, part in found.items()}, folder, format, telemetry
                )
        finally:
            enable(pipeline)
        card = {"format": format, "pipeline": type(pipeline).__name__, "denoisers": list(found), "loader": loader}
        seal(folder, EXPORT, card)
    return Path(directory)


def _wrapped(
    pipeline: Any,
    parts: Mapping[str, PartHandle],
    directory: Path,
    format: str | None,
    telemetry: bool,
    overwrite: bool,
) -> Path:
    """Write a pipeline whose denoisers are files already."""
    kind = type(pipeline).__name__
    if telemetry:
        raise ExportError(f"telemetry: the files of {kind} follow plans, and have no decisions to tell")
    plans = [part.plan for part in parts.values()]
    if any(plan != plans[0] for plan in plans):
        raise ExportError(
            f"{' and '.join(parts)} of {kind} follow different plans: save the pipeline, and wrap each of its files"
        )
    timestep = next(iter(parts.values())).engine.reader.timestep or None
    with tempfile.TemporaryDirectory() as saved:
        pipeline.save_pretrained(saved)
        there = "openvino" if any(Path(saved).glob("*/*.xml")) else "onnx"
        if format not in (None, there):
            raise ExportError(f"{kind} runs in {there}, and stays there: {format} needs the pipeline in torch")
        return wrap(saved, plans[0], directory, timestep_input=timestep, overwrite=overwrite)


def export_folder(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    directory: str | Path,
    format: str = "openvino",
    *,
    overrides: Mapping[str, Any] | None = None,
    telemetry: bool | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """From a folder of a diffusers pipeline, its hub id, or the folder of one model to an export: learn, then write.

    Raises:
        LazyCompressError: folder, recipe or target are at fault; one line says what to do.
    """
    chosen = load_recipe(recipe, overrides)
    check_place(directory, EXPORT, overwrite)  # before anything is learned
    told = telemetry if telemetry is not None else chosen.export.telemetry
    model = local_folder(model)
    if kind_of(model / INDEX_FILE, InputError) != "file":
        from ...api import apply

        lazy = apply(load_denoiser(model), chosen, progress=progress)
        return export_model(lazy, directory, format, telemetry=told, overwrite=overwrite)
    pipeline = load_pipeline(model)
    apply_to_pipeline(pipeline, chosen, progress=progress)
    return export_pipeline(pipeline, directory, format, telemetry=told, overwrite=overwrite)


def local_folder(model: str | Path) -> Path:
    """A folder as it is; for the hub id of a pipeline, the folder that diffusers keeps it in, downloaded if need be.

    Raises:
        InputError: there is no such folder, and the hub or its cache has no such pipeline.
    """
    folder = path_of(model, "model", InputError)
    if kind_of(folder, InputError) or not _HUB_ID.fullmatch(str(model)):
        return folder
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(str(model)))
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{model} is no folder, and diffusers gets no pipeline of that id: {said}") from error


def load_pipeline(folder: str | Path) -> Any:
    """A diffusers pipeline from a local folder, in float32.

    Raises:
        InputError: it does not load, or names classes of other packages than diffusers and transformers.
    """
    import torch
    from diffusers import DiffusionPipeline

    check_index(path_of(folder, "model", InputError))
    try:
        with no_bars():
            return cast(Any, DiffusionPipeline).from_pretrained(
                str(folder), local_files_only=True, torch_dtype=torch.float32
            )
    except Exception as error:  # of many classes: whatever a part's own loader meets in its files
        raise InputError(f"{folder}: diffusers does not load it: {' '.join(str(error).split())[:300]}") from error


def _as_diffusers(pipeline: Any, lazy: Mapping[str, LazyDenoiser], folder: Path, format: str, telemetry: bool) -> None:
    pipeline.save_pretrained(folder)
    index = read_object(folder / INDEX_FILE)
    index |= {name: [None, None] for name in lazy}  # diffusers is not to look for weights there
    write_json(index, folder / INDEX_FILE)
    for name, model in lazy.items():
        part = folder / name
        config = (part / "config.json").read_text(encoding="utf-8")
        shutil.rmtree(part)
        export_model(model, part, format, telemetry=telemetry)
        (part / "config.json").write_text(config, encoding="utf-8")
        card = read_card(part)
        seal(part, EXPORT, {key: value for key, value in card.items() if key not in ("lazycompress", "files")})


__all__ = ["export_folder", "export_pipeline", "load_pipeline", "local_folder", "optimum_knows"]
