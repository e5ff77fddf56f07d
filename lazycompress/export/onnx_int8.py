"""Stage 6 for quantized models: 8-bit arithmetic in an ONNX file, inside the bodies of its `If` nodes too.

ONNX Runtime fuses quantize-dequantize pairs in the main graph only: a file that holds them inside of `If` runs in floating
point, with rounding on top. Its own dynamic quantization passes by what a body reads from outside, and would choose other
scales than those that were calibrated. So the pairs are replaced when the file is written, with the calibrated scales:

    MatMul(Dequantize(Quantize(x)), Transpose(Cast(W) * s - z))  [+ b]   ->   MatMulIntegerToFloat(Quantize(x), W, ..., [b])

1. Matmuls of a quantized value and a quantized weight, in the bodies, with or without a bias, become one integer matmul each.
   What only moves values between the two (transpose, reshape) moves integers then.
2. Weights are stored the way it reads them, [inputs, outputs], once for all bodies that share one.
3. Activations are stored without a sign: of two signed operands ONNX Runtime has no fast product on x86.
4. All else stays as it is: products of two activations (attention), what the recipe left out, convolutions. A quantized
   matmul of another form would be computed in floating point: that is told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

_log = logging.getLogger(__name__)

_DOMAIN = "com.microsoft"
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"}


@dataclass
class _Stored:
    """What has been stored: by the float weight's parts, names of the integer matmul's operands."""

    graph: ir.Graph
    known: dict[tuple[str, ...], tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict)

    def add(self, name: str, values: np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(values), name=name)
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.initializers.add(value)
        return value


@dataclass(frozen=True)
class _Weight:
    """A quantized weight [outputs, inputs]: integers, scale and zero point per output."""

    key: tuple[str, ...]
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def to_integers(model: ir.Model) -> int:
    """Replace quantized matmuls in the bodies of a model's `If` nodes by integer ones, in place; returns how many."""
    stored = _Stored(model.graph)
    changed = 0
    for node in model.graph:
        for body in _bodies(node):
            changed += _in_body(body, stored)
    if changed:
        model.opset_imports[_DOMAIN] = 1
    used = {value.name for graph in [model.graph, *_all_bodies(model.graph)] for node in graph for value in node.inputs
            if value is not None}  # fmt: skip
    used |= {value.name for value in model.graph.outputs}
    for name in [name for name in model.graph.initializers if name not in used]:
        del model.graph.initializers[name]
    return changed


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def _all_bodies(graph: ir.Graph) -> Iterator[ir.Graph]:
    for node in graph:
        for body in _bodies(node):
            yield body
            yield from _all_bodies(body)


