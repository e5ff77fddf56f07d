"""Export folders: the model's files, and `lazycompress.json` that says what they are and how well they agreed with torch."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..errors import ExportError
from ..files import write_tensors
from ..lazy.attach import Handle
from ..lazy.convert import graph_of, lazy_of
from ..lazy.model import LazyModule
from ..places import EXPORT, check_place, seal, whole_folder
from ..runtime import LazyModel
from .card import Granularity, Weights
from .check import CHECK_FILE, compare, record, recorded_calls, start, verify
from .finite import need_finite
from .runtimes import runtime_of
from .trace import Form, TracedModel, trace, widest

#: Largest difference to torch that an export may have, as a share of the largest output, with weights that are stored in half
#: the size. With others it is what the runtime rounds in float32.
_STORED: dict[Weights, float] = {"f16": 2e-2, "bf16": 1e-1}

#: With 8-bit activations: a value that lies between two levels is rounded differently by different arithmetic.
_COMPOSED = 5e-2


def export(
    lazy: LazyModel | LazyModule | Handle | nn.Module,
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
    """Write a lazy model, or the denoiser of a lazy pipeline, as a file: see `lazycompress.export`, whose arguments these are.

    One that skips whole calls is captured for this.
    """
    lazy = lazy_of(lazy)
    recipe = lazy.recipe
    format = format or (recipe.export.format if recipe is not None else "openvino")
    telemetry = telemetry if telemetry is not None else recipe is not None and recipe.export.telemetry
    runtime = runtime_of(format)
    usual: Granularity = getattr(runtime, "DECIDES", "sample")
    granularity = usual if decide is None else decide
    for name, value, known in (("weights", weights, Weights), ("decide", granularity, Granularity)):
        if value not in get_args(known):
            raise ExportError(f"{name}: there is no {value!r}; use {' or '.join(map(repr, get_args(known)))}")
    place = check_place(directory, EXPORT, overwrite)
    graph = lazy if isinstance(lazy, LazyModel) else graph_of(lazy)
    need_finite(graph, {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[weights])
    with whole_folder(place, EXPORT, overwrite) as folder:

        def write(form: Form) -> dict[str, Any]:
            for path in folder.iterdir():  # what the form before left
                path.unlink()
            card = _write(graph, folder, format, telemetry, stateful and runtime.STATEFUL, weights, granularity, form)
            return card | ({"parity": parity(graph, card, folder, place, form.sizes)} if check else {})

        card = widest(graph, type(graph.model).__name__, write)
        seal(folder, EXPORT, card)
    return Path(directory)


def parity(lazy: LazyModel, card: dict[str, Any], folder: Path, target: Path, sizes: bool) -> dict[str, Any]:
    """Record calls in torch, run the written file on them, and say for the card how it compares.

    Args:
        lazy: what the file was made from.
        card: what `describe` gave.
        folder: where the file is, and the record goes.
        target: where the folder will be, for messages.
        sizes: record calls of other sizes too.

    Raises:
        ExportError: it gives something else than torch.
    """
    found = record(lazy, card["decide"], sizes)
    calls = recorded_calls(found, card, f"{type(lazy.model).__name__} in torch")
    write_tensors(found, folder / CHECK_FILE)
    exact = card["weights"] == "f32" and not lazy.stages
    rounding = runtime_of(card["format"]).ROUNDING if card["weights"] == "f32" else _STORED[card["weights"]]
    tolerance = max(rounding, _COMPOSED if lazy.stages else 0.0)
    try:
        report = compare(target, calls, start(folder, card), tolerance, allowed=0 if exact else sys.maxsize)
    except RuntimeError as error:
        raise ExportError(f"the written file does not run: {' '.join(str(error).split())[:300]}") from error
    if not report.ok:
        raise ExportError(f"the written file does not give what torch gives: {report}")
    return {
        "difference": report.difference,
        "largest": report.largest,
        "tolerance": tolerance,
        "flipped": report.flipped,
    }


def _write(
    lazy: LazyModel,
    folder: Path,
    format: str,
    telemetry: bool,
    stateful: bool,
    weights: Weights,
    decide: Granularity,
    form: Form,
) -> dict[str, Any]:
    """Write the model's files; returns the card. What was traced is freed on return."""
    traced = trace(lazy, one_batch=not stateful, decide=decide, form=form)
    card = describe(lazy, traced, format, telemetry=telemetry, stateful=stateful, weights=weights, decide=decide)
    more = runtime_of(format).write_traced(
        traced, folder, stateful=stateful, telemetry=telemetry, weights=weights, stages=lazy.stages
    )
    return card | dict(more)


def describe(
    lazy: LazyModel,
    traced: TracedModel,
    format: str,
    *,
    telemetry: bool,
    stateful: bool,
    weights: Weights = "f32",
    decide: Granularity = "sample",
) -> dict[str, Any]:
    """The contents of `lazycompress.json`, but for what `places.seal` adds."""
    program = lazy.program(lazy.example)
    names = [leaf.name for leaf in program.lowered.leaves]
    return {
        "format": format,
        "stateful": stateful,
        "telemetry": telemetry,
        "weights": weights,
        "decide": decide,
        "stages": lazy.stages,
        "versions": {name: _version(name) for name in ("torch", "openvino", "onnx", "onnxruntime", "nncf")},
        "recipe": lazy.recipe.model_dump(mode="json") if lazy.recipe is not None else None,
        "inputs": names,
        "outputs": traced.outputs[: program.lowered.outputs],
        "timestep": names[program.lowered.timestep],
        "latents": names[program.lowered.latents],
        "state": [
            {
                "name": s.name,
                "shape": list(s.shape),
                "dtype": str(s.dtype).removeprefix("torch."),
                "fill": s.fill,
                "scale": s.scale,
            }
            for s in traced.state
        ],
        "branches": [{"name": b.name, "kind": b.kind, "macs": b.macs} for b in lazy.branches],
        "dense_macs": lazy.dense_macs,
        "threshold": float(lazy.gates.threshold),
        "grid": lazy.gates.grid.tolist(),
        "expected_macs_ratio": lazy.expected_macs_ratio(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


__all__ = ["describe", "export", "parity", "verify"]
