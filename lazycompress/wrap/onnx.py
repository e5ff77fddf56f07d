"""Wraps an ONNX model: the denoiser becomes the body of an `If`, what it keeps from call to call inputs and outputs.

`past_*` inputs hold the state before a call, `present_*` outputs that after it, to be handed to the next call. A past that
is left out is of no image: the file holds it as a default, where it is to be run by runtimes that know defaults. Weights stay
where they are, in the outer graph and in their files: a body sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError, InputError, MissingExtraError
from .controller import Controller, State, sizes_or
from .ports import Port
from .symbols import Body, Symbol

try:
    import onnx
    from onnx import numpy_helper
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("onnx", "onnx", "wrapping an ONNX model") from _error

#: Of the names of new nodes and values.
PREFIX = "lazycompress."

#: Weights in files of their own that are smaller come into the model: sizes among them, which a body has to see.
_SMALL = 1024

#: The oldest operators that have what is written here.
OLDEST = 13

_DTYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
}


class OnnxGraph:
    """Writes ONNX nodes; a handle is a value's name.

    Attributes:
        nodes: of the graph or body that is being written.
        constants: initializers, which bodies see too.
        infos: types and sizes that are known of values, by name; those of a body are written into it.
    """

    def __init__(self, infos: Sequence[onnx.ValueInfoProto] = ()) -> None:
        self.infos = {info.name: info for info in infos}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._count = 0

    def constant(self, value: np.ndarray[Any, Any]) -> str:
        name = self._name("constant")
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, inputs: Sequence[Any], **attributes: Any) -> str:
        inputs, kind = list(inputs), "Reshape" if kind == "OfSizes" else kind
        if kind == "ReduceSum":
            inputs.append(self.constant(np.array(attributes.pop("axes"), np.int64)))
        if kind == "Cast":
            attributes["to"] = _DTYPES[attributes["to"]]
        attributes = {key: int(v) if isinstance(v, bool) else v for key, v in attributes.items()}
        name = self._name(kind)
        self.nodes.append(onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def branch(self, condition: Any, inputs: Sequence[Any], then: Body, otherwise: Body) -> list[Any]:
        outer, bodies = self.nodes, []
        for write in (then, otherwise):
            self.nodes = []
            outputs = [onnx.ValueInfoProto(name=name) for name in write(list(inputs))]
            made = [name for node in self.nodes for name in node.output if name in self.infos]
            # Without what is known of its values, runtimes do not fuse in a body what they fuse in the dense file.
            infos = [self.infos[name] for name in made]
            bodies.append(onnx.helper.make_graph(self.nodes, "body", [], outputs, value_info=infos))
        self.nodes = outer
        found = [self._name("If") for _ in bodies[0].output]
        self.nodes.append(
            onnx.helper.make_node("If", [condition], found, found[0], then_branch=bodies[0], else_branch=bodies[1])
        )
        return found

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{PREFIX}{kind}_{self._count}"


def ports(model: onnx.ModelProto) -> tuple[list[Port], list[Port]]:
    """The inputs and outputs of a model; inputs that have a default are weights, and left out.

    Raises:
        InputError: one is no tensor, or has any number of dimensions.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    found = []
    for word, infos in (("input", model.graph.input), ("output", model.graph.output)):
        row = []
        for info in infos:
            if info.name in weights:
                continue
            kind = info.type.tensor_type
            if not kind.HasField("shape"):
                raise InputError(
                    f"{word} {info.name} has no fixed number of dimensions: run onnx.shape_inference on the model first"
                )
            sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
            known = kind.elem_type in onnx.helper.get_all_tensor_dtypes()
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name if known else "other"
            row.append(Port(info.name, sizes, dtype))
        found.append(row)
    return found[0], found[1]


