"""Stage 1, capture: an `nn.Module` and the inputs of one real call become an ATen FX graph.

The graph takes the call's tensors as a flat list and gives the output's tensors as a flat list; everything that is not
a tensor is fixed in the capture and part of the call's `CallKey`. The batch dimension is always dynamic; whether height, width,
frames and numbers of tokens can be is for `torch.export` to find out, see `sizes`.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..models import evaluating
from .call import Call, Leaf
from .hostreads import HostReads, Recorder, Replayer, split_reads
from .opaque import Opaque, untraceable
from .ops import has_data_size, is_dynamic, macs_of, shape_of
from .sizes import Sizes
from .tidy import has_mutation, tidy
from .untouched import untouched

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """One way to export.

    The batch dynamic or that of the call, the sizes too, Python bytecode traced or not, host reads fixed or not, some
    modules not traced.
    """

    dynamic: bool = True
    sizes: bool = False
    strict: bool = False
    reads: bool = False
    opaque: tuple[str, ...] = ()


@dataclass
class Capture:
    """A dense FX graph of one call: placeholders in the order of `leaves`, one flat tuple of tensors as output.

    Attributes:
        sizes: which sizes of the inputs the graph can run.
        batch: the batch size of the examples, which the hints of dynamic sizes refer to.
        fixed_batch: the only batch size that the graph can run, or None if it is dynamic.
        reads: values that the model reads on the host and that were fixed, or None.
        way: how the model was exported.
    """

    graph_module: fx.GraphModule
    leaves: list[Leaf]
    latents: int
    sizes: Sizes
    batch: int
    output_spec: pytree.TreeSpec
    notes: list[str] = field(default_factory=list)
    fixed_batch: int | None = None
    reads: HostReads | None = None
    way: Way = Way()

    def serves(self, call: Call) -> bool:
        """Whether this capture can run a call of the same key: its batch, its sizes, and the values that were fixed."""
        if self.fixed_batch not in (None, call.batch) or not self.sizes.serve(call.shapes, call.batch):
            return False
        return self.reads is None or self.reads.hold(call.tensors)

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of one call per sample, branches and all else."""
        return sum(macs_of(node) for node in self.graph_module.graph.nodes) // self.batch

    @property
    def output_sizes(self) -> list[tuple[int, ...]]:
        """The sizes of every output tensor, without the batch."""
        output = next(node for node in self.graph_module.graph.nodes if node.op == "output")
        shapes = [shape_of(value) for value in output.args[0] if isinstance(value, fx.Node)]
        return [tuple(shape[1:]) for shape in shapes if shape]


