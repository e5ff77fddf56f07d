"""Stage 6, export to OpenVINO: `If` per branch, caches and the last timestep as state, the original's inputs and outputs.

1. The traced program is converted; inputs and outputs get exactly one name each, sizes that conversion lost are put back.
2. Each past input becomes a `ReadValue` that starts as "no image yet", each present output an `Assign` to it.

A new image (timestep not past the last one, other conditioning, other batch size, or `reset_state()`) computes every branch
by itself: the clock is part of the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ExportError, MissingExtraError
from ..graph.insert import StateSpec
from .trace import DECISIONS, TracedModel

try:
    import openvino as ov
    from openvino import opset13 as ops
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("openvino", "openvino", "export to OpenVINO") from _error

MODEL_FILE = "openvino_model.xml"


def convert(traced: TracedModel, stateful: bool = True, telemetry: bool = False) -> ov.Model:
    """Convert a traced lazy model.

    Args:
        traced: the program and its names.
        stateful: caches as state; else as inputs `past_*` and outputs `present_*`.
        telemetry: keep the output `lazy_decisions`, float32 [branches, batch], 1 where a branch was reused.

    Raises:
        ExportError: the converter does not take the program.
    """
    try:
        model = ov.convert_model(traced.program)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"OpenVINO does not convert the lowered graph: {' '.join(lines)[-300:]}") from error
    _name(model, traced)
    if not telemetry:
        model.remove_result(_result(model, DECISIONS))
    if stateful:
        model = _with_state(model, traced)
    model.validate_nodes_and_infer_types()
    return model


def write(model: ov.Model, directory: Path) -> Path:
    """Save the model's two files into `directory` and return the path of the XML."""
    path = directory / MODEL_FILE
    ov.save_model(model, path, compress_to_fp16=False)
    return path


def _name(model: ov.Model, traced: TracedModel) -> None:
    """Rule 1. Converted inputs keep the flat position in one of their names; the others are aliases of inner values."""
    by_position: dict[int, Any] = {}
    prefix = _flat_prefix(model)
    for port in model.inputs:
        for alias in port.get_names():
            if alias.startswith(prefix) and alias[len(prefix) :].isdigit():
                by_position[int(alias[len(prefix) :])] = port
    shapes = {}
    for position, name in enumerate(traced.inputs):
        port = by_position.get(position)
        if port is None:
            continue  # an input that nothing depends on is gone after conversion
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        shapes[port] = ov.PartialShape(traced.shapes[position])
    for port, name in zip(model.outputs, traced.outputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    model.reshape(shapes)


def _flat_prefix(model: ov.Model) -> str:
    aliases = [alias for port in model.inputs for alias in port.get_names()]
    for alias in aliases:
        if alias.endswith("_0") and not alias[:-2].isdigit():
            return str(alias[:-1])
    raise ExportError(f"cannot tell the converted inputs apart: {sorted(aliases)[:8]}")


def _result(model: ov.Model, name: str) -> Any:
    for result in model.get_results():
        if result.get_friendly_name() == name:
            return result
    raise ExportError(f"the converted model has no output {name!r}")


def _with_state(model: ov.Model, traced: TracedModel) -> ov.Model:
    """Rule 2."""
    parameters = {p.get_friendly_name(): p for p in model.get_parameters()}
    results = {r.get_friendly_name(): r for r in model.get_results()}
    sinks, gone = [], []
    for spec, past, present in zip(traced.state, traced.past, traced.present, strict=True):
        parameter, result = parameters.get(past), results[present]
        value = result.input_value(0)
        if parameter is None:  # never read: no state
            gone.append(present)
            continue
        variable = ov.op.util.VariableInfo()
        variable.data_shape = ov.PartialShape(list(spec.shape))
        variable.data_type = parameter.get_element_type()
        variable.variable_id = past
        read = ops.read_value(ops.constant(_initial(spec)), past, variable.data_type, variable.data_shape)
        read.set_friendly_name(past)
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(read.output(0))
        # An Assign reads a node's only output; a branch has several.
        sinks.append(ops.assign(_identity(value), past))
        gone.append(present)
    kept_results = [r for name, r in results.items() if name not in gone]
    kept_parameters = [p for name, p in parameters.items() if name not in traced.past]
    ordered = [next(p for p in kept_parameters if p.get_friendly_name() == n) for n in traced.inputs if n in
               {p.get_friendly_name() for p in kept_parameters}]  # fmt: skip
    return ov.Model(kept_results, sinks, ordered, "lazycompress")


def _identity(value: Any) -> Any:
    return ops.reshape(value, ops.shape_of(value, "i64"), special_zero=False)


def _initial(spec: StateSpec) -> np.ndarray[Any, Any]:
    """One row of "no image yet"; the graph ignores all rows of a state whose batch size differs."""
    shape = [spec.scale if size == -1 else size for size in spec.shape]
    tensor = torch.full(shape, spec.fill, dtype=spec.dtype)
    if spec.dtype is torch.bfloat16:
        tensor = tensor.to(torch.float32)
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array
