"""Rewrites the operations of a traced program into those that a converter has, one node at a time.

`ExportedProgram.run_decompositions` traces the whole program more than once, and every body of a `cond` again for each of its
checks: minutes for models whose branches are bodies. Here each node is traced once, alone, and its operations take its place;
bodies are graphs like any other. What the program says of a value (its sizes, its name as an output) stays. A program with an
operation that cannot be traced alone (it writes into its input, brings numbers along, asks how memory lies) is left to
`run_decompositions`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.decomp_utils import CustomDecompTable
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils import _pytree as pytree

Decompositions = Mapping[Any, Callable[..., Any]]

_aten = torch.ops.aten
_COUNT = _aten.sym_numel.default
_LAYOUT = {_aten.sym_stride.int, _aten.sym_storage_offset.default}
"""They give numbers that converters do not have."""
_CHECKS = {_aten._assert_scalar.default, _aten._assert_tensor_metadata.default, _aten._assert_async.msg}


def decompose(program: ExportedProgram, table: Decompositions) -> ExportedProgram:
    """The program with each operation of `table` in the operations that it stands for.

    Args:
        program: as `torch.export.export` gives it; changed in place where its operations can be traced alone.
        table: as for `ExportedProgram.run_decompositions`: operations that are composite and not in it are kept where the
            default table has them.
    """
    graphs = [module for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    nodes = [(module, node) for module in graphs for node in module.graph.nodes]
    known = CustomDecompTable()  # type: ignore[no-untyped-call]
    rules = dict(table)
    try:
        traced = _traced([node for _, node in nodes if _stands_for_others(node, rules, known)], rules)
    except Exception:  # whatever it is, the way round has its own word on it
        return _whole(program, rules)
    if not all(_stands_alone(node) for node in (*(node for _, node in nodes), *_within(traced.values()))):
        return _whole(program, rules)
    for module, node in nodes:
        if node.target in _CHECKS:
            module.graph.erase_node(node)
        elif node in traced:
            _expand(module, node, traced[node])
    for module in graphs:
        _multiply_sizes(module)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return program


def _whole(program: ExportedProgram, table: dict[Any, Callable[..., Any]]) -> ExportedProgram:
    # Of the class: an instance may have been told to come here.
    whole: ExportedProgram = ExportedProgram.run_decompositions(program, table)
    return whole


def _within(traced: Iterable[fx.GraphModule]) -> list[fx.Node]:
    return [node for part in traced for node in part.graph.nodes]


def _stands_alone(node: fx.Node) -> bool:
    """Whether a node can be put anywhere: it is no constant but a number, writes nothing, and asks for sizes at most."""
    if node.op == "get_attr":
        value = getattr(node.graph.owning_module, str(node.target))
        return isinstance(value, fx.GraphModule) or (isinstance(value, Tensor) and value.numel() == 1)
    if not isinstance(node.target, OpOverload):
        return True
    return node.target not in _LAYOUT and not node.target._schema.is_mutable


def _stands_for_others(node: fx.Node, table: Decompositions, known: Decompositions) -> bool:
    operation = node.target
    if not isinstance(operation, OpOverload) or operation in {_aten.sym_size.int, _COUNT, *_LAYOUT, *_CHECKS}:
        return False
    return operation in table or (_is_composite(operation) and operation not in known)


def _is_composite(operation: OpOverload) -> bool:
    name: str = operation.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, as often as it does."""
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]


def _traced(nodes: list[fx.Node], table: dict[Any, Callable[..., Any]]) -> dict[fx.Node, fx.GraphModule]:
    """What each node stands for; the same for those that do the same with operands of the same kinds, as blocks do."""
    seen: dict[object, fx.GraphModule] = {}
    found = {}
    for node in nodes:
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        kinds = [_kind(leaf.meta["val"]) if isinstance(leaf, fx.Node) else repr(leaf) for leaf in leaves]
        key = (node.target, str(spec), *kinds)
        if key not in seen:
            seen[key] = _trace(node, table)
        found[node] = seen[key]
    return found


def _kind(value: Any) -> object:
    """All of a value that tracing looks at: sizes, that are numbers or expressions, and how it lies in memory."""
    if isinstance(value, Tensor):
        return (
            tuple(map(str, value.shape)),
            tuple(map(str, value.stride())),
            str(value.storage_offset()),
            value.dtype,
            value.device,
        )
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return (type(value), str(value))


