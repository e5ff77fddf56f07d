"""What every export format starts from: the lowered graph as an `ExportedProgram`, with branches as `torch.cond`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from ..errors import ExportError
from ..graph.insert import LazyGraph, StateSpec
from ..graph.lower import lazy_branches
from ..runtime import LazyModel
from .card import Granularity
from .portable import make_portable
from .real_pairs import to_real_pairs

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TracedModel:
    """A traced lazy model and the names of its inputs and outputs, in order.

    Inputs: the model's, then the past state. Outputs: the model's, then the present state, then the decisions. `one_size` holds
    inputs of the batch size that the model was captured with, where the program takes no other sizes but of the batch.
    """

    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]
    state: list[StateSpec]
    shapes: list[list[int]]
    examples: list[Tensor]
    one_size: list[Tensor] | None = None

    @property
    def past(self) -> list[str]:
        return [spec.name for spec in self.state]

    @property
    def present(self) -> list[str]:
        return [spec.name.replace("past", "present", 1) for spec in self.state]


DECISIONS = "lazy_decisions"

#: Tokens, height and so on of the past that a model is traced with.
_PAST = 3


def is_weight(name: str, size: int) -> bool:
    """Whether a float32 constant may be stored with fewer bits: large, and no part of a gate."""
    return size >= 1024 and "lazy_gates" not in name


class _Exportable(nn.Module):
    """The lowered graph with its threshold fixed, taking tensors in a flat list."""

    def __init__(self, lowered: LazyGraph, threshold: float, one_batch: bool) -> None:
        super().__init__()
        self.latents = lowered.latents
        self.rows = [spec.scale for spec in lowered.state] if one_batch else []
        self.graph_module: fx.GraphModule = lowered.graph_module
        self.count = len(lowered.leaves)
        self.register_buffer("threshold", torch.tensor(threshold))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        batch = tensors[self.latents].shape[0]
        for past, rows in zip(tensors[self.count :], self.rows, strict=False):
            torch._check(past.shape[0] == batch * rows)
        results = self.graph_module(*tensors[: self.count], self.threshold, *tensors[self.count :])
        given = [*results[:-1], results[-1].to(torch.float32)]
        # OpenVINO's converter fails where a value is given twice, as a forecast output is; it sees through a copy.
        return tuple(value * 1 if any(value is g for g in given[:k]) else value for k, value in enumerate(given))


@contextmanager
def granularity(lowered: LazyGraph, value: Granularity, sizes: bool = True, gather: bool = True) -> Iterator[None]:
    """Within the block a lowered graph decides for each sample, or once for the whole batch; exported, for any size or not.

    Without `gather` a branch runs on the whole batch where some samples compute, and the others keep what they had.
    """
    before = [(branch, branch.gather) for branch in lazy_branches(lowered)]
    for branch, gathers in before:
        branch.whole_batch, branch.any_size, branch.gather = value == "batch", sizes, gathers and gather
    try:
        yield
    finally:
        for branch, gathers in before:
            branch.whole_batch, branch.any_size, branch.gather = False, True, gathers


@dataclass(frozen=True)
class Form:
    """What a file can do.

    Attributes:
        sizes: runs all sizes that the capture can run; else those of the example.
        by_branch: each branch runs by itself; else, where the gates decide all alike, the network as one.
    """

    sizes: bool = True
    by_branch: bool = False


def widest(lazy: LazyModel, name: str, write: Callable[[Form], _Result]) -> _Result:
    """What `write` gives for the first form of a file that it can write, the best one first; a warning says what is missing.

    Raises:
        ExportError: as `write` raises it for the last of them.
    """
    program = lazy.program(lazy.example)
    one = program.runs(lazy.gates) is not program.lowered
    forms = [
        Form(sizes, by_branch)
        for sizes in ([True, False] if program.captured.sizes.is_dynamic else [False])
        for by_branch in ([False, True] if one else [True])
    ]
    first: ExportError | None = None
    for form in forms:
        try:
            result = write(form)
            break
        except ExportError as error:
            if form is forms[-1]:
                raise
            first = first or error
    missing = [
        *(["for the sizes of its example only"] if form.sizes != forms[0].sizes else []),
        *(["with an If for each branch, not one"] if form.by_branch != forms[0].by_branch else []),
    ]
    if missing:
        _log.warning("lazycompress exports %s %s: %s", name, " and ".join(missing), first)
    return result


def trace(lazy: LazyModel, one_batch: bool = False, decide: Granularity = "sample", form: Form = Form()) -> TracedModel:
    """Trace a lazy model for the call it was captured with, for any batch size.

    Args:
        lazy: the model.
        one_batch: the past state always has the batch size of the inputs (a caller manages it); else it may have another
            one, of which nothing is kept (the file manages it).
        decide: for each sample, or once for the whole batch: a branch then runs for everyone if any sample needs it.
        form: what the traced model can do.

    Raises:
        ExportError: `torch.export` does not take the lowered graph.
    """
    program = lazy.program(lazy.example)
    lowered = program.lowered if form.by_branch else program.runs(lazy.gates)
    sizes = form.sizes
    call = lazy.example
    examples = [
        torch.cat([t, t]) if leaf.batched and call.batch == 1 else t
        for t, leaf in zip(call.tensors, call.leaves, strict=True)
    ]
    batch = examples[call.latents].shape[0]
    state = lowered.state if sizes else [spec.fixed for spec in lowered.state]
    past = [spec.fresh(batch if one_batch else batch + 1, call.tensors[0].device) for spec in state]
    # A past of other sizes than the call's: what its sizes are must not be taken for granted.
    past = [
        value.expand([_PAST if size == -2 else -1 for size in spec.shape])
        for value, spec in zip(past, state, strict=True)
    ]
    known = program.captured.sizes.dynamic if sizes else [[] for _ in call.leaves]
    free = [
        [*dims, *([] if leaf.batch_dim is None else [leaf.batch_dim])]
        for dims, leaf in zip(known, call.leaves, strict=True)
    ] + [[d for d, size in enumerate(spec.shape) if size < 0] for spec in state]
    dynamic = [dict.fromkeys(dims, Dim.AUTO) or None for dims in free]
    exportable = _Exportable(lowered, float(lazy.gates.threshold), one_batch)

    def exported_with(gather: bool) -> ExportedProgram:
        with torch.no_grad(), granularity(lowered, decide, sizes, gather), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(exportable, (*examples, *past), dynamic_shapes=(tuple(dynamic),), strict=False)

    try:
        try:
            exported = exported_with(gather=True)
        except Exception as error:
            if not _asks_how_many(error):
                raise
            exported = exported_with(gather=False)
            _log.warning(
                "%s computes all samples of a batch where some have to: %s",
                type(lazy.model).__name__,
                _first_line(error),
            )
    except Exception as error:
        raise ExportError(f"torch.export does not take the lowered graph: {_first_line(error)}") from error
    make_portable(exported)
    to_real_pairs(exported)
    shapes = [
        [-1 if d in dims else size for d, size in enumerate(t.shape)]
        for t, dims in zip([*examples, *past], free, strict=True)
    ]
    names = [leaf.name for leaf in call.leaves]
    present = [spec.name.replace("past", "present", 1) for spec in lowered.state]
    outputs = _output_names(program.captured.output_spec, lowered.outputs)
    return TracedModel(
        exported, names + [spec.name for spec in lowered.state], [*outputs, *present, DECISIONS], state, shapes,
        [*examples, *past], None if sizes else [*call.tensors, *(spec.fresh(call.batch, past[0].device) for spec in state)],
    )  # fmt: skip


def _asks_how_many(error: BaseException | None) -> bool:
    """Whether a model's own code makes a difference between numbers of samples, which nobody knows where they are gathered."""
    while error is not None:
        if isinstance(error, GuardOnDataDependentSymNode):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _output_names(spec: pytree.TreeSpec, count: int) -> list[str]:
    """`sample` and the like where the model returns them by name, else `output_0`, `output_1`, ..."""
    output = pytree.tree_unflatten(list(range(count)), spec)
    if isinstance(output, Mapping) and list(output.values()) == list(range(count)):
        return [str(key) for key in output]
    return [f"output_{i}" for i in range(count)]
