"""Pipelines from folders that `export_pipeline` wrote in diffusers' layout: the denoisers run in OpenVINO or ONNX Runtime."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...errors import ExportError, InputError
from ...export.card import read_card
from ...export.runtimes import Runner, runtime_of
from ...files import path_of, read_object
from ...graph.call import take_apart
from ...pipelines import PipelineSummary
from ...report import Summary
from .loading import check_index, model_class, no_bars


class ExportedDenoiser(nn.Module):
    """A denoiser whose calls run in an exported file; it has the original's config, and no weights.

    Args:
        shell: the original on the meta device: signature and config, nothing to compute with.
        runner: of the file, such as `OpenVINORunner`.
    """

    def __init__(self, shell: nn.Module, runner: Runner) -> None:
        super().__init__()
        self.__dict__["shell"] = shell  # no submodule: nothing to move, save or count
        self.runner = runner
        self._twins: dict[str, Runner] = {}
        self._name: str | None = None

    @property
    def config(self) -> Any:
        return self.__dict__["shell"].config

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        call = take_apart(self.__dict__["shell"], args, kwargs)
        runner = self.runner
        if self._name is not None:
            if self._name not in self._twins:
                self._twins[self._name] = self.runner.twin()
            runner = self._twins[self._name]
        output = runner(**{leaf.name: tensor for leaf, tensor in zip(call.leaves, call.tensors, strict=True)})
        return output if return_dict else tuple(output.values())

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Within the block, calls go on with the state of that name."""
        outer, self._name = self._name, name
        try:
            yield
        finally:
            self._name = outer

    def reset(self) -> None:
        """Forget caches and statistics."""
        for runner in (self.runner, *self._twins.values()):
            runner.reset()

    def summary(self) -> Summary:
        return self.runner.summary()


def load_exported(folder: str | Path) -> Any:
    """A diffusers pipeline whose denoisers are the lazy files of an export.

    Its other parts run in torch. `exported_summary(pipe)` tells what was reused, if the export has telemetry.

    Raises:
        ExportError: the folder is no such export.
        MissingExtraError: the runtime of its format is not installed.
    """
    path = path_of(folder)
    card = read_card(path)
    if card.get("loader", "").rpartition(".")[2] != load_exported.__name__:
        reader = card.get("loader", "lazycompress' runners")
        raise ExportError(f"{path} is for {reader}, not for load_exported")
    shells = {name: _shell(path, name) for name in card["denoisers"]}
    check_index(path)
    try:
        with no_bars():
            parts = cast(Any, DiffusionPipeline).from_pretrained(
                str(path), local_files_only=True, **dict.fromkeys(shells)
            )
    except Exception as error:  # of many classes: whatever a part's own loader meets in its files
        said = " ".join(str(error).split())[:300]
        raise ExportError(f"{path}: diffusers does not load it: {said}; verify tells which file was changed") from error
    # Made a second time, since pipelines read their denoiser's config while they are made.
    wanted = [name for name in inspect.signature(type(parts).__init__).parameters if name != "self"]
    held = parts.components
    known = {name: held.get(name, parts.config.get(name)) for name in wanted if name not in shells}
    pipeline = type(parts)(**known, **shells)
    for name, shell in shells.items():
        object.__setattr__(pipeline, name, ExportedDenoiser(shell, _runner(path / name)))
    return pipeline


def exported_summary(pipeline: Any) -> PipelineSummary:
    """What was reused in each exported denoiser since its last reset; all zero for files without telemetry."""
    parts = {n: p for n, p in pipeline.components.items() if isinstance(p, ExportedDenoiser)}
    if not parts:
        raise InputError(f"{type(pipeline).__name__} has no exported denoiser: load_exported makes one")
    return PipelineSummary({name: part.summary() for name, part in parts.items()})


def _shell(folder: Path, name: str) -> nn.Module:
    path = folder / name / "config.json"
    config = read_object(path)
    found = model_class(config.get("_class_name"))
    if found is None:
        raise ExportError(f"{path}: diffusers has no model class {str(config.get('_class_name'))[:80]!r}")
    try:
        with torch.device("meta"):
            shell: nn.Module = found.from_config(config)
    except Exception as error:  # of many classes: the model's own code, called with what the file says
        raise ExportError(f"{path}: no configuration of its class: {' '.join(str(error).split())[:300]}") from error
    return shell


def _runner(folder: Path) -> Runner:
    card = read_card(folder)
    return runtime_of(card["format"]).open_folder(folder, card)


__all__ = ["ExportedDenoiser", "exported_summary", "load_exported"]
