"""Rewrites a traced program so that converters take it; what it computes stays the same.

Each rule holds in the program's own graph and in the bodies of its branches:

1. Memory without values (`empty`) is filled with zeros: models write over all of it, converters have no such operation.
2. A squeeze of a size that is not 1 does nothing in torch, is an error in ONNX, and becomes an alias.
3. An operand of a body that stands in a list (as in `cat`) passes through an operation that leaves it as it is: OpenVINO reads
   another value there, and sees through a copy.
4. A sum of several sizes is added up two by two.
5. Filling in booleans is logic: ONNX Runtime has no choice between them.
6. What is computed with autocast switched off, or gradients on or off, stands in a body of its own, and is taken out of it: in a
   file there is neither.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

_aten = torch.ops.aten

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast

#: At which argument the body is, and its operands behind it.
_PLAIN_BODIES = {_AUTOCAST: 4, torch.ops.higher_order.wrap_with_set_grad_enabled: 1}

_FILLED = {
    _aten.empty.memory_format: _aten.zeros.default,
    _aten.empty_like.default: _aten.zeros_like.default,
    _aten.new_empty.default: _aten.new_zeros.default,
}


def make_portable(program: ExportedProgram) -> int:
    """Apply the rules in place; returns how many nodes were changed."""
    bodies = [m for name, m in program.graph_module.named_modules() if name and isinstance(m, fx.GraphModule)]
    changed = 0
    for module in [program.graph_module, *bodies]:
        here = _inline(module) + _fill(module) + _alias(module) + _add_sizes(module) + _by_logic(module)
        if module is not program.graph_module:
            here += _copy_in_lists(module)
        if here:
            module.graph.lint()
            module.recompile()
        changed += here
    return changed


def add_sizes(module: fx.GraphModule) -> fx.GraphModule:
    """Rule 4, in a program that was traced again, and in the bodies of its branches."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule) and _add_sizes(part):
            part.recompile()
    return module


def attend_to_something(module: fx.GraphModule) -> fx.GraphModule:
    """Attention under masks of booleans that let some queries attend to nothing: zeros for these, as torch gives.

    OpenVINO has NaN there, as for the padding of a prompt. Holds in the bodies of branches, too.
    """
    for part in [part for part in module.modules() if isinstance(part, fx.GraphModule)]:
        for node in part.graph.find_nodes(op="call_function", target=_aten.scaled_dot_product_attention.default):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
                continue
            with part.graph.inserting_before(node):
                something = _call(part.graph, _aten.any.dim, mask, -1, True)
                nothing = _call(part.graph, _aten.logical_not.default, something)
                wider = _call(part.graph, _aten.logical_or.default, mask, nothing)
            with part.graph.inserting_after(node):
                zeroed = _call(part.graph, _aten.masked_fill.Scalar, node, nothing, 0.0)
            node.replace_all_uses_with(zeroed, delete_user_cb=lambda user, own=zeroed: user is not own)
            node.replace_input_with(mask, wider)
        part.recompile()
    return module


def _call(graph: fx.Graph, operation: Any, *args: Any) -> fx.Node:
    node = graph.call_function(operation, args)
    node.meta["val"] = operation(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args))
    return node


def constants_within(module: fx.GraphModule) -> fx.GraphModule:
    """Weights that are operands of a `cond`, in the bodies that read them instead.

    OpenVINO's converter takes a time that grows with the product of operands and operations.
    """
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
        predicate, *bodies, operands = node.args
        kept = []
        parts = [getattr(module, body.target) for body in bodies]
        inputs = [part.graph.find_nodes(op="placeholder") for part in parts]
        for position, operand in enumerate(operands):
            value = operator.attrgetter(operand.target)(module) if operand.op == "get_attr" else None
            if not isinstance(value, Tensor):
                kept.append(operand)
                continue
            for part, found in zip(parts, inputs, strict=True):
                _put_in_place_of(part, found[position], value)
        node.args = (predicate, *bodies, tuple(kept))
        for part in parts:
            constants_within(part)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _put_in_place_of(body: fx.GraphModule, operand: fx.Node, value: Tensor) -> None:
    if operand.users:
        name = f"constant_{operand.name}"
        body.register_buffer(name, value)
        with body.graph.inserting_before(operand):
            constant = body.graph.get_attr(name)
        constant.meta = dict(operand.meta)
        operand.replace_all_uses_with(constant)
    body.graph.erase_node(operand)


