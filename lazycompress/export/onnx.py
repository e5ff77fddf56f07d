"""Stage 6, export to ONNX: `If` per branch, caches and clock as inputs `past_*` and outputs `present_*`.

ONNX has no state of its own, so the caller hands the outputs of one call to the next; `OnnxRunner` does. A new image is still
seen by the file itself, from the clock among the state: any state of the right batch size will do.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from ..errors import ExportError, MissingExtraError
from .trace import DECISIONS, TracedModel

try:
    import onnx
    import torch.onnx
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("onnx", "onnx", "export to ONNX") from _error

MODEL_FILE = "model.onnx"

#: Protobuf holds at most 2 GB; above this the weights go into a file beside the model.
_LARGEST = 1_800_000_000


def convert(traced: TracedModel, telemetry: bool = False) -> onnx.ModelProto:
    """Convert a traced lazy model.

    Args:
        traced: the program and its names, traced with one batch size for inputs and state.
        telemetry: keep the output `lazy_decisions`, float32 [branches, batch], 1 where a branch was reused.

    Raises:
        ExportError: the converter does not take the program, or makes a model that does not check.
    """
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced.program, (), input_names=traced.inputs, output_names=traced.outputs, dynamo=True, verbose=False
            )
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"ONNX does not take the lowered graph: {' '.join(lines)[-300:]}") from error
    finally:
        quiet.setLevel(level)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    if not telemetry:
        decisions = next(output for output in model.graph.output if output.name == DECISIONS)
        model.graph.output.remove(decisions)
    return model


def write(model: onnx.ModelProto, directory: Path) -> Path:
    """Save the model into `directory`, its weights beside it where one file cannot hold them; returns the path."""
    path = directory / MODEL_FILE
    if model.ByteSize() > _LARGEST:
        onnx.save(model, path, save_as_external_data=True, location=f"{MODEL_FILE}.data")
    else:
        onnx.save(model, path)
    onnx.checker.check_model(str(path))
    return path


def versions(model: onnx.ModelProto) -> dict[str, Any]:
    """Opset and IR version."""
    return {"opset": next(o.version for o in model.opset_import if not o.domain), "ir": model.ir_version}