def capture(model: nn.Module, call: Call, sizes: bool = True, earlier: Way | None = None) -> Capture:
    """Export `model` for calls like `call`, with a dynamic batch and dynamic sizes where the model allows them.

    The model is exported as it is (shared weights, not copied) and left unchanged. The ways of `torch.export` are tried
    from the most general to the most special: without tracing Python bytecode (the more tolerant way), any sizes and then
    those of `call`; then with it; with the values that the model reads on the host fixed; with the batch of `call`; without
    the modules that are in the way.

    Args:
        model: the dense model.
        call: one of its calls.
        sizes: whether to try with dynamic sizes; the batch is dynamic anyway.
        earlier: the way of an earlier capture of the same model, tried first: all others before it have failed.

    Raises:
        CaptureError: names the operation and the source line of the model that `torch.export` stopped at.
    """
    failures: list[Exception] = []
    unsettled: Capture | None = None
    known = [
        *([] if earlier is None else [earlier]),
        Way(sizes=True),
        Way(),
        Way(strict=True),
        Way(reads=True),
        Way(dynamic=False),
        Way(dynamic=False, reads=True),
    ]
    ways = [way for way in dict.fromkeys(known) if sizes or not way.sizes]
    while ways:
        way = ways.pop(0)
        if way.dynamic and any(isinstance(failure, _BatchIsFixedError) for failure in failures):
            continue
        if unsettled is not None and not way.reads:
            continue
        try:
            with untouched(model), evaluating(model), _alone(model):
                captured = _export(model, call, way, warm=bool(failures) or way == earlier)
        except Exception as error:  # torch.export raises errors of many classes
            if way.sizes and not isinstance(error, _BatchIsFixedError):
                continue  # what stops it with fixed sizes too says more
            failures.append(error)
            if not ways and unsettled is None:
                ways = _opaque_ways(model, failures, way)
            continue
        if way.opaque and failures:  # it was said when an earlier capture came this way
            _log.warning(
                "lazycompress runs %s of %s untraced, in PyTorch only: %s",
                ", ".join(way.opaque), type(model).__name__, _explain(model, _telling(failures)),
            )  # fmt: skip
        if way.reads or not any(has_data_size(node) for node in captured.graph_module.graph.nodes):
            return captured
        # Sizes that only the data has: better fixed, if they come from the inputs (the length of a prompt).
        unsettled = captured
    if unsettled is not None:
        return unsettled
    raise CaptureError(_explain(model, _telling(failures)))


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """The model without what stands around its calls: an engine that skips some, or a compiler."""
    around: dict[str, Any] = {
        name: model.__dict__.pop(name) for name in ("_call_impl", "_compiled_call_impl") if name in model.__dict__
    }
    try:
        yield
    finally:
        model.__dict__.update(around)


def _telling(failures: Sequence[Exception]) -> Exception:
    """The failure that says most about the model: the first one of `torch.export` itself."""
    return next((f for f in failures if not isinstance(f, _BatchIsFixedError)), failures[0])


def _opaque_ways(model: nn.Module, failures: list[Exception], way: Way) -> list[Way]:
    """What is left to try: the modules that stopped `torch.export` left out of the trace."""
    found = [untraceable(model, failure) for failure in (failures if not way.opaque else failures[-1:])]
    paths = [path for path in next(filter(None, found), []) if path not in way.opaque]
    return [Way(opaque=(*way.opaque, *paths)), Way(dynamic=False, opaque=(*way.opaque, *paths))] if paths else []


class _BatchIsFixedError(Exception):
    """The model's own code allows only the batch size of the example."""


