"""Pruning of a module before it is captured, and the short training that repairs it.

Structured pruning narrows the MLPs and drops attention heads, so that fewer multiply-accumulates are left for any kernel;
torch-pruning's dependency graph finds what must be narrowed together. Magnitude pruning (NNCF) sets single weights to zero:
the matmuls stay as large as they were, so by itself it makes nothing faster.

What may be pruned comes from the located branches: linear layers that pass values on to other linear layers of one branch.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import ComposeError, MissingExtraError
from ..graph.capture import call_of, capture
from ..graph.locate import Branch, locate_branches
from ..graph.ops import SEE_THROUGH, is_heavy, op_name, shape_of
from ..recipe import Prune
from ..sampling import Sampler, first_call
from .distill import RecordedCall, finetune, input_energies, own_noise, record
from .heads import contributions, find_attention, prune_heads, same, sources_of, uses_of
from .pruners import Method, pruner_of
from .quantize import ComposeReport

_log = logging.getLogger(__name__)

#: From this width on, what is left is rounded to multiples of `_STEP`, which kernels like.
_WIDE, _STEP = 128, 8


@dataclass(frozen=True)
class _Hidden:
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


def prune(
    model: nn.Module, sampler: Sampler, options: Prune, *, seed: int = 0, progress: bool = True
) -> tuple[nn.Module, ComposeReport]:
    """A pruned copy of a dense model, repaired by a short training against it.

    Args:
        model: the dense model; left as it is.
        sampler: runs one denoising loop with the model it is given; its calls tell which units matter least, and are
            what the copy is trained on.
        options: what is taken out, and how long the copy is trained.
        seed: of the recorded runs' noise and of the training.
        progress: show a progress bar.

    Returns:
        The copy, in evaluation mode, with inputs and outputs as before; and how many matmuls of branches were changed.
        Its widths are no longer those of its `config`: keep the module itself.

    Raises:
        ComposeError: nothing of the model can be pruned as asked.
        MissingExtraError: torch-pruning or NNCF is not installed.
        LazyCompressError: the model cannot be captured, or has no branches.
    """
    started = time.perf_counter()
    pruner = pruner_of(options)
    pruner.need(options)
    with own_noise(seed + 777):
        captured = capture(model, call_of(model, first_call(model, sampler)), sizes=False)
    branches = locate_branches(captured.graph_module.graph, captured.batch)
    linears = _linears(captured.graph_module, model)
    heavy = [node for branch in branches for node in branch.nodes if is_heavy(node)]
    pruned, changed = pruner.prune(model, sampler, options, branches, linears, seed, progress)
    count = sum(1 for node in heavy if linears.get(node) in changed)
    return pruned, ComposeReport("prune", count, len(heavy) - count, time.perf_counter() - started)


def need_pruner(options: Prune) -> Any:
    """The package that does what one of the methods here asks for, imported.

    Raises:
        ComposeError: the options ask for nothing.
        MissingExtraError: it is not installed.
    """
    if options.method == "magnitude":
        try:
            import nncf
        except ImportError:
            raise MissingExtraError("nncf", "openvino", "magnitude pruning") from None
        return nncf
    if not options.mlp_width and not options.heads:
        raise ComposeError("prune: mlp_width and heads are both 0, so nothing is pruned; leave the section out")
    try:
        import torch_pruning
    except ImportError:
        raise MissingExtraError("torch-pruning", "prune", "structured pruning") from None
    return torch_pruning


# -- structured ---------------------------------------------------------------------------------------------------------


def _structured(
    model: nn.Module,
    sampler: Sampler,
    options: Prune,
    branches: Sequence[Branch],
    linears: Mapping[fx.Node, str],
    seed: int,
    progress: bool,
) -> tuple[nn.Module, set[str]]:
    """A narrower copy, and the names of the layers that were narrowed."""
    hidden = find_hidden(branches, linears) if options.mlp_width else []
    attention = find_attention(branches, linears, model) if options.heads else []
    kinds = ", ".join(sorted({branch.kind for branch in branches}))
    where = f"{type(model).__name__} ({len(branches)} branches: {kinds}; {len(set(linears.values()))} linear layers)"
    if options.mlp_width and not hidden:
        raise ComposeError(
            f"prune.mlp_width: no MLP of {where} has a hidden width between two linear layers of one branch; set it to 0"
        )
    if options.heads and not attention:
        raise ComposeError(
            f"prune.heads: no attention of {where} has all its heads between linear layers of one branch; set it to 0"
        )
    readers = [h.down for h in hidden] + [name for a in attention for name in a.outs]
    with input_energies({name: model.get_submodule(name) for name in readers}) as energies:
        calls = record(model, sampler, options.finetune_steps, seed)
    student = copy.deepcopy(model).eval()
    changed: set[str] = set()
    if attention:
        student = prune_heads(student, attention, energies, options.heads, calls[0])
        changed |= {name for a in attention for name in (*a.sources, *a.outs)}
    if hidden:
        changed |= _narrow(student, hidden, energies, options.mlp_width, set(linears.values()), calls[0])
    _repair(student, calls, options, seed, progress)
    return student, changed


def find_hidden(branches: Sequence[Branch], linears: Mapping[fx.Node, str]) -> list[_Hidden]:
    """Hidden units of the MLPs: between linear layers of one branch, with no product or convolution on the way."""
    found: dict[str, _Hidden] = {}
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
                found.setdefault(linears[node], _Hidden(linears[node], tuple(ups), range(weight[-1]), True))
            elif set(ups) & only_to_linears:
                for part in _joined(node, inside, linears, branch, only_to_linears):
                    found.setdefault(linears[node], part)
    return list(found.values())


def _joined(
    node: fx.Node, inside: set[fx.Node], linears: Mapping[fx.Node, str], branch: Branch, known: set[str]
) -> Iterator[_Hidden]:
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
            yield _Hidden(linears[node], tuple(ups), range(first, first + width), False)
        first += width


def _narrow(
    student: nn.Module,
    hidden: Sequence[_Hidden],
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
        down = _linear(student, units.down)
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


def _grouped(graph: Any, student: nn.Module, units: _Hidden, drop: list[int], linears: set[str]) -> _Plan | None:
    """What torch-pruning takes out together with these inputs of a layer; None if that is more than the MLP."""
    import torch_pruning as tp

    def group() -> Any:
        return graph.get_pruning_group(_linear(student, units.down), tp.prune_linear_in_channels, idxs=list(drop))

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
    return _Plan(_linear(student, units.down), drop, lambda: group().prune(), frozenset(layers), exact)


def _by_rows(student: nn.Module, units: _Hidden, drop: list[int]) -> _Plan | None:
    """The rows of the layers before that make these inputs of a layer: one each, or two of a gate and its value.

    For what torch-pruning cannot follow; whether it was right is seen from the narrowed model's output.
    """
    import torch_pruning as tp

    width, down = len(units.columns), _linear(student, units.down)
    rows = {}
    for name in units.ups:
        parts, rest = divmod(_linear(student, name).out_features, width)
        if rest or parts not in (1, 2):
            return None
        rows[name] = [part * width + column - units.columns.start for part in range(parts) for column in drop]

    def take_out() -> None:
        tp.prune_linear_in_channels(down, drop)
        for name, indices in rows.items():
            tp.prune_linear_out_channels(_linear(student, name), indices)

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


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _least(columns: Sequence[int], scores: Tensor, share: float) -> list[int]:
    """Which of the columns go: those of the lowest scores."""
    width = len(columns)
    kept = width - round(width * share)
    if width >= _WIDE and width % _STEP == 0:
        kept = round(kept / _STEP) * _STEP
    order = scores[list(columns)].argsort()[: width - max(kept, 1)].tolist()
    return sorted(columns[k] for k in order)


# -- magnitude ----------------------------------------------------------------------------------------------------------


def _magnitude(
    model: nn.Module,
    sampler: Sampler,
    options: Prune,
    branches: Sequence[Branch],
    linears: Mapping[fx.Node, str],
    seed: int,
    progress: bool,
) -> tuple[nn.Module, set[str]]:
    """Weights of the branches' linear layers set to zero and kept there while the others are trained."""
    nncf = need_pruner(options)
    chosen = {linears[node] for branch in branches for node in branch.nodes if node in linears}
    if not chosen:
        raise ComposeError(f"prune: no branch of {type(model).__name__} has a linear layer; leave prune out")
    calls = record(model, sampler, options.finetune_steps, seed)
    weights = {f"{name}.weight" for name in chosen}
    others = [name for name, _ in model.named_parameters() if name not in weights]
    level = logging.getLogger("nncf").level
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        masked = nncf.prune(
            copy.deepcopy(model).eval(), mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=options.ratio,
            ignored_scope=nncf.IgnoredScope(names=others, validate=False),
            examples_inputs=dict(calls[0].inputs),
        )  # fmt: skip
        _repair(masked, calls, options, seed, progress)
        stripped = nncf.strip(masked, do_copy=False, strip_format=nncf.StripFormat.IN_PLACE)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ComposeError(f"prune: NNCF stopped: {type(error).__name__}: {reason}") from error
    finally:
        logging.getLogger("nncf").setLevel(level)
    clean = copy.deepcopy(model).eval()  # NNCF leaves its own forward in the module
    state = stripped.state_dict()
    clean.load_state_dict({name: state[name] for name in clean.state_dict()})
    return clean, chosen


def _repair(student: nn.Module, calls: Sequence[RecordedCall], options: Prune, seed: int, progress: bool) -> None:
    before, after = finetune(student, calls, options.finetune_steps, options.learning_rate, seed, progress)
    _log.info("pruned: relative error of one call %.2e, after fine-tuning %.2e", before, after)


def _linears(graph_module: fx.GraphModule, model: nn.Module) -> dict[fx.Node, str]:
    """The nodes that are linear layers of the model, with the layers' names."""
    owners = {id(layer.weight): name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    found: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        if op_name(node) != "aten::linear":
            continue
        weight = node.args[1]
        while isinstance(weight, fx.Node) and weight.op == "call_function" and len(weight.all_input_nodes) == 1:
            weight = weight.all_input_nodes[0]  # a change of dtype
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        value: Any = graph_module
        for part in str(weight.target).split("."):
            value = getattr(value, part)
        if id(value) in owners:
            found[node] = owners[id(value)]
    return found


#: See `kinds`.
STRUCTURED, MAGNITUDE = Method(need_pruner, _structured), Method(need_pruner, _magnitude)