def _in_body(graph: ir.Graph, stored: _Stored) -> int:
    changed = 0
    for node in list(graph):
        for body in _bodies(node):
            changed += _in_body(body, stored)
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        if _replace(graph, node, stored):
            changed += 1
        elif _dequantize_of(node.inputs[0])[1] is not None and _is_weight(node.inputs[1]):
            _log.warning(
                "lazycompress: ONNX Runtime computes %s in floating point: not a form that is known", node.name
            )
    for node in reversed(list(graph)):  # what only the float matmuls read
        if all(not out.uses() and not out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    return changed


def _replace(graph: ir.Graph, node: ir.Node, stored: _Stored) -> bool:
    """Rule 1."""
    weight, (moves, dequantize) = node.inputs[1], _dequantize_of(node.inputs[0])
    if weight is None or dequantize is None:
        return False
    quantized, scale, zero = dequantize.inputs[:3]
    if quantized is None or scale is None or quantized.producer() is None:
        return False
    found = _weight_of(weight, transposed=node.op_type == "Gemm" and bool(_int(node, "transB", 0)))
    if found is None or (node.op_type == "Gemm" and (_int(node, "transA", 0) or _float(node, "alpha") != 1.0)):
        return False
    if found.key not in stored.known:
        name = found.key[0]
        # Rule 2.
        stored.known[found.key] = (
            stored.add(f"{name}.by_inputs", found.codes.T),
            stored.add(f"{name}.scale", found.scale.astype(np.float32)),
            stored.add(f"{name}.zero", found.zero.astype(found.codes.dtype)),
        )
    codes, weight_scale, weight_zero = stored.known[found.key]
    last, bias = node, node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is None and (added := _bias_after(node)) is not None:
        last, bias = added
    quantized, zero = _unsigned(graph, node, quantized, zero, stored)
    for move in moves:
        moved = ir.Node("", move.op_type, [quantized, *move.inputs[1:]], list(move.attributes.values()), num_outputs=1,
                        name=f"{node.name}_{move.name}_in8bits")  # fmt: skip
        moved.outputs[0].name = f"{move.outputs[0].name}.{node.name}.in8bits"
        moved.outputs[0].shape, moved.outputs[0].type = move.outputs[0].shape, ir.TensorType(_type_of(zero, quantized))
        graph.insert_before(node, moved)
        quantized = moved.outputs[0]
    operands = [quantized, codes, scale, weight_scale, zero, weight_zero if found.zero.any() else None, bias]
    integer = ir.Node(_DOMAIN, "MatMulIntegerToFloat", operands, num_outputs=1, name=f"{node.name}_in8bits")
    result, old = integer.outputs[0], last.outputs[0]
    result.shape, result.type = old.shape, old.type
    graph.insert_before(last, integer)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    old.name, result.name = f"{old.name}_before", old.name
    return True


def _unsigned(
    graph: ir.Graph, node: ir.Node, quantized: ir.Value, zero: ir.Value | None, stored: _Stored
) -> tuple[ir.Value, ir.Value | None]:
    """Rule 3: the same numbers from 0 to 255, and their zero point."""
    codes, quantize = _constant(zero), quantized.producer()
    if codes is None or codes.dtype != np.int8 or quantize is None or quantize.op_type != "QuantizeLinear":
        return quantized, zero
    name = f"{zero.name if zero is not None else ''}.unsigned"
    shifted = stored.graph.initializers.get(name) or stored.add(name, (codes.astype(np.int16) + 128).astype(np.uint8))
    again = ir.Node(
        "",
        "QuantizeLinear",
        [*quantize.inputs[:2], shifted],
        num_outputs=1,
        name=f"{node.name}_{quantize.name}_unsigned",
    )
    again.outputs[0].name = f"{quantized.name}.{node.name}.unsigned"
    again.outputs[0].shape, again.outputs[0].type = quantized.shape, ir.TensorType(ir.DataType.UINT8)
    graph.insert_before(node, again)
    return again.outputs[0], shifted


def _dequantize_of(value: ir.Value | None) -> tuple[list[ir.Node], ir.Node | None]:
    """What only moves values on the way from a dequantization to `value`, in order, and the dequantization."""
    moves: list[ir.Node] = []
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        moves.insert(0, node)
        node = node.inputs[0].producer()
    return moves, node if node is not None and node.op_type == "DequantizeLinear" else None


def _type_of(zero: ir.Value | None, quantized: ir.Value) -> ir.DataType:
    found = (zero.dtype if zero is not None else None) or quantized.dtype
    assert found is not None
    return found


def _bias_after(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The addition of a constant vector that alone reads a matmul, and that vector."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or uses[0].node.op_type != "Add":
        return None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    if other is None or other.const_value is None or len(other.const_value.shape) != 1 or add.graph is not node.graph:
        return None
    return add, other


def _weight_of(value: ir.Value, transposed: bool) -> _Weight | None:
    """What `value`, the second operand of a matmul, was made of, if it is a quantized weight."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose":
        if list(_ints(node, "perm")) != [1, 0]:
            return None
        transposed, node = not transposed, node.inputs[0].producer() if node.inputs[0] is not None else None
    zeros: np.ndarray | None = None
    if node is not None and node.op_type == "Sub":
        zeros = _constant(node.inputs[1])
        if zeros is None or node.inputs[0] is None:
            return None
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Mul" or node.inputs[0] is None or not transposed:
        return None
    cast, scale = node.inputs[0].producer(), _constant(node.inputs[1])
    if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None or scale is None:
        return None
    codes = _constant(cast.inputs[0])
    if codes is None or codes.ndim != 2 or codes.dtype not in (np.dtype(np.int8), np.dtype(np.uint8)):
        return None
    scale = np.broadcast_to(scale, (codes.shape[0], 1)).reshape(-1) if scale.size in (1, codes.shape[0]) else None
    if scale is None:
        return None
    zero = (
        np.zeros(codes.shape[0])
        if zeros is None
        else np.rint(np.broadcast_to(zeros, (codes.shape[0], 1))[:, 0] / scale)
    )
    return _Weight((str(cast.inputs[0].name), str(node.inputs[1].name if node.inputs[1] else "")), codes, scale, zero)


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is made of a constant."""
    while value is not None and value.const_value is None:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.inputs else None
    return value is not None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _float(node: ir.Node, name: str) -> float:
    return node.attributes[name].as_float() if name in node.attributes else 1.0


def _ints(node: ir.Node, name: str) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else []