def slice_scatter(
    value: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """`value[..., start:end:step, ...] = part` without an assignment, as a decomposition of the ATen operation.

    Covers what models write (every k-th channel of all, or a stretch of known length); leaves anything else as it is.
    """
    size = value.shape[dim]
    first = 0 if start is None else start
    last = size if end is None else end
    if not all(isinstance(number, int) for number in (size, first, last)):
        return NotImplemented
    first = max(first + size if first < 0 else first, 0)
    last = min(last + size if last < 0 else last, size)
    dim %= value.dim()
    if step == 1:
        return torch.cat([value.narrow(dim, 0, first), part, value.narrow(dim, last, size - last)], dim)
    if size % step or first >= step or last <= size - step + first:
        return NotImplemented
    groups = value.reshape(*value.shape[:dim], size // step, step, *value.shape[dim + 1 :])
    kept = [groups.select(dim + 1, k) for k in range(step)]
    kept[first] = part
    return torch.stack(kept, dim + 1).flatten(dim, dim + 1)


def select_scatter(value: Tensor, part: Tensor, dim: int, index: int) -> Any:
    """`value[..., index, ...] = part` without an assignment: OpenVINO has one of vectors only."""
    size = value.shape[dim]
    if not isinstance(index, int) or not isinstance(size, int):
        return NotImplemented
    return slice_scatter(value, part.unsqueeze(dim), dim, index % size, index % size + 1)


def _inline(module: fx.GraphModule) -> int:
    """Rule 6."""
    changed = 0
    for node in list(module.graph.nodes):
        place = _PLAIN_BODIES.get(node.target)
        if place is None or (node.target is _AUTOCAST and node.args[2]):
            continue
        inside, *operands = node.args[place:]
        body = operator.attrgetter(inside.target)(module)
        if not isinstance(body, fx.GraphModule) or body.graph.find_nodes(op="get_attr"):
            continue
        copies = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        with module.graph.inserting_before(node):
            results: Any = module.graph.graph_copy(body.graph, copies)
        for reader in list(node.users):
            position: Any = reader.args[1]
            reader.replace_all_uses_with(results[position])
            module.graph.erase_node(reader)
        module.graph.erase_node(node)
        if not inside.users:
            # Converters look at every body that is there, whether or not anybody calls it.
            module.graph.erase_node(inside)
            if not any(other.target == inside.target for other in module.graph.find_nodes(op="get_attr")):
                delattr(module, inside.target)
        changed += 1
    return changed


def _fill(module: fx.GraphModule) -> int:
    """Rule 1."""
    found = [node for node in module.graph.nodes if node.op == "call_function" and node.target in _FILLED]
    for node in found:
        node.target = _FILLED[node.target]
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    return len(found)


def _alias(module: fx.GraphModule) -> int:
    """Rule 2."""
    changed = 0
    for node in module.graph.nodes:
        if node.target is not _aten.squeeze.dim:
            continue
        size = node.args[0].meta["val"].shape[node.args[1]]
        if isinstance(size, int) and size != 1:
            node.target, node.args = _aten.alias.default, (node.args[0],)
            changed += 1
    return changed


def _add_sizes(module: fx.GraphModule) -> int:
    """Rule 4."""
    found = module.graph.find_nodes(op="call_function", target=torch.sym_sum)
    for node in found:
        first, *rest = node.args[0]
        with module.graph.inserting_before(node):
            for size in rest:
                known = operator.add(
                    *(value.meta["val"] if isinstance(value, fx.Node) else value for value in (first, size))
                )
                first = module.graph.call_function(operator.add, (first, size))
                first.meta["val"] = known
        node.replace_all_uses_with(first)
        module.graph.erase_node(node)
    return len(found)


def _by_logic(module: fx.GraphModule) -> int:
    """Rule 5."""
    changed = 0
    for node in module.graph.find_nodes(op="call_function", target=_aten.masked_fill.Scalar):
        value, mask, filled = node.args
        if value.meta["val"].dtype != torch.bool:
            continue
        with module.graph.inserting_before(node):
            if filled:
                result = _call(module.graph, _aten.logical_or.default, value, mask)
            else:
                kept = _call(module.graph, _aten.logical_not.default, mask)
                result = _call(module.graph, _aten.logical_and.default, value, kept)
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
        changed += 1
    return changed


def _copy_in_lists(module: fx.GraphModule) -> int:
    """Rule 3."""
    changed = 0
    for operand in module.graph.find_nodes(op="placeholder"):
        readers = [node for node in operand.users if node.op == "call_function" and _in_a_list(node, operand)]
        readers = [node for node in readers if not isinstance(node.target, torch._ops.HigherOrderOperator)]
        if not readers:
            continue
        with module.graph.inserting_after(list(module.graph.find_nodes(op="placeholder"))[-1]):
            if operand.meta["val"].dtype == torch.bool:
                copy = module.graph.call_function(_aten.logical_or.default, (operand, operand))
            else:
                copy = module.graph.call_function(_aten.mul.Tensor, (operand, 1))
        copy.meta = dict(operand.meta)
        for node in readers:
            node.replace_input_with(operand, copy)
        changed += 1
    return changed


def _in_a_list(node: fx.Node, operand: fx.Node) -> bool:
    arguments: list[Any] = [*node.args, *node.kwargs.values()]
    return any(isinstance(argument, (list, tuple)) and operand in argument for argument in arguments)
