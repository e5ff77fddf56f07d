"""Stage 6, export to OpenVINO: `If` per branch, caches and the last timestep as state, the original's inputs and outputs.

1. The traced program is converted; inputs and outputs get exactly one name each, sizes that conversion lost are put back.
2. Each past input becomes a `ReadValue` that starts as "no image yet", each present output an `Assign` to it.
3. Weights may be stored in half the size; a conversion restores them when the file is loaded. Gates keep float32.
4. Gates and clock compute in float32 whatever the precision hint, see `exact`.

A new image (timestep not past the last one, other conditioning, batch or sizes, or `reset_state()`) computes every branch
by itself: the clock is part of the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.decomp_utils import CustomDecompTable

from ..errors import ExportError, LazyCompressError, MissingExtraError
from ..graph.insert import FORECAST, StateSpec
from .card import Weights
from .decompose import decompose
from .exact import keep_exact
from .finite import narrowed
from .portable import add_sizes, attend_to_something, constants_within, select_scatter, slice_scatter
from .trace import DECISIONS, TracedModel, is_weight

try:
    import openvino as ov
    from openvino import opset13 as ops
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("openvino", "openvino", "export to OpenVINO") from _error

MODEL_FILE = "openvino_model.xml"

#: See `runtimes.Runtime`. OpenVINO is less exact where a denominator comes near zero: the dense file of a tiny Sana (linear
#: attention) has 2e-4, and caches carry that on.
STATEFUL, ROUNDING = True, 1e-3

#: Smaller constants are not worth storing in 4 bits.
_LEAST = 32

#: The states that are not caches, as variables and as outputs.
_FORECASTS = tuple(f"{time}_{word}_" for time in ("past", "present") for word in FORECAST)
_CLOCK = {"past_timestep", "past_prints", "past_times", "present_timestep", "present_prints", "present_times"}


def write_traced(
    traced: TracedModel, folder: Path, *, stateful: bool, telemetry: bool, weights: Weights, stages: Sequence[str]
) -> Mapping[str, Any]:
    """See `runtimes.Runtime`."""
    write(convert(traced, stateful=stateful, telemetry=telemetry, weights=weights), folder)
    return {}


def open_folder(folder: Path, card: Mapping[str, Any]) -> Any:
    """See `runtimes.Runtime`."""
    from .openvino_runner import OpenVINORunner

    return OpenVINORunner(folder, card=dict(card))


def convert(traced: TracedModel, stateful: bool = True, telemetry: bool = False, weights: Weights = "f32") -> ov.Model:
    """Convert a traced lazy model.

    Args:
        traced: the program and its names.
        stateful: caches as state; else as inputs `past_*` and outputs `present_*`.
        telemetry: keep the output `lazy_decisions`, float32 [branches, batch], 1 where a branch was reused.
        weights: how float32 weights are stored.

    Raises:
        ExportError: the converter does not take the program.
    """
    try:
        decoder = TorchFXPythonDecoder(_decomposed(traced.program), dynamic_shapes=True)
        with _same_logging():
            model = ov.convert_model(decoder)
        _name(model, traced)
        if weights != "f32":
            _store_as(model, weights)
        _store_4_bits(model)
        if not telemetry:
            model.remove_result(_result(model, DECISIONS))
        if stateful:
            model = _with_state(model, traced)
        model.validate_nodes_and_infer_types()
    except LazyCompressError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"OpenVINO does not convert the lowered graph: {' '.join(lines)[-300:]}") from error
    return model


def with_ports_of(model: ov.Model, dense: ov.Model) -> ov.Model:
    """The same model with exactly the input and output names, orders and element types of `dense`.

    Callers of the dense file can then use the lazy one without noticing. A further output (telemetry) stays last.

    Raises:
        ExportError: the two do not have the same inputs, or ranks differ.
    """
    ours = {p.get_friendly_name(): p for p in model.get_parameters()}
    wanted = [port.get_any_name() for port in dense.inputs]
    if sorted(ours) != sorted(wanted):
        raise ExportError(f"the lazy model takes {', '.join(sorted(ours))}; the dense file {', '.join(sorted(wanted))}")
    for port in dense.inputs:
        parameter, given = ours[port.get_any_name()], port.get_element_type()
        if parameter.partial_shape.rank != port.partial_shape.rank:
            raise ExportError(f"input {port.get_any_name()}: rank {parameter.partial_shape.rank} instead of "
                              f"{port.partial_shape.rank}")  # fmt: skip
        if parameter.get_element_type() != given:
            inner = parameter.get_element_type()
            targets = parameter.output(0).get_target_inputs()
            parameter.set_element_type(given)
            parameter.revalidate_and_infer_types()
            converted = ops.convert(parameter, inner.to_string())
            for target in targets:
                target.replace_source_output(converted.output(0))
    named = ov.Model(model.get_results(), model.get_sinks(), [ours[name] for name in wanted], model.get_friendly_name())
    for port, theirs in zip(named.outputs, dense.outputs, strict=False):
        port.get_tensor().set_names({theirs.get_any_name()})
        port.get_node().set_friendly_name(theirs.get_any_name())
    return named


def write(model: ov.Model, directory: Path) -> Path:
    """Save the model's two files into `directory` and return the path of the XML."""
    path = directory / MODEL_FILE
    try:
        ov.save_model(model, path, compress_to_fp16=False)
        keep_exact(path, _CLOCK, _forecast_states(model))
    except (RuntimeError, OSError) as error:
        raise ExportError(f"OpenVINO does not save the model: {' '.join(str(error).split())[-300:]}") from error
    return path


def _forecast_states(model: ov.Model) -> set[str]:
    """Names of the variables, inputs and outputs that belong to forecasts."""
    variables = [sink.get_variable_id() for sink in model.get_sinks()]
    ports = [node.get_friendly_name() for node in (*model.get_parameters(), *model.get_results())]
    return {name for name in (*variables, *ports) if name.startswith(_FORECASTS)}