def _trace(node: fx.Node, table: dict[Any, Callable[..., Any]]) -> fx.GraphModule:
    """What a node stands for, of its operands. Numbers that are not known until it runs stay those of the program."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    operation: Any = node.target
    compute = table.get(operation, operation)

    def run(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, fx.Node) else x for x in leaves], spec)
        results = compute(*args, **kwargs)
        return operation(*args, **kwargs) if results is NotImplemented else results

    values = [operand.meta["val"] for operand in _operands(node)]
    return _without_writing(as_graph(run, values, node, table))


def as_graph(
    run: Callable[..., Any], values: list[Any], node: fx.Node, table: dict[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """What `run` does with values of which sizes are known, as a graph of as many inputs; they are of the program of `node`."""
    fakes = [value for value in pytree.tree_leaves((values, node.meta["val"])) if isinstance(value, FakeTensor)]
    with ExitStack() as stack:
        for mode in [fake.fake_mode for fake in fakes[:1]]:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(torch.no_grad())
        return make_fx(run, table)(*values)


def _without_writing(traced: fx.GraphModule) -> fx.GraphModule:
    """What an operation writes into a value of its own, of which there is no view, is a further value."""
    order = {node: k for k, node in enumerate(traced.graph.nodes)}
    for node in list(order):
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        into = node.args[0]
        before = {reader for reader in into.users if order[reader] < order[node]}
        if into.op != "call_function" or not all(map(_gives_new, [into, *before])):
            continue
        readers = [*node.users, *set(into.users).difference(before, {node})]
        if node.target is _aten.copy_.default and _alike(into, node.args[1]):
            written = node.args[1]
        elif (pure := _without_underscore(node.target)) is not None:
            node.target, written = pure, node
        else:
            continue
        for reader in readers:
            reader.replace_input_with(into, written)
            reader.replace_input_with(node, written)
        if written is not node:
            traced.graph.erase_node(node)
    return traced


def _without_underscore(operation: OpOverload) -> OpOverload | None:
    """The operation that gives what another one writes into its first operand, if there is one."""
    name = operation._schema.name.removeprefix("aten::").removesuffix("_")
    found: OpOverload | None = getattr(getattr(_aten, name, None), operation._overloadname, None)
    return found if found is not None and not found._schema.is_mutable and name != "copy" else None


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same type, and sizes that are known to be the same."""
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.dtype == b.dtype and a.device == b.device and statically_known_true(sym_eq(a.shape, b.shape)))


def _gives_new(node: fx.Node) -> bool:
    """Whether an operation's results lie in memory of their own."""
    return isinstance(node.target, OpOverload) and all(
        value.alias_info is None for value in node.target._schema.returns
    )


def _expand(module: fx.GraphModule, node: fx.Node, traced: fx.GraphModule) -> None:
    """Put what `node` stands for in its place."""
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), _operands(node), strict=True))
    with module.graph.inserting_before(node):
        for number, inner in enumerate(traced.graph.nodes):
            if inner.op == "get_attr":
                copies[inner] = _number(module, getattr(traced, inner.target))
            elif inner.op == "call_function":
                copies[inner] = module.graph.node_copy(inner, copies.__getitem__)
            else:
                continue
            copies[inner].name = f"{node.name}__{number}"  # graphs may hold names that they do not know to be taken
    (results,) = traced.graph.output_node().args
    if isinstance(results, fx.Node):
        _replace(module, node, copies[results], _operands(node))
        return
    for reader in list(node.users):  # they take one of several results each
        _replace(module, reader, copies[results[reader.args[1]]], _operands(node))  # type: ignore[index]
    module.graph.erase_node(node)


def _number(module: fx.GraphModule, value: Tensor) -> fx.Node:
    """A number that an operation brings along, as an operation: programs have no room for further tensors."""
    filled: fx.Node = module.graph.call_function(
        _aten.full.default, (list(value.shape), value.item()), {"dtype": value.dtype, "device": value.device}
    )
    filled.meta["val"] = value
    return filled


def _replace(module: fx.GraphModule, node: fx.Node, result: fx.Node, operands: list[fx.Node]) -> None:
    """`result` instead of `node`, under its name where the program gives it to the caller."""
    given = any(reader.op == "output" for reader in node.users)
    if given:
        with module.graph.inserting_before(node):
            result = module.graph.call_function(_aten.alias.default, (result,))
    if result not in operands:
        result.meta["val"] = node.meta["val"]
    name = node.name
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)
    if given:
        result.name = name


def _multiply_sizes(module: fx.GraphModule) -> None:
    """The number of a tensor's elements from its sizes: converters have these alone."""
    for node in module.graph.find_nodes(op="call_function", target=_COUNT):
        (tensor,) = node.args
        count: Any = 1
        known: Any = 1
        with module.graph.inserting_before(node):
            for dim, size in enumerate(tensor.meta["val"].shape):
                factor: Any = size
                if not isinstance(size, int):
                    factor = module.graph.call_function(_aten.sym_size.int, (tensor, dim))
                    factor.meta["val"] = size
                known = known * size
                if isinstance(factor, fx.Node) or isinstance(count, fx.Node):
                    count = module.graph.call_function(operator.mul, (count, factor))
                    count.meta["val"] = known
                else:
                    count *= factor
        if isinstance(count, fx.Node):
            node.replace_all_uses_with(count)
            module.graph.erase_node(node)
