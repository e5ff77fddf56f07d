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
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from ..errors import ComposeError, MissingExtraError
from ..graph.branch import Branch
from ..graph.call import call_of
from ..graph.capture import capture
from ..graph.locate import locate_branches
from ..graph.ops import is_heavy
from ..recipe import Prune
from ..sampling import Sampler, first_call
from .distill import RecordedCall, finetune, input_energies, own_noise, record
from .heads import find_attention, prune_heads
from .hidden import find_hidden, narrow
from .linears import linear_nodes
from .pruners import Method, pruner_of
from .quantize import ComposeReport

_log = logging.getLogger(__name__)


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
    linears = linear_nodes(captured.graph_module, model)
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
        changed |= narrow(student, hidden, energies, options.mlp_width, set(linears.values()), calls[0])
    _repair(student, calls, options, seed, progress)
    return student, changed


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


#: See `kinds`.
STRUCTURED, MAGNITUDE = Method(need_pruner, _structured), Method(need_pruner, _magnitude)