def _export(model: nn.Module, call: Call, way: Way, warm: bool) -> Capture:
    adapter = _Adapter(model, call)
    tensors = _spread_batch(call) if way.dynamic else list(call.tensors)
    dims = [[leaf.batch_dim] if leaf.batch_dim is not None else [] for leaf in call.leaves]
    if way.sizes:
        dims = [known + _size_dims(t, leaf) for known, t, leaf in zip(dims, tensors, call.leaves, strict=True)]
    shapes = ([dict.fromkeys(found, Dim.AUTO) or None for found in dims],) if way.dynamic else None
    if shapes is not None and not call.leaves[call.latents].batched:
        raise _BatchIsFixedError
    left_out = Opaque(list(way.opaque), "torch.export cannot take it")
    with torch.no_grad(), _quiet(), left_out.standing_in(model):
        if way.reads:
            recorder = Recorder()
            with recorder:
                adapter(*tensors)
            adapter.reads = recorder.reads
        elif warm:  # tables that the model makes in its first call are then real ones
            adapter(*tensors)
        program = torch.export.export(
            adapter,
            tuple(tensors),
            dynamic_shapes=None if shapes is None else tuple(map(tuple, shapes)),
            strict=way.strict,
        )
        if has_mutation(program.graph):
            program = program.run_decompositions({})
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in placeholders]
    taken = Sizes(values, [leaf.batch_dim if way.dynamic else None for leaf in call.leaves])
    if way.sizes:
        if any(has_data_size(node) for node in graph_module.graph.nodes):
            raise RuntimeError("sizes that only the data has")
        with _quiet():
            taken.settle()
    tidy(graph_module)
    left_out.put_back(graph_module, model)
    reads, notes = None, []
    if way.reads and adapter.sources:
        guard = split_reads(graph_module, adapter.sources)
        if guard is None:
            raise RuntimeError(
                "control flow depends on what the model computes (routing to experts, say), not on its inputs"
            )
        reads = HostReads(guard, [value.clone() for value in guard(*tensors)])
        notes.append(
            f"{adapter.sources} values that the model reads from its inputs are fixed: others are captured again"
        )
    if way.dynamic and not is_dynamic(values[call.latents].shape[0]):
        raise _BatchIsFixedError
    if way.opaque:
        notes.append(f"{len(way.opaque)} modules run untraced, in PyTorch only: {', '.join(way.opaque)}")
    if not way.dynamic:
        notes.append("the batch size is fixed: the model does not allow a dynamic one")
    batch = tensors[call.latents].shape[0] if way.dynamic else call.batch
    spec = adapter.output_spec(tensors)
    return Capture(
        graph_module,
        call.leaves,
        call.latents,
        taken,
        batch,
        spec,
        notes,
        None if way.dynamic else call.batch,
        reads,
        way,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `torch.export` from printing whole graphs and warnings: what it has to say is in its exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class _Adapter(nn.Module):
    """Takes a flat list of tensors and gives a flat list of tensors, whatever the model's signature is."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._call = call
        self._seen = _Seen()
        self.reads: list[Any] | None = None

    def forward(self, *tensors: Tensor) -> list[Any]:
        arguments = self._call.arguments(tensors)
        replayer = None if self.reads is None else Replayer(self.reads)
        with replayer or nullcontext():
            output = self.model(**arguments)
        flat, spec = pytree.tree_flatten(output)
        self._seen.output_spec = spec
        if replayer is not None:
            self._seen.sources = len(replayer.sources)
            flat += [source.clone() for source in replayer.sources]
        return flat

    @property
    def sources(self) -> int:
        """How many of the outputs are tensors that the model read on the host."""
        return self._seen.sources

    def output_spec(self, tensors: Sequence[Tensor]) -> pytree.TreeSpec:
        """The structure of the model's output; Dynamo traces without running `forward`, so it is run then."""
        if self._seen.output_spec is None:
            with torch.no_grad():
                self(*tensors)
        assert self._seen.output_spec is not None
        return self._seen.output_spec


class _Seen:
    """What the traced forward leaves behind; opaque to torch.export, which restores a module's own attributes."""

    output_spec: pytree.TreeSpec | None = None
    sources: int = 0


def _spread_batch(call: Call) -> list[Tensor]:
    """Example tensors whose batch is a size that `torch.export` does not specialise on (not 0 or 1)."""
    if call.batch > 1:
        return list(call.tensors)
    return [torch.cat([t, t]) if leaf.batched else t for t, leaf in zip(call.tensors, call.leaves, strict=True)]


def _size_dims(tensor: Tensor, leaf: Leaf) -> list[int]:
    """Dimensions that may hold height, width, frames or a number of tokens; channels are told by the model's own weights.

    The last dimension of tokens, position ids and tables of positions holds channels.
    """
    rank, last = tensor.dim(), tensor.dim() - 1
    if tensor.is_floating_point():
        taken = rank >= 4 or (rank == 2 and leaf.batched)  # maps, masks
    else:
        taken = rank == 1 or tensor.shape[-1] > 4
    return [d for d, n in enumerate(tensor.shape) if d != leaf.batch_dim and n > 1 and (d != last or taken)]


def _explain(model: nn.Module, error: Exception) -> str:
    """One line: what stopped `torch.export`, at which line of the model's source."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, _Adapter) and f"torch{'/'}" not in filename:
            where = f" in {type(owner).__name__} at {filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return (
        f"torch.export cannot capture {type(model).__name__}{where}: {reason[:300]}; "
        f"the model was left as it is (make that line traceable, or pass other example inputs)"
    )
