"""What an ATen node is, as far as the passes care: heavy, cheap, see-through; and what it costs.

Nothing here knows a model. The sets name ATen operators, which are the same for every architecture.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

#: Joins of a residual stream: `x + f(x)` and its weighted forms.
JOINS = frozenset({"aten::add", "aten::add_", "aten::addcmul", "aten::lerp", "aten::sub", "aten::sub_"})

#: Operators that hold the multiply-accumulates of a transformer.
HEAVY = frozenset(
    f"aten::{name}"
    for name in [
        "linear",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "matmul",
        "einsum",
        "scaled_dot_product_attention",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "_grouped_mm",
    ]
)

#: Values go through these unchanged, up to their dtype or a scale that does not depend on the stream.
SEE_THROUGH = frozenset(
    f"aten::{name}"
    for name in [
        "to",
        "_to_copy",
        "type_as",
        "dropout",
        "native_dropout",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "detach_",
    ]
)

#: Parts of a value.
SPLITS = frozenset(f"aten::{name}" for name in ["slice", "narrow", "split", "split_with_sizes", "chunk"])

#: Parts of a value, and putting them together again.
SPLICES = SPLITS | {"aten::cat", "getitem"}

#: Norms, modulation, gates, rescaling: the cheap ends of a branch, which stay outside of it.
CHEAP = SEE_THROUGH | frozenset(
    f"aten::{name}"
    for name in [
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "pow",
        "square",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "abs",
        "mean",
        "sum",
        "var",
        "std",
        "var_mean",
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "group_norm",
        "native_group_norm",
        "addcmul",
        "clamp",
        "clamp_min",
        "clamp_max",
        "maximum",
        "minimum",
        "tanh",
        "linalg_vector_norm",
        "norm",
        "nan_to_num",
        "where",
        "expand",
        "expand_as",
        "unsqueeze",
        "float",
        "half",
        "bfloat16",
        "add_",
        "mul_",
        "div_",
        "sub_",
    ]
)

NONLINEAR = frozenset(
    f"aten::{name}"
    for name in ["gelu", "silu", "relu", "elu", "leaky_relu", "mish", "hardswish", "softplus", "relu_", "silu_"]
)


#: How the names of constants end that hold 4-bit integers, one in each byte.
FOUR_BITS = "_in4bits"


def op_name(node: fx.Node) -> str:
    """`aten::add` for a call of any overload of it; `getitem` for `operator.getitem`; else an empty string."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    return "getitem" if target is operator.getitem else ""


def remove_dead(graph: fx.Graph) -> None:
    """Remove every node without users but placeholders and the output; `torch.fx` keeps random ones (dropout in eval)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def shape_of(node: fx.Node) -> list[int] | None:
    """The sizes seen at capture (dynamic sizes by their hints), or None if the node is not a tensor."""
    value = node.meta.get("val")
    return [size_hint(size) for size in value.shape] if isinstance(value, torch.Tensor) else None


def size_hint(size: int | torch.SymInt) -> int:
    """The size seen at capture for a dynamic dimension."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1


def is_dynamic(size: int | torch.SymInt) -> bool:
    """Whether a size can differ from call to call; `torch.export` also has symbolic sizes that cannot."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def is_data_size(node: fx.Node) -> bool:
    """Whether the value is a number that depends on data (how many tokens an expert gets), not only on sizes."""
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat) and bool(free_unbacked_symbols(value))


def has_data_size(node: fx.Node) -> bool:
    """Whether the value is tokens (rank 3 or more) whose number depends on data: no cache has such a size."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and bool(free_unbacked_symbols(value))


def is_opaque(node: fx.Node) -> bool:
    """Whether the node calls a module that could not be traced, see `opaque`."""
    return node.op == "call_module" and "opaque" in node.meta


def is_heavy(node: fx.Node) -> bool:
    return is_opaque(node) or (node.op == "call_function" and op_name(node) in HEAVY)


def rank_of(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1


def macs_of(node: fx.Node) -> int:
    """Multiply-accumulates of one heavy node at the sizes seen at capture, 0 for any other node."""
    if not is_heavy(node):
        return 0
    if is_opaque(node):
        return int(node.meta["macs"])
    name, out = op_name(node), shape_of(node)
    args = list(node.args)

    def arg(index: int) -> list[int]:
        node_arg: Any = args[index]
        return shape_of(node_arg) or [1]

    if out is None:
        return 0
    if name == "aten::linear":
        return math.prod(out) * arg(1)[-1]
    if name in ("aten::mm", "aten::bmm", "aten::matmul"):
        return math.prod(out) * arg(0)[-1]
    if name in ("aten::addmm", "aten::baddbmm"):
        return math.prod(out) * arg(1)[-1]
    if name == "aten::scaled_dot_product_attention":
        query, key, value = arg(0), arg(1), arg(2)
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if name == "aten::einsum":
        equation, operands = args[0], args[1]
        assert isinstance(equation, str)
        assert isinstance(operands, (list, tuple))
        inputs = equation.replace(" ", "").split("->")[0].split(",")
        sizes: dict[str, int] = {}
        for letters, operand in zip(inputs, operands, strict=False):
            assert isinstance(operand, fx.Node)
            if "." not in letters:
                sizes |= dict(zip(letters, shape_of(operand) or [], strict=False))
        return math.prod(sizes.values()) if len(inputs) > 1 else 0
    if "conv" in name:
        weight = arg(1)
        per_output = math.prod(weight[1:])
        if "transpose" in name:
            return math.prod(arg(0)) * per_output
        return math.prod(out) * per_output
    return math.prod(out)


def product_axes(node: fx.Node) -> tuple[int, int, int]:
    """Sizes of a product of two values: common axes (batch, heads), the left's own rows, the right's own columns.

    For einsum with more than two operands, or with an ellipsis, everything counts as rows and columns.
    """
    args: tuple[Any, ...] = node.args
    if op_name(node) == "aten::einsum":
        equation = args[0].replace(" ", "")
        shapes = [shape_of(operand) or [] for operand in args[1]]
        if "->" not in equation or "." in equation or len(shapes) != 2:
            return 1, 2, 2
        inputs, output = equation.split("->")
        left, right = inputs.split(",")
        sizes = dict(zip(left + right, shapes[0] + shapes[1], strict=True))
        common = [sizes[c] for c in output if c in left and c in right]
        return (
            math.prod(common),
            math.prod(sizes[c] for c in output if c in left and c not in right),
            math.prod(sizes[c] for c in output if c in right and c not in left),
        )
    first, second = args[-2:] if op_name(node) != "aten::baddbmm" else args[1:3]
    rows, columns = shape_of(first) or [1], shape_of(second) or [1]
    out = shape_of(node) or [1]
    return math.prod(out[:-2]), rows[-2] if len(rows) > 1 else 1, columns[-1] if len(columns) > 1 else 1
