"""Weights that an ONNX file stores in few bits are restored once, when it is loaded, for all bodies that read them.

As converted, each body restores its weights in each call, in float16, for which ONNX Runtime has no arithmetic on CPUs: 28 of
the 111 ms that a DiT-B/2 with 8-bit branches took. Here what is made of stored integers alone moves to the main graph, once
for all bodies, and is computed in float32; ONNX Runtime folds that into constants when it loads the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

#: Between a weight as it is stored and the matmul that reads it.
_RESTORING = frozenset({"Cast", "Sub", "Mul", "Reshape", "Transpose"})

_INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4})


@dataclass
class _Restored:
    """What the main graph restores: by operation and operands, and by the value of a body that it stands for."""

    graph: ir.Graph
    nodes: list[ir.Node] = field(default_factory=list)
    known: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)
    instead: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def operand(self, value: ir.Value) -> ir.Value:
        """A constant or a restored value, for a node of the main graph; float16 becomes float32."""
        if value in self.instead:
            return self.instead[value]
        assert value.const_value is not None
        name = str(value.name)
        if name not in self.graph.initializers:
            self.graph.initializers.add(
                ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
            )
        stored = self.graph.initializers[name]
        return self.cast(stored, value.shape) if stored.dtype == ir.DataType.FLOAT16 else stored

    def cast(self, value: ir.Value, shape: ir.Shape | None, to: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return self.add("Cast", [value], [ir.AttrInt64("to", to)], shape, to)

    def add(
        self, op_type: str, inputs: list[ir.Value], attributes: list[ir.Attr], shape: ir.Shape | None, kind: ir.DataType
    ) -> ir.Value:
        key = (op_type, tuple(id(value) for value in inputs), tuple(str(attribute) for attribute in attributes))
        if key not in self.known:
            node = ir.Node("", op_type, inputs, attributes, num_outputs=1, name=f"restored_{len(self.nodes)}")
            result = node.outputs[0]
            result.name, result.shape, result.type = f"restored.{len(self.nodes)}", shape, ir.TensorType(kind)
            self.nodes.append(node)
            self.known[key] = result
        return self.known[key]


def restore_once(model: ir.Model) -> int:
    """Move restoration out of the bodies of a model's `If` nodes, in place; returns how many nodes restore weights then."""
    restored = _Restored(model.graph)
    _walk(model.graph, restored)
    if restored.nodes:
        model.graph.insert_before(model.graph[0], restored.nodes)
    return len(restored.nodes)


def _walk(graph: ir.Graph, restored: _Restored) -> None:
    for node in list(graph):
        for body in _bodies(node):
            _walk(body, restored)
        if node.op_type not in _RESTORING or not _is_restored(node, restored):
            continue
        result, inputs = node.outputs[0], [restored.operand(value) for value in node.inputs if value is not None]
        if node.op_type == "Cast":
            new = inputs[0] if inputs[0].dtype == ir.DataType.FLOAT else restored.cast(inputs[0], result.shape)
        else:
            attributes = list(node.attributes.values())
            new = restored.add(node.op_type, inputs, attributes, result.shape, ir.DataType.FLOAT)
        restored.instead[result] = new
    for node in reversed(list(graph)):
        if node.outputs and all(value in restored.instead for value in node.outputs):
            (result,) = node.outputs
            if result.uses() or result.is_graph_output():
                new = restored.instead[result]
                if result.dtype is not None and result.dtype != ir.DataType.FLOAT:
                    new = restored.cast(new, result.shape, result.dtype)
                result.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _is_restored(node: ir.Node, restored: _Restored) -> bool:
    """Whether all operands are constants or restored, and one of them is made of stored integers."""
    values = [value for value in node.inputs if value is not None]
    if not all(value in restored.instead or value.const_value is not None for value in values):
        return False
    first = values[0]
    return any(value in restored.instead for value in values) or (
        node.op_type == "Cast" and first.dtype in _INTEGERS and first.const_value is not None
    )


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
