"""Complex numbers of a traced program as pairs of real ones: no format has them.

A complex tensor of some sizes becomes a real one with one more size, 2, at its end, as `torch.view_as_real` gives it: weights,
values of the program, and operands of its bodies. A program that is called with complex numbers, gives them, or computes what has
no rule here, is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ..errors import ExportError
from .decompose import as_graph

_aten = torch.ops.aten

_COND = torch.ops.higher_order.cond
_CHECK = _aten._assert_tensor_metadata.default


@dataclass(frozen=True)
class _Pair:
    """A complex value, as real numbers."""

    parts: Tensor

    @property
    def rank(self) -> int:
        return self.parts.dim() - 1

    def unbind(self) -> tuple[Tensor, Tensor]:
        return self.parts.select(self.rank, 0), self.parts.select(self.rank, 1)


def _pair(real: Tensor, imaginary: Tensor) -> _Pair:
    return _Pair(torch.stack([real, imaginary], -1))


def _multiplied(one: Any, other: Any) -> _Pair:
    if not isinstance(one, _Pair):
        one, other = other, one
    if isinstance(other, Tensor):
        return _Pair(one.parts * other.unsqueeze(-1))
    if isinstance(other, (int, float)):
        return _Pair(one.parts * other)
    (a, b), (c, d) = one.unbind(), other.unbind()
    return _pair(a * c - b * d, a * d + b * c)


def _summed(sign: int) -> Callable[[_Pair, _Pair], _Pair]:
    return lambda one, other: _Pair(one.parts + sign * other.parts)


def _converted(value: Any, *given: Any, **options: Any) -> Any:
    kind = next((x for x in (*given, *options.values()) if isinstance(x, torch.dtype)), None)
    if not isinstance(value, _Pair):
        real = value.to(kind.to_real()) if kind else value
        return _pair(real, torch.zeros_like(real))
    if kind is None:
        return value
    return _Pair(value.parts.to(kind.to_real())) if kind.is_complex else value.unbind()[0].to(kind)


def _gathered(value: _Pair, dim: int, index: Tensor, **_: Any) -> _Pair:
    return _Pair(value.parts.gather(dim % value.rank, index.unsqueeze(-1).expand(*index.shape, 2)))


def _zeros(size: list[Any], **options: Any) -> _Pair:
    return _Pair(torch.zeros([*size, 2], dtype=options["dtype"].to_real(), device=options.get("device")))


def _conjugate(value: _Pair) -> _Pair:
    real, imaginary = value.unbind()
    return _pair(real, -imaginary)


_RULES: dict[Any, Callable[..., Any]] = {
    # A name of its own: the same value is a pair for some, and real for others.
    _aten.view_as_complex.default: lambda value: _Pair(_aten.alias(value)),
    _aten.view_as_real.default: lambda value: _aten.alias(value.parts),
    _aten.real.default: lambda value: value.unbind()[0],
    _aten.imag.default: lambda value: value.unbind()[1],
    _aten.complex.default: _pair,
    _aten.polar.default: lambda length, angle: _pair(length * angle.cos(), length * angle.sin()),
    _aten.mul.Tensor: _multiplied,
    _aten.mul.Scalar: _multiplied,
    _aten.add.Tensor: _summed(1),
    _aten.sub.Tensor: _summed(-1),
    _aten.conj.default: _conjugate,
    _aten._conj.default: _conjugate,
    _aten._to_copy.default: _converted,
    _aten.to.dtype: _converted,
    _aten.to.device: _converted,
    _aten.to.dtype_layout: _converted,
    _aten.gather.default: _gathered,
    _aten.zeros.default: _zeros,
}

#: They move values, and do the same with pairs once their dimensions and sizes are those of pairs.
_MOVES = {
    _aten.alias.default, _aten.cat.default, _aten.chunk.default, _aten.clone.default, _aten.contiguous.default,
    _aten.detach.default, _aten.expand.default, _aten.flatten.using_ints, _aten.index.Tensor,
    _aten.index_select.default, _aten.narrow.default, _aten.pad_sequence.default, _aten.permute.default, _aten.repeat.default,
    _aten.reshape.default, _aten.select.int, _aten.select_scatter.default, _aten.slice.Tensor, _aten.slice_scatter.default,
    _aten.split.Tensor, _aten.split_with_sizes.default, _aten.squeeze.dim, _aten.stack.default, _aten.transpose.int,
    _aten.unbind.int, _aten.unflatten.int, _aten.unsqueeze.default, _aten.view.default, _aten.lift_fresh_copy.default,
}  # fmt: skip

_DIMS = {"dim", "dim0", "dim1", "start_dim", "end_dim"}

#: What is said of the last dimension where all are named.
_SIZES = {_aten.view.default: 2, _aten.reshape.default: 2, _aten.expand.default: 2, _aten.repeat.default: 1}

_INSERTS = {_aten.unsqueeze.default, _aten.stack.default}


def _moved(operation: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """What an operation of `_MOVES` gives for pairs."""
    arguments = operation._schema.arguments
    given: dict[str, Any] = {
        argument.name: argument.default_value for argument in arguments if argument.has_default_value()
    }
    given |= dict(zip([argument.name for argument in arguments], args, strict=False)) | kwargs
    rank = next(leaf.rank for leaf in pytree.tree_leaves(given) if isinstance(leaf, _Pair))
    for name in _DIMS & set(given):
        given[name] %= rank + (operation in _INSERTS)
    for name in {"size", "shape", "repeats"} & set(given):
        given[name] = [*given[name], _SIZES[operation]]
    if "dims" in given:
        given["dims"] = [*(dim % rank for dim in given["dims"]), rank]
    real = pytree.tree_map(lambda leaf: leaf.parts if isinstance(leaf, _Pair) else leaf, given)
    return pytree.tree_map(lambda leaf: _Pair(leaf) if isinstance(leaf, Tensor) else leaf, operation(**real))


def to_real_pairs(program: ExportedProgram) -> ExportedProgram:
    """Rewrite a program, in place, that computes with complex numbers within.

    Raises:
        ExportError: an operation that has a rule is called in a way that the rule does not know.
    """
    graphs = [part for part in program.graph_module.modules() if isinstance(part, fx.GraphModule)]
    touched = [node for part in graphs for node in part.graph.nodes if _touches(node)]
    if not touched or not all(map(_has_a_rule, touched)) or not _within(program):
        return program
    stored = {**program.state_dict, **program.constants}
    for spec in program.graph_signature.input_specs:
        value = stored.get(str(spec.target))
        if isinstance(value, Tensor) and value.is_complex():
            place = program.state_dict if spec.target in program.state_dict else program.constants
            place[str(spec.target)] = torch.view_as_real(value.resolve_conj()).contiguous()
    _rewrite(program.graph_module)
    return program


def _is_complex(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(value))


def _touches(node: fx.Node) -> bool:
    """Whether a node reads or gives complex numbers."""
    return node.op == "call_function" and any(_is_complex(n.meta.get("val")) for n in (node, *node.all_input_nodes))


def _has_a_rule(node: fx.Node) -> bool:
    return node.target in _RULES or node.target in _MOVES or node.target in (_COND, operator.getitem, _CHECK)


def _within(program: ExportedProgram) -> bool:
    """Whether the program is called with real numbers alone, and gives them."""
    kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    inputs = program.graph.find_nodes(op="placeholder")
    called = [node for node in inputs if kinds.get(node.name) is InputKind.USER_INPUT]
    values = [node.meta.get("val") for node in (*called, *program.graph.output_node().all_input_nodes)]
    return not any(map(_is_complex, values))


def _rewrite(module: fx.GraphModule) -> None:
    """Every complex value of a graph, and of its bodies, as a pair; bodies are told by the values of their inputs."""
    graph = module.graph
    pairs: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node._erased:
            continue
        arguments: Any = node.args
        was_complex = _is_complex(node.meta.get("val"))
        if node.op == "placeholder" and was_complex:
            _become_real(node)
            pairs.add(node)
        elif node.op == "get_attr" and was_complex:
            setattr(module, str(node.target), torch.view_as_real(getattr(module, str(node.target))))
            _become_real(node)
            pairs.add(node)
        elif node.target is _CHECK and pairs.intersection(node.all_input_nodes):
            graph.erase_node(node)
        elif node.target is _COND:
            bodies = [getattr(module, body.target) for body in arguments[1:3]]
            for body in bodies:
                _rewrite(body)
            node.meta["val"] = tuple(_value(leaf) for leaf in _results(bodies[0]))
            pairs |= {node} if was_complex else set()
        elif node.target is operator.getitem and node.args[0] in pairs:
            node.meta["val"] = arguments[0].meta["val"][arguments[1]]
            pairs |= {node} if was_complex else set()
        elif node.op == "call_function" and (was_complex or pairs.intersection(node.all_input_nodes)):
            results = _replaced(module, node, pairs)
            pairs |= set(results) if was_complex else set()
    graph.lint()
    module.recompile()


def _results(module: fx.GraphModule) -> Any:
    return module.graph.output_node().args[0]


def _value(leaf: Any) -> Any:
    return leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf


def _become_real(node: fx.Node) -> None:
    """What is known of a complex value, of its pair."""
    value = node.meta["val"]
    with ExitStack() as stack:
        if isinstance(value, FakeTensor):
            stack.enter_context(value.fake_mode)
        node.meta["val"] = torch.empty([*value.shape, 2], dtype=value.dtype.to_real(), device=value.device)
    node.meta.pop("tensor_meta", None)


def _replaced(module: fx.GraphModule, node: fx.Node, pairs: set[fx.Node]) -> Iterable[fx.Node]:
    """Put the operations on pairs in the place of a node; gives what stands for its results."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    operands = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    operation: Any = node.target
    rule = _RULES.get(operation)

    def run(*values: Any) -> Any:
        given = iter(
            [_Pair(value) if operand in pairs else value for value, operand in zip(values, operands, strict=True)]
        )
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, fx.Node) else x for x in leaves], spec)
        found = rule(*args, **kwargs) if rule is not None else _moved(operation, *args, **kwargs)
        return pytree.tree_map(lambda leaf: leaf.parts if isinstance(leaf, _Pair) else leaf, found)

    try:
        traced = as_graph(run, [operand.meta["val"] for operand in operands], node)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ExportError(f"complex numbers at {node.target} cannot be told as pairs of real ones: {said}") from error
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    with module.graph.inserting_before(node):
        for number, inner in enumerate(n for n in traced.graph.nodes if n.op == "call_function"):
            copies[inner] = module.graph.node_copy(inner, copies.__getitem__)
            copies[inner].name = f"{node.name}__pair_{number}"
    results = _results(traced)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(copies[results])
        module.graph.erase_node(node)
        return [copies[results]]
    for reader in list(node.users):
        position: Any = reader.args[1]
        reader.replace_all_uses_with(copies[results[position]])
        module.graph.erase_node(reader)
    module.graph.erase_node(node)
    return [copies[result] for result in results]
