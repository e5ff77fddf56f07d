"""Export folders: the model's files, and `lazycompress.json` that says what they are and how well they agreed with torch."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ExportError
from ..runtime import LazyModel
from ..storage import whole_folder
from .card import CARD_FILE
from .trace import TracedModel, trace


def export(
    lazy: LazyModel,
    directory: str | Path,
    format: str | None = None,
    *,
    telemetry: bool | None = None,
    stateful: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write a lazy model as a file that skips by itself.

    Args:
        lazy: a model with trained gates, under any policy; the file always follows the gates.
        directory: where to; written whole or not at all.
        format: "openvino" (caches as state) or "onnx" (caches as inputs and outputs); None: the recipe's.
        telemetry: add the output `lazy_decisions`, float32 [branches, batch]; None: the recipe's.
        stateful: OpenVINO only: caches as state; else as inputs `past_*` and outputs `present_*`.
        overwrite: replace a folder that an export wrote before.

    Returns:
        The folder.

    Raises:
        ExportError: unknown format, a folder that is not ours to replace, or a graph that a converter does not take.
        MissingExtraError: the format's packages are not installed.
    """
    recipe = lazy.recipe
    format = format or (recipe.export.format if recipe is not None else "openvino")
    telemetry = telemetry if telemetry is not None else recipe is not None and recipe.export.telemetry
    if format not in ("openvino", "onnx"):
        raise ExportError(f"there is no export format {format!r}; use 'openvino' or 'onnx'")
    target = Path(directory)
    if target.is_dir() and any(target.iterdir()):
        if not (target / CARD_FILE).is_file():
            raise ExportError(f"{target} is not empty and no export of lazycompress; choose another folder")
        if not overwrite:
            raise ExportError(f"{target} holds an export already; pass overwrite=True, or choose another folder")
    with whole_folder(target) as folder:
        traced = trace(lazy, one_batch=format == "onnx" or not stateful)
        details: dict[str, Any] = {}
        if format == "openvino":
            from . import openvino as to_openvino

            to_openvino.write(to_openvino.convert(traced, stateful=stateful, telemetry=telemetry), folder)
        else:
            from . import onnx as to_onnx

            model = to_onnx.convert(traced, telemetry=telemetry)
            to_onnx.write(model, folder)
            details = to_onnx.versions(model)
        card = describe(lazy, traced, format, telemetry=telemetry, stateful=stateful and format == "openvino")
        card |= details
        (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return target


def describe(lazy: LazyModel, traced: TracedModel, format: str, *, telemetry: bool, stateful: bool) -> dict[str, Any]:
    """The contents of `lazycompress.json`."""
    program = lazy.program(lazy.example)
    names = [leaf.name for leaf in program.lowered.leaves]
    return {
        "lazycompress": __version__,
        "format": format,
        "stateful": stateful,
        "telemetry": telemetry,
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