def _store_as(model: ov.Model, weights: Weights) -> None:
    """Rule 3."""
    kind = {"f16": ov.Type.f16, "bf16": ov.Type.bf16}[weights]
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[weights]
    for node in _constants(model, ov.Type.f32):
        name = node.get_friendly_name()
        if not is_weight(name, int(np.prod(node.get_output_shape(0)))):
            continue
        readers = list(node.output(0).get_target_inputs())
        narrow = narrowed(torch.from_numpy(node.get_data().copy()), dtype, name)
        stored = ov.Tensor(kind, ov.Shape(list(narrow.shape)))
        stored.data.view(np.uint16)[...] = narrow.view(torch.uint16).numpy()
        constant = ov.op.Constant(stored)
        constant.set_friendly_name(f"{name}.{weights}")
        restored = ops.convert(constant, "f32")
        restored.set_friendly_name(name)
        for reader in readers:
            reader.replace_source_output(restored.output(0))


def _store_4_bits(model: ov.Model) -> None:
    """Integers of 4 bits, one in each byte, that are converted to floats: two in each byte of the file, in bodies too.

    They are told by their values: constants lose their names when conversion moves them into the bodies that read them.
    """
    for wide, narrow, low, high in ((ov.Type.i8, ov.Type.i4, -8, 7), (ov.Type.u8, ov.Type.u4, 0, 15)):
        for node in _constants(model, wide):
            values, readers = node.get_data(), list(node.output(0).get_target_inputs())
            if values.size < _LEAST or values.min() < low or values.max() > high:
                continue
            if any(reader.get_node().get_type_name() != "Convert" for reader in readers):
                continue
            nibbles = values.astype(np.uint8).reshape(-1) & 15
            nibbles = np.concatenate([nibbles, np.zeros(len(nibbles) % 2, np.uint8)])
            stored = ov.Tensor(narrow, ov.Shape(list(node.get_output_shape(0))))
            stored.data.view(np.uint8).reshape(-1)[...] = nibbles[0::2] | (nibbles[1::2] << 4)
            constant = ov.op.Constant(stored)
            constant.set_friendly_name(node.get_friendly_name())
            for reader in readers:
                reader.replace_source_output(constant.output(0))


def _constants(model: ov.Model, kind: ov.Type) -> Iterator[Any]:
    """All constants of an element type, in bodies of `If` too."""
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == kind:
            yield node
        elif node.get_type_name() == "If":
            for body in (0, 1):
                yield from _constants(node.get_function(body), kind)


def _decomposed(program: ExportedProgram) -> fx.GraphModule:
    """The program in operations that OpenVINO has and can save."""
    table: Any = CustomDecompTable()  # type: ignore[no-untyped-call]
    for operation in ops_to_not_decompose():
        if operation in table:
            table.pop(operation)
    table[torch.ops.aten.slice_scatter.default] = slice_scatter
    table[torch.ops.aten.select_scatter.default] = select_scatter
    module: fx.GraphModule = decompose(program, table).module()
    return constants_within(attend_to_something(add_sizes(module)))


@contextmanager
def _same_logging() -> Iterator[None]:
    """The converter turns the root logger down to errors, and leaves it there where it fails: what is said then is lost."""
    root = logging.getLogger()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _name(model: ov.Model, traced: TracedModel) -> None:
    """Rule 1. Converted inputs keep the flat position in one of their names; the others are aliases of inner values."""
    by_position: dict[int, Any] = {}
    prefix = _flat_prefix(model)
    for port in model.inputs:
        for alias in port.get_names():
            if alias.startswith(prefix) and alias[len(prefix) :].isdigit():
                by_position[int(alias[len(prefix) :])] = port
    for node in model.get_ordered_ops():  # names of inner values turn up as aliases of an input once nodes are fused
        for output in node.outputs():
            output.get_tensor().set_names(set())
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
        # Where the two know the same sizes, an Assign need not copy.
        shape = ov.PartialShape([max(size, -1) for size in spec.shape])
        known = value.get_partial_shape()
        initial = _initial(spec)
        if not (shape.compatible(known) and known.rank == shape.rank):
            known = shape
        if known.is_static:  # of a model that runs one batch size: its state is never another
            initial = np.full(known.to_shape(), initial.flat[0])
        variable.data_shape = known
        variable.data_type = parameter.get_element_type()
        variable.variable_id = past
        read = ops.read_value(ops.constant(initial), past, variable.data_type, variable.data_shape)
        read.set_friendly_name(past)
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(read.output(0))
        # An Assign reads a node's only output. Where there is one, it is written into the state without a copy.
        node = value.get_node()
        sinks.append(ops.assign(node if node.get_output_size() == 1 else _identity(value), past))
        gone.append(present)
    kept_results = [r for name, r in results.items() if name not in gone]
    kept_parameters = [p for name, p in parameters.items() if name not in traced.past]
    ordered = [next(p for p in kept_parameters if p.get_friendly_name() == n) for n in traced.inputs if n in
               {p.get_friendly_name() for p in kept_parameters}]  # fmt: skip
    return ov.Model(kept_results, sinks, ordered, "lazycompress")


def _identity(value: Any) -> Any:
    return ops.reshape(value, ops.shape_of(value, "i64"), special_zero=False)


def _initial(spec: StateSpec) -> np.ndarray[Any, Any]:
    """One row of "no image yet"; the graph ignores all rows of a state whose batch or other sizes differ."""
    tensor = spec.fresh(1, torch.device("cpu"))
    if spec.dtype is torch.bfloat16:
        tensor = tensor.to(torch.float32)
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array
