"""Pipelines in optimum-intel's own layout, every part in OpenVINO, which `OVDiffusionPipeline` runs unmodified.

optimum-intel writes the parts. A denoiser that skips whole calls is its dense file, wrapped. One that skips branches, or tells
its decisions, is written from its graph, with the names of the dense file.
"""

from __future__ import annotations

import importlib
import logging
import math
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ExportError, LazyCompressError, MissingExtraError
from ...export.check import CHECK_FILE
from ...export.folder import describe, parity
from ...export.replay import replay
from ...export.trace import Form, trace, widest
from ...files import write_tensors
from ...lazy.attach import Handle
from ...lazy.convert import graph_of
from ...places import EXPORT, seal
from ...wrap.folder import Options, wrap_file
from ...wrap.plans import of_all_passes
from ...wrap.recorded import record, tolerance_of
from .graph import LazyDenoiser

_log = logging.getLogger(__name__)

#: Parts of so many parameters, denoisers apart, have weights in 8 bits, as where optimum-intel is left to itself.
_LARGE = 1e9


def optimum_knows(pipeline_class: str) -> bool:
    """Whether optimum-intel is installed and has an OpenVINO pipeline of that class."""
    return _optimum_class(pipeline_class) is not None


def _optimum_class(pipeline_class: str) -> Any:
    try:
        return getattr(importlib.import_module("optimum.intel"), f"OV{pipeline_class}", None)
    except (ImportError, RuntimeError):
        return None


def write_as_optimum(
    pipeline: Any, lazy: Mapping[str, Handle | LazyDenoiser], folder: Path, target: Path, telemetry: bool
) -> None:
    """Write a pipeline whose denoisers are switched off for the while.

    Args:
        pipeline: in torch.
        lazy: its denoisers.
        folder: where to.
        target: where the folder will be, for messages.
        telemetry: files with a further output, the decisions of each call; they are written from graphs.

    Raises:
        ExportError: optimum-intel does not export the pipeline, or a file does not give what torch gives.
        MissingExtraError: optimum-intel is not installed.
    """
    _write_dense(pipeline, folder)
    for name, denoiser in lazy.items():
        path = folder / name / "openvino_model.xml"
        if not path.is_file():
            raise ExportError(f"optimum-intel wrote no {path.name} for {name}; it wrote {_listed(folder)}")
        with tempfile.TemporaryDirectory(dir=folder) as apart:
            dense = Path(apart) / path.name
            for old in (path, path.with_suffix(".bin")):
                old.rename(Path(apart) / old.name)
            if isinstance(denoiser, Handle) and not telemetry and _wrapped(denoiser, name, dense, path):
                continue
            _from_graph(denoiser, dense, path.parent, target / name, telemetry)
    _compress_large(folder, lazy)


def _write_dense(pipeline: Any, folder: Path) -> None:
    try:
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig
    except ImportError as error:
        raise MissingExtraError("optimum-intel", "optimum", "exporting a pipeline to OpenVINO") from error
    with tempfile.TemporaryDirectory() as saved, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(saved)
        try:
            main_export(
                saved, output=folder, task=_optimum_class(type(pipeline).__name__).export_feature,
                library_name="diffusers", convert_tokenizer=False,
                ov_config=OVConfig(),  # left out, weights of large denoisers are stored in 8 bits
            )  # fmt: skip
        except Exception as error:
            lines = " ".join(str(error).split())
            raise ExportError(f"optimum-intel does not export {type(pipeline).__name__}: {lines[:300]}") from error