def wrapped(model: onnx.ModelProto, controller: Controller, defaults: bool = True) -> onnx.ModelProto:
    """A model that follows a plan, made of a dense one, which is left as it is.

    Args:
        model: the dense one.
        controller: what goes around it.
        defaults: the past may be left out.

    Raises:
        InputError: the model is of operators that are too old, or is wrapped already.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST:
        raise InputError(
            f"the model is of ONNX opset {opset}, {OLDEST} is the oldest: convert it with onnx.version_converter"
        )
    if any(name.startswith(PREFIX) for node in model.graph.node for name in node.output):
        raise InputError("the model is lazy already: wrap the dense denoiser")
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph, old = OnnxGraph(model.graph.value_info), model.graph
    renamed = {info.name: f"{PREFIX}dense.{info.name}" for info in old.output}

    def dense(own: list[Symbol]) -> list[Symbol]:
        graph.nodes += [_renamed(node, renamed) for node in old.node]
        made = {name for node in old.node for name in node.output}
        return [Symbol(graph, renamed[i.name] if i.name in made else i.name) for i in old.output]

    states = controller.shapes()
    past = [_of_any_size(Symbol(graph, f"past_{name}"), shape) for name, shape in states.items()]
    own, _ = ports(model)
    outputs, after = controller.write(
        {port.name: Symbol(graph, port.name) for port in own}, State(past[0], past[1], tuple(past[2:])), dense
    )
    handles = [value.handle for value in (*outputs, after.clock, after.latents, *after.outputs)]
    names = [info.name for info in old.output] + [f"present_{name}" for name in states]
    final = dict(zip(handles, names, strict=True))
    del found.graph.node[:], found.graph.value_info[:]
    found.graph.node.extend(_renamed(node, final) for node in graph.nodes)
    found.graph.initializer.extend(graph.constants)
    for name, shape in states.items():
        found.graph.input.append(_info(f"past_{name}", shape))
        found.graph.output.append(_info(f"present_{name}", shape))
        if defaults:
            nothing = np.zeros(sizes_or(shape, 1), np.float32)
            found.graph.initializer.append(numpy_helper.from_array(nothing, f"past_{name}"))
    return found


def _of_any_size(past: Symbol, shape: Sequence[int | None]) -> Symbol:
    """A past whose sizes no tool takes for those of its default, which ONNX Runtime's symbolic shape inference does."""
    return past.of_sizes(past.shape().abs()) if None in shape else past


def _info(name: str, shape: Sequence[int | None]) -> onnx.ValueInfoProto:
    sizes = [f"{name}_size_{k}" if size is None else size for k, size in enumerate(shape)]
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    """A copy of a node with other names of values, in its bodies too."""
    found = onnx.NodeProto()
    found.CopyFrom(node)
    _rename(found, names)
    return found


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for values in (node.input, node.output):
        for k, name in enumerate(values):
            if name in names:
                values[k] = names[name]
    for graph in _bodies(node):
        for inner in graph.node:
            _rename(inner, names)
        for info in (*graph.output, *graph.value_info):
            info.name = names.get(info.name, info.name)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def read(path: Path) -> onnx.ModelProto:
    """A model; the weights that it has in files of their own stay there, but for small ones.

    Raises:
        InputError: it cannot be read.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        for tensor in _tensors(model.graph):
            if uses_external_data(tensor) and int(_entries(tensor).get("length", _SMALL + 1)) <= _SMALL:
                load_external_data_for_tensor(tensor, str(path.parent))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
    except Exception as error:  # protobuf has an error class of its own
        raise InputError(f"{path} is no ONNX model: {' '.join(str(error).split())[-200:]}") from None
    return model


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def data_files(model: onnx.ModelProto) -> list[str]:
    """The files of weights beside a model, as the model names them.

    Raises:
        InputError: one is not beside the model.
    """
    found: dict[str, None] = {}
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            location = _entries(tensor)["location"]
            if Path(location).is_absolute() or ".." in Path(location).parts:
                raise InputError(f"the weights {tensor.name} are in {location}, which is not in the model's folder")
            found[location] = None
    return list(found)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
        for body in _bodies(node):
            yield from _tensors(body)


def write(model: onnx.ModelProto, path: Path) -> None:
    """Save a wrapped model; weights in files of their own are not touched.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        path.write_bytes(model.SerializeToString())
    except (OSError, ValueError) as error:
        raise ExportError(f"the model cannot be written: {' '.join(str(error).split())[-300:]}") from error


__all__ = ["data_files", "ports", "read", "wrapped", "write"]
