"""Hidden units taken out of a module's MLPs: what makes them, what reads them, and which add least to the output.

torch-pruning's dependency graph finds what must be narrowed together; what it cannot follow is narrowed by its rows, and
whether that was right is seen from the narrowed model's output.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import ComposeError
from ..graph.branch import Branch
from ..graph.ops import SEE_THROUGH, op_name, shape_of
from .distill import RecordedCall
from .heads import contributions, same
from .linears import linear_of, sources_of, uses_of

_log = logging.getLogger(__name__)

#: From this width on, what is left is rounded to multiples of `_STEP`, which kernels like.
_WIDE, _STEP = 128, 8


@dataclass(frozen=True)
class Hidden:
    """The hidden units of an MLP: the layer that reads them, its inputs that they are, and the layers that make them.

    `whole` is false if the reading layer has other inputs too (attention and MLP joined before one projection).
    """

    down: str
    ups: tuple[str, ...]
    columns: range
    whole: bool


@dataclass(frozen=True)
class _Plan:
    """Hidden units that go: the layer that reads them, which of its inputs, what does it, and the layers it changes.

    `exact` is false where the others would not give what they gave (a norm over the hidden units).
    """

    down: nn.Linear
    drop: list[int]
    take_out: Callable[[], Any]
    layers: frozenset[str]
    exact: bool


def find_hidden(branches: Sequence[Branch], linears: Mapping[fx.Node, str]) -> list[Hidden]:
    """Hidden units of the MLPs: between linear layers of one branch, with no product or convolution on the way."""
    found: dict[str, Hidden] = {}
    for branch in branches:
        if branch.kind not in ("mlp", "parallel"):
            continue
        inside = set(branch.nodes)
        only_to_linears = {
            linears[node] for node in branch.nodes if node in linears and not uses_of(node, inside, linears, branch)[1]
        }
        for node in branch.nodes:
            if node not in linears:
                continue
            ups, mixed = sources_of(node, inside, linears, branch, node.args[:1])
            if ups and not mixed and set(ups) <= only_to_linears:
                weight = shape_of(node.all_input_nodes[1]) or [0, 0]
                found.setdefault(linears[node], Hidden(linears[node], tuple(ups), range(weight[-1]), True))
            elif set(ups) & only_to_linears:
                for part in _joined(node, inside, linears, branch, only_to_linears):
                    found.setdefault(linears[node], part)
    return list(found.values())


def _joined(
    node: fx.Node, inside: set[fx.Node], linears: Mapping[fx.Node, str], branch: Branch, known: set[str]
) -> Iterator[Hidden]:
    """Of values joined along their channels before the layer `node`: those that come from linear layers alone."""
    value: Any = node.args[0]
    while op_name(value) in SEE_THROUGH and value in inside:
        value = value.args[0]
    if op_name(value) != "aten::cat" or value not in inside:
        return
    rank, first = len(shape_of(value) or []), 0
    if (value.args[1] if len(value.args) > 1 else 0) not in (-1, rank - 1):
        return
    for part in value.args[0]:
        width = (shape_of(part) or [0])[-1]
        ups, mixed = sources_of(value, inside, linears, branch, [part])
        if ups and not mixed and set(ups) <= known:
            yield Hidden(linears[node], tuple(ups), range(first, first + width), False)
        first += width


def narrow(
    student: nn.Module,
    hidden: Sequence[Hidden],
    energies: Mapping[str, Tensor],
    share: float,
    linears: set[str],
    call: RecordedCall,
) -> set[str]:
    """Take hidden units out of `student`, in place: of each MLP those that add least to its output."""
    graph = _dependencies(student, call)
    plans: list[_Plan] = []
    changed: set[str] = set()
    for units in hidden:
        down = linear_of(student, units.down)
        drop = _least(units.columns, contributions(down, energies.get(units.down)), share)
        if units.down in changed or not drop:
            continue
        plan = None
        if graph is not None and units.whole:
            plan = _grouped(graph, student, units, drop, linears)
        plan = plan or _by_rows(student, units, drop)
        if plan is None or plan.layers & changed:
            _log.warning("prune: %s stays as wide as it is: its hidden units reach beyond its own MLP", units.down)
            continue
        plans.append(plan)
        changed |= plan.layers
    if not plans:
        raise ComposeError(
            f"prune.mlp_width: none of {len(hidden)} MLPs of {type(student).__name__} can be narrowed by {share:g}: "
            "less than one unit of each, or units that other layers read too; set it to 0"
        )
    with torch.no_grad():
        for plan in plans:
            plan.down.weight[:, plan.drop] = 0
        expected = call.run(student).float()
        try:
            for plan in plans:
                plan.take_out()
            got = call.run(student).float()
        except RuntimeError as error:
            got = torch.zeros(0)
            _log.debug("narrowed model: %s", error)
    exact = all(plan.exact for plan in plans)
    if got.shape != expected.shape or (exact and not same(got, expected, call.output.dtype)):
        raise ComposeError(
            f"prune.mlp_width: {type(student).__name__} without some hidden units is not what it is with them silenced: "
            "its code depends on their number; set it to 0"
        )
    return changed


def _grouped(graph: Any, student: nn.Module, units: Hidden, drop: list[int], linears: set[str]) -> _Plan | None:
    """What torch-pruning takes out together with these inputs of a layer; None if that is more than the MLP."""
    import torch_pruning as tp

    def group() -> Any:
        return graph.get_pruning_group(linear_of(student, units.down), tp.prune_linear_in_channels, idxs=list(drop))

    names = {id(module): name for name, module in student.named_modules()}
    layers: set[str] = set()
    exact = True
    for dependency, _ in group():
        target = dependency.target.module
        if isinstance(target, nn.Parameter):
            exact = False
        elif isinstance(target, nn.Linear):
            name = names[id(target)]
            layers.add(name)
            makes = graph.is_out_channel_pruning_fn(dependency.handler)
            if name not in linears or makes != (name in units.ups):
                return None
        elif id(target) in names and any(True for _ in target.parameters(recurse=False)):
            if any(parameter.dim() > 1 for parameter in target.parameters(recurse=False)):
                return None
            exact = False
    if not set(units.ups) < layers:
        return None
    return _Plan(linear_of(student, units.down), drop, lambda: group().prune(), frozenset(layers), exact)


def _by_rows(student: nn.Module, units: Hidden, drop: list[int]) -> _Plan | None:
    """The rows of the layers before that make these inputs of a layer: one each, or two of a gate and its value.

    For what torch-pruning cannot follow; whether it was right is seen from the narrowed model's output.
    """
    import torch_pruning as tp

    width, down = len(units.columns), linear_of(student, units.down)
    rows = {}
    for name in units.ups:
        parts, rest = divmod(linear_of(student, name).out_features, width)
        if rest or parts not in (1, 2):
            return None
        rows[name] = [part * width + column - units.columns.start for part in range(parts) for column in drop]

    def take_out() -> None:
        tp.prune_linear_in_channels(down, drop)
        for name, indices in rows.items():
            tp.prune_linear_out_channels(linear_of(student, name), indices)

    return _Plan(down, drop, take_out, frozenset({units.down, *units.ups}), True)


def _dependencies(student: nn.Module, call: RecordedCall) -> Any:
    """torch-pruning's dependency graph, traced with a recorded call; None if it cannot follow the model."""
    import torch_pruning as tp

    wants = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tp.DependencyGraph().build_dependency(
                student, example_inputs=dict(call.inputs), verbose=False,
                forward_fn=lambda module, inputs: module(**inputs),
                output_transform=lambda out: [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad],
            )  # fmt: skip
    except Exception as error:  # it follows autograd's graph, and meets what it does not know in many ways
        _log.info("prune: torch-pruning cannot follow %s: %s: %s", type(student).__name__, type(error).__name__, error)
        return None
    finally:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(wants[name])


def _least(columns: Sequence[int], scores: Tensor, share: float) -> list[int]:
    """Which of the columns go: those of the lowest scores."""
    width = len(columns)
    kept = width - round(width * share)
    if width >= _WIDE and width % _STEP == 0:
        kept = round(kept / _STEP) * _STEP
    order = scores[list(columns)].argsort()[: width - max(kept, 1)].tolist()
    return sorted(columns[k] for k in order)
