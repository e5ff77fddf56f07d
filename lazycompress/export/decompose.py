"""Rewrites the operations of a traced program into those that a converter has, one node at a time.

`ExportedProgram.run_decompositions` traces the whole program twice, and every body of a `cond` again for each of its checks:
minutes for models whose branches are bodies. Here each node is traced once, alone, and its operations take its place; bodies
are graphs like any other. What the program says of a value (its sizes, its name as an output) stays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.decomp_utils import CustomDecompTable
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

Decompositions = Mapping[Any, Callable[..., Any]]

_aten = torch.ops.aten
_SIZES = {_aten.sym_size.int, _aten.sym_stride.int, _aten.sym_numel.default, _aten.sym_storage_offset.default}
"""They give numbers, not tensors; converters have them."""
_CHECKS = {_aten._assert_scalar.default, _aten._assert_tensor_metadata.default, _aten._assert_async.msg}


def decompose(program: ExportedProgram, table: Decompositions) -> ExportedProgram:
    """The program with each operation of `table` in the operations that it stands for.

    Args:
        program: as `torch.export.export` gives it; changed in place unless an operation writes into its input.
        table: as for `ExportedProgram.run_decompositions`: operations that are composite and not in it are kept where the
            default table has them.
    """
    graphs = [module for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    if any(_writes(node) for module in graphs for node in module.graph.nodes):
        # Only this one knows how to do without the writing.
        whole: ExportedProgram = ExportedProgram.run_decompositions(program, dict(table))
        return whole
    inner = dict(table)
    known = CustomDecompTable()  # type: ignore[no-untyped-call]
    for module in graphs:
        for node in list(module.graph.nodes):
            if node.target in _CHECKS:
                module.graph.erase_node(node)
            elif _stands_for_others(node, inner, known):
                _expand(module, node, inner)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return program


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _stands_for_others(node: fx.Node, table: Decompositions, known: Decompositions) -> bool:
    operation = node.target
    if not isinstance(operation, OpOverload) or operation in _SIZES:
        return False
    return operation in table or (_is_composite(operation) and operation not in known)


def _is_composite(operation: OpOverload) -> bool:
    name: str = operation.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _expand(module: fx.GraphModule, node: fx.Node, table: Decompositions) -> None:
    """Put what `node` stands for in its place."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    operands = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    operation: Any = node.target
    compute = table.get(operation, operation)

    def run(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, fx.Node) else x for x in leaves], spec)
        results = compute(*args, **kwargs)
        return operation(*args, **kwargs) if results is NotImplemented else results

    values = [operand.meta["val"] for operand in operands]
    traced = _trace(run, values, node, table)
    with module.graph.inserting_before(node):
        copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
        for number, inner in enumerate(traced.graph.nodes):
            if inner.op == "get_attr":
                copies[inner] = _constant(module, traced, inner)
            elif inner.target is _aten.sym_numel.default:
                copies[inner] = _count(module, copies[inner.args[0]])
            elif inner.op == "call_function":
                copies[inner] = module.graph.node_copy(inner, copies.__getitem__)
                copies[inner].name = f"{node.name}__{number}"  # graphs may hold names that they do not know to be taken
        (results,) = traced.graph.output_node().args
    if isinstance(results, fx.Node):
        _replace(module, node, copies[results])
        return
    for reader in list(node.users):  # they take one of several results each
        _replace(module, reader, copies[results[reader.args[1]]])  # type: ignore[index]
    module.graph.erase_node(node)


def _trace(run: Callable[..., Any], values: list[Any], node: fx.Node, table: Decompositions) -> fx.GraphModule:
    """`run` as operations. Numbers that are not known until it runs stay those of the program."""
    mode = _mode([*values, *pytree.tree_leaves(node.meta["val"])])
    with ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(torch.no_grad())
        traced = make_fx(run, dict(table))(*values)
        if any(_writes(inner) for inner in traced.graph.nodes):
            traced = make_fx(functionalize(run, remove="mutations"), dict(table))(*values)
    return traced


def _mode(values: list[Any]) -> FakeTensorMode | None:
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def _constant(module: fx.GraphModule, traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A number that an operation brings along, as an operation: programs have no room for further tensors."""
    value = getattr(traced, str(node.target))
    assert isinstance(value, Tensor)
    filled: fx.Node = module.graph.call_function(
        _aten.full.default,
        (list(value.shape), value.flatten()[0].item()),
        {"dtype": value.dtype, "device": value.device},
    )
    filled.meta["val"] = node.meta.get("val", value)
    return filled


def _count(module: fx.GraphModule, tensor: fx.Node) -> fx.Node:
    """The number of a tensor's elements from its sizes: converters have these alone."""
    sizes = tensor.meta["val"].shape
    known = math.prod(size for size in sizes if isinstance(size, int))
    counted: Any = known
    for dim, size in enumerate(sizes):
        if not isinstance(size, int):
            one = module.graph.call_function(_aten.sym_size.int, (tensor, dim))
            one.meta["val"], known = size, known * size
            counted = one if counted == 1 else module.graph.call_function(operator.mul, (one, counted))
            counted.meta["val"] = known
    found: fx.Node = counted
    return found


def _replace(module: fx.GraphModule, node: fx.Node, result: fx.Node) -> None:
    """`result` instead of `node`, under its name where the program gives it to the caller."""
    if any(reader.op == "output" for reader in node.users):
        with module.graph.inserting_before(node):
            result = module.graph.call_function(_aten.alias.default, (result,))
        name = node.name
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
        result.name = name
        return
    if result.op != "placeholder" and len(result.users) == 0:
        result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)
