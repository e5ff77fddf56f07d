"""What matmuls of exported files compute with, counted by walking the bodies of their `If` nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import openvino as ov

#: Between a weight as it is stored and the matmul that reads it.
_RESTORING = {"Convert", "Multiply", "Subtract", "Reshape", "Transpose", "FakeQuantize", "Broadcast"}
_RESTORING_ONNX = {"Cast", "Mul", "Sub", "Reshape", "Transpose", "DequantizeLinear"}


def openvino_matmuls(folder: Path) -> Counter[tuple[str, str, bool]]:
    """Of an OpenVINO file: (where: "body" or "outside", type that the weight is stored in, is the activation rounded)."""
    found: Counter[tuple[str, str, bool]] = Counter()

    def walk(model: Any, where: str) -> None:
        for node in model.get_ordered_ops():
            kind = node.get_type_name()
            if kind == "If":
                for body in (0, 1):
                    walk(node.get_function(body), "body")
            if kind == "MatMul":
                stored = _stored(node.input_value(1).get_node())
                rounded = node.input_value(0).get_node().get_type_name() == "FakeQuantize"
                found[where, stored, rounded or _rounded(node.input_value(0).get_node())] += 1

    walk(ov.Core().read_model(folder / "openvino_model.xml"), "outside")
    return found


def _stored(node: Any) -> str:
    while node.get_type_name() in _RESTORING:
        node = node.input_value(0).get_node()
    return str(node.get_element_type().get_type_name()) if node.get_type_name() == "Constant" else "activation"


def _rounded(node: Any) -> bool:
    while node.get_type_name() in ("Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def onnx_matmuls(folder: Path) -> Counter[tuple[str, str, str]]:
    """Of an ONNX file: (where, operation, type that the weight is stored in)."""
    model = onnx.load(folder / "model.onnx")
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    found: Counter[tuple[str, str, str]] = Counter()

    def walk(graph: Any, where: str, makers: dict[str, Any]) -> None:
        makers = makers | {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            for body in _bodies(node):
                walk(body, "body", makers)
            if node.op_type in ("MatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat"):
                name = node.input[1]
                while name in makers and makers[name].op_type in _RESTORING_ONNX:
                    name = makers[name].input[0]
                found[where, node.op_type, types.get(name, "activation")] += 1

    walk(model.graph, "outside", {})
    return found


def restored_in_bodies(folder: Path) -> list[str]:
    """Nodes in bodies of an ONNX file that make floating-point numbers of integers that it stores: once in each call."""
    model = onnx.load(folder / "model.onnx")
    narrow = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    stored = {tensor.name for tensor in model.graph.initializer if tensor.data_type in narrow and len(tensor.dims) > 1}
    found: list[str] = []

    def walk(graph: Any) -> None:
        for node in graph.node:
            for body in _bodies(node):
                found.extend(inner.name for inner in body.node if inner.op_type == "Cast" and inner.input[0] in stored)
                walk(body)

    walk(model.graph)
    return found


def _bodies(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def size_of(folder: Path) -> int:
    """Bytes of what a runtime loads."""
    return sum(
        path.stat().st_size for path in folder.iterdir() if path.name.startswith(("openvino_model", "model.onnx"))
    )