def _wrapped(lazy: Handle, name: str, dense: Path, path: Path) -> bool:
    """Wrap the dense file of a denoiser that skips whole calls, if that gives what the module in memory gives.

    What `save_pretrained` leaves out (adapters that are not fused, a patched forward) is in no file that optimum-intel writes.
    """
    from ...wrap.openvino import ports, read

    inputs, _ = ports(read(dense))
    reader = lazy.engine.reader
    moving = tuple(port.name for port in inputs if port.name in reader.moving)
    known = {port.name for port in inputs}
    timestep = reader.timestep if reader.timestep in known else None

    def check(written: Path, card: Mapping[str, Any]) -> dict[str, Any]:
        found = record(lazy, card, inputs)
        tolerance = tolerance_of(lazy)
        told = {"difference": 0.0, "largest": 0.0, "tolerance": tolerance, "flipped": 0}
        report = replay(written.parent, {**card, "parity": told}, found)
        if not report.ok:
            raise ExportError(f"what optimum-intel writes is not what the module gives: {report}")
        write_tensors(found, written.parent / CHECK_FILE)
        return {"parity": told | {"difference": report.difference, "largest": report.largest}}

    try:
        options = Options(of_all_passes(lazy.plan), timestep, moving, streams=max(2, lazy.turns))
        wrap_file(dense, path, options, check)
    except LazyCompressError as error:
        _log.warning("lazycompress writes %s from its graph: %s", name, error)
        return False
    return True


def lazy_graph(lazy: Handle | LazyDenoiser) -> LazyDenoiser:
    """The lazy graph that is written for a denoiser."""
    if isinstance(lazy, LazyDenoiser):
        return lazy
    graph = graph_of(lazy, LazyDenoiser)
    graph.turns = lazy.turns
    return graph


def _from_graph(denoiser: Handle | LazyDenoiser, dense: Path, part: Path, target: Path, telemetry: bool) -> None:
    """Write the lazy graph of a denoiser in the place of its dense file."""
    import openvino as ov

    turns = denoiser.turns
    if turns > 1:
        _log.warning(
            "%s is called %d times a step with these arguments, and OVDiffusionPipeline keeps one state: such calls compute "
            "everything; guidance in one batch, or none, skips",
            part.name,
            turns,
        )
    graph = lazy_graph(denoiser)
    write = partial(_write_with_ports_of, ov.Core().read_model(dense), graph, part, target, telemetry)
    seal(part, EXPORT, widest(graph, part.name, write))


def _write_with_ports_of(
    dense: Any, model: LazyDenoiser, part: Path, target: Path, telemetry: bool, form: Form
) -> dict[str, Any]:
    """Write a denoiser that is called as the OpenVINO model `dense` is; returns the card."""
    from ...export import openvino as to_openvino

    traced = trace(model, form=form)
    converted = to_openvino.with_ports_of(to_openvino.convert(traced, telemetry=telemetry), dense)
    to_openvino.write(converted, part)
    card = describe(model, traced, "openvino", telemetry=telemetry, stateful=True)
    card["outputs"] = [port.get_any_name() for port in dense.outputs]
    return card | {"parity": parity(model, card, part, target, form.sizes)}


def _compress_large(folder: Path, but: Mapping[str, Any]) -> None:
    """Store the weights of large parts, text encoders most often, in 8 bits."""
    import openvino as ov

    core = ov.Core()
    for path in sorted(folder.glob("*/openvino_model.xml")):
        if path.parent.name in but:
            continue
        model = core.read_model(path)
        constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        numbers = sum(math.prod(node.shape) for node in constants if node.get_element_type().is_real())
        if numbers < _LARGE:
            continue
        try:
            import nncf
        except ImportError as error:
            raise MissingExtraError(
                "nncf", "optimum", f"storing the weights of {path.parent.name} in 8 bits"
            ) from error
        with tempfile.TemporaryDirectory(dir=folder) as apart:
            smaller = Path(apart) / path.name
            ov.save_model(nncf.compress_weights(model), smaller, compress_to_fp16=False)
            for new in (smaller, smaller.with_suffix(".bin")):
                new.replace(path.parent / new.name)


def _listed(folder: Path) -> str:
    return ", ".join(sorted(path.parent.name for path in folder.glob("*/*.xml"))) or "nothing"


__all__ = ["lazy_graph", "optimum_knows", "write_as_optimum"]
