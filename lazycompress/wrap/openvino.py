"""Wraps an OpenVINO model: the denoiser becomes the body of an `If`, what it keeps from call to call a state.

The parameters and results of the model stay what they are, and so do names, order, layouts and notes. Nodes that are new have
names of their own (`PREFIX`) and compute in float32 whatever the precision hint.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError, InputError, MissingExtraError
from ..export.sessions import read
from ..graph.insert import is_timestep_name
from .controller import Controller, State, sizes_or
from .ports import Port
from .symbols import Body, Symbol

try:
    import openvino as ov
    from openvino import opset13 as ops
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("openvino", "openvino", "wrapping an OpenVINO model") from _error

#: Of the names of new nodes and variables.
PREFIX = "lazycompress."

_DTYPES = {
    "float16": ov.Type.f16,
    "bfloat16": ov.Type.bf16,
    "float32": ov.Type.f32,
    "float64": ov.Type.f64,
    "int64": ov.Type.i64,
}


def _insert(value: Any, axes: list[int]) -> Any:
    """New axes of size 1: as a Reshape, for Unsqueeze does not stay in float32."""
    old = iter(range(value.get_partial_shape().rank.get_length()))
    rank = value.get_partial_shape().rank.get_length() + len(axes)
    sizes = ops.concat([ops.shape_of(value), ops.constant(np.array([1]))], 0)
    picked = [-1 if axis in axes else next(old) for axis in range(rank)]
    picked = [rank - len(axes) if k < 0 else k for k in picked]
    return ops.reshape(value, ops.gather(sizes, ops.constant(np.array(picked)), ops.constant(np.int64(0))), False)


_NODES: dict[str, Callable[..., Any]] = {
    "Add": ops.add,
    "Mul": ops.multiply,
    "Div": ops.divide,
    "Mod": ops.mod,
    # Turned round: what is not a number counts as greater than anything with the CPU's own operators (2026.4).
    "Greater": lambda x, y: ops.less(y, x),
    "GreaterOrEqual": lambda x, y: ops.less_equal(y, x),
    "LessOrEqual": ops.less_equal,
    "Equal": ops.equal,
    "And": ops.logical_and,
    "Or": ops.logical_or,
    "Not": ops.logical_not,
    "Where": ops.select,
    "Abs": ops.abs,
    "Sqrt": ops.sqrt,
    "Floor": ops.floor,
    "Max": ops.maximum,
    "Min": ops.minimum,
    "Cast": lambda x, to: ops.convert(x, _DTYPES[to]),
    "ReduceSum": lambda x, axes, keepdims: ops.reduce_sum(x, ops.constant(np.array(axes)), keepdims),
    "ArgMax": lambda x, axis: ops.topk(x, ops.constant(np.int64(1)), axis, "max", "value", "i64").output(1),
    "Shape": ops.shape_of,
    "Reshape": lambda x, shape: ops.reshape(x, shape, special_zero=True),
    "Unsqueeze": lambda x, axes: _insert(x, axes.get_node().get_data().tolist()),
    "Reciprocal": lambda x: ops.power(x, ops.constant(np.float32(-1))),
    "Expand": ops.broadcast,
    "Gather": lambda x, positions, axis: ops.gather(x, positions, ops.constant(np.int64(axis))),
    "Range": lambda start, stop, step: ops.range(start, stop, step, "i64"),
    "Concat": lambda *parts, axis: ops.concat(list(parts), axis),
    # In this form alone a product stays in float32: with a Transpose of its own, or of three dimensions, it does not (2026.4).
    "Gemm": lambda x, y, transB: ops.matmul(x, y, False, bool(transB)),
    "Identity": lambda x: x,
    "OfSizes": lambda x, _: x,
}


class OpenVINOGraph:
    """Writes OpenVINO nodes; a handle is an `ov.Output`."""

    def __init__(self) -> None:
        self._count = 0

    def constant(self, value: np.ndarray[Any, Any]) -> Any:
        return ops.constant(value).output(0)

    def node(self, kind: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        made = _NODES[kind](*inputs, **attributes)
        if kind in ("Identity", "OfSizes"):
            return made
        output = made.output(0) if isinstance(made, ov.Node) else made
        self._count += 1
        output.get_node().set_friendly_name(f"{PREFIX}{kind}_{self._count}")
        return output

    def branch(self, condition: Any, inputs: Sequence[Any], then: Body, otherwise: Body) -> list[Any]:
        bodies = []
        for write in (then, otherwise):
            own = [ops.parameter(value.get_partial_shape(), value.get_element_type()) for value in inputs]
            for parameter in own:
                self._count += 1
                parameter.set_friendly_name(f"{PREFIX}Parameter_{self._count}")
            results = [ops.result(value) for value in write([parameter.output(0) for parameter in own])]
            used = [p if p.output(0).get_target_inputs() else None for p in own]
            bodies.append((ov.Model(results, [p for p in used if p is not None], "body"), used, results))
        (then_model, then_used, then_results), (else_model, else_used, else_results) = bodies
        made = ops.if_op(condition)  # an output: a node would be taken, and left out in silence
        self._count += 1
        made.set_friendly_name(f"{PREFIX}If_{self._count}")
        made.set_then_body(then_model)
        made.set_else_body(else_model)
        for value, in_then, in_else in zip(inputs, then_used, else_used, strict=True):
            if in_then is not None or in_else is not None:
                made.set_input(value, in_then, in_else)
        for in_then, in_else in zip(then_results, else_results, strict=True):
            made.set_output(in_then, in_else)
        return list(made.outputs())


def ports(model: ov.Model) -> tuple[list[Port], list[Port]]:
    """The inputs and outputs of a model.

    Raises:
        InputError: an input has no name, or one of them any number of dimensions.
    """
    found: tuple[list[Port], list[Port]] = ([], [])
    for word, outputs, into in (("input", model.inputs, found[0]), ("output", model.outputs, found[1])):
        for k, port in enumerate(outputs):
            name, shape = _name(port), port.get_partial_shape()
            if name is None and word == "input":
                raise InputError(f"input {k} of the model has no name: give it one with set_names")
            name = name or f"output_{k}"  # a conversion from torch names no outputs
            if shape.rank.is_dynamic:
                raise InputError(f"{word} {name} has no fixed number of dimensions: reshape the model first")
            sizes = tuple(size.get_length() if size.is_static else None for size in shape)
            kind = port.get_element_type()
            into.append(Port(name, sizes, _numpy_name(kind)))
    return found


def _name(port: Any) -> str | None:
    """The name of an input or output that says most: a conversion leaves numbers beside the one that the input had."""
    own = port.get_node().get_friendly_name()
    names = sorted(port.get_names(), key=lambda name: (name != own, not is_timestep_name(name), name))
    return names[0] if names else None


def _numpy_name(kind: ov.Type) -> str:
    """An element type by numpy's name, or by OpenVINO's where numpy has none."""
    known = next((name for name, own in _DTYPES.items() if own == kind), None)
    try:
        return known or np.dtype(kind.to_dtype()).name
    except (RuntimeError, TypeError):
        return str(kind.to_string())


def wrapped(model: ov.Model, controller: Controller) -> ov.Model:
    """A model that follows a plan, made of a dense one, which is left as it is.

    Raises:
        InputError: the model has a state of its own, or is wrapped already.
    """
    if model.get_sinks():
        raise InputError("the model keeps a state of its own (it may be lazy already): wrap a dense denoiser")
    model = model.clone()
    graph = OpenVINOGraph()
    parameters, results = model.get_parameters(), model.get_results()
    names = [result.input_value(0).get_tensor().get_names() for result in results]
    own_ports, _ = ports(model)
    inputs = {port.name: Symbol(graph, p.output(0)) for port, p in zip(own_ports, parameters, strict=True)}
    readers = [list(p.output(0).get_target_inputs()) for p in parameters]
    given = [result.input_value(0) for result in results]

    def dense(own: list[Symbol]) -> list[Symbol]:
        for inner, targets in zip(own, readers, strict=True):
            for target in targets:
                target.replace_source_output(inner.handle)
        return [Symbol(graph, result.input_value(0)) for result in results]

    before = [_read(graph, name, shape) for name, shape in controller.shapes().items()]
    state = State(before[0], before[1], tuple(before[2:]))
    for value in given:
        value.get_tensor().set_names(set())
    outputs, after = controller.write(inputs, state, dense)
    for result, output, tensor_names in zip(results, outputs, names, strict=True):
        typed = output.handle
        result.input(0).replace_source_output(typed)
        typed.get_tensor().set_names(tensor_names)
    sinks = []
    rows = _rows(after.clock)
    for (name, shape), value in zip(
        controller.shapes().items(), (after.clock, after.latents, *after.outputs), strict=True
    ):
        # An Assign reads a node's only output. Where the state may have any size, so must what is assigned, after a reshape too.
        own = value.first(rows, 0) if None in shape else value.reshape(value.shape())
        sinks.append(ops.assign(own.handle.get_node(), f"{PREFIX}{name}"))
    found = ov.Model(results, sinks, parameters, model.get_friendly_name())
    for key, value in model.get_rt_info().items():
        found.set_rt_info(value, key)
    found.validate_nodes_and_infer_types()
    return found


def _read(graph: OpenVINOGraph, name: str, shape: list[int | None]) -> Symbol:
    zeros = ops.broadcast(ops.constant(np.float32(0)), ops.constant(np.array(sizes_or(shape, 1))))
    read = ops.read_value(zeros, f"{PREFIX}{name}", ov.Type.f32, ov.PartialShape(sizes_or(shape, -1)))
    read.set_friendly_name(f"{PREFIX}{name}")
    return Symbol(graph, read.output(0))


def _rows(clock: Symbol) -> Symbol:
    """How many rows a clock has, int64 [1]: counted, and so not known before the model runs."""
    column = clock.take(0, axis=2).take(0, axis=1)
    equal = column.equals(column)
    return (equal | ~equal).float().sum(0, keep=True).cast("int64")


def write(model: ov.Model, path: Path) -> None:
    """Save a wrapped model as `path` (.xml) and its weights beside it.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        ov.save_model(model, path, compress_to_fp16=False)
        _keep_exact(path)
    except (RuntimeError, OSError) as error:
        raise ExportError(f"OpenVINO does not save the model: {' '.join(str(error).split())[-300:]}") from error


def _keep_exact(path: Path) -> None:
    """Mark what is new as exempt from lower precisions: the attribute `precise` cannot be set from Python.

    With bfloat16 a timestep stops counting: 199 reads as 200.
    """
    tree = ET.parse(path)
    for layer in tree.iter("layer"):
        if layer.get("name", "").startswith(PREFIX) and layer.get("type") not in ("Const", "ShapeOf", "Result", "If"):
            info = layer.find("rt_info")
            if info is None:
                info = ET.Element("rt_info")
                layer.insert(0 if layer.find("data") is None else 1, info)
            ET.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, encoding="utf-8", xml_declaration=True)


__all__ = ["ports", "read", "wrapped", "write"]
