"""Stage 1, capture: an `nn.Module` and the inputs of one real call become an ATen FX graph.

The graph takes the call's tensors as a flat list and gives the output's tensors as a flat list; everything that is not
a tensor is fixed in the capture and part of its `CallKey`. The batch dimension is always dynamic; whether other
dimensions can be is for `torch.export` to find out.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..errors import CaptureError, InputError
from .hostreads import HostReads, Recorder, Replayer, split_reads
from .ops import is_dynamic, op_name, remove_dead, shape_of

#: Keyword arguments of one forward call, or a tuple of positional ones.
ExampleInputs = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Leaf:
    """One tensor among the inputs: its name (the argument's, with a path if nested), and whether dim 0 is the batch."""

    name: str
    batched: bool


@dataclass(frozen=True)
class CallKey:
    """What makes two calls run the same capture: structure, constants, dtypes, device, and all sizes but the batch."""

    spec: str
    constants: str
    tensors: tuple[tuple[torch.dtype, str, tuple[int, ...]], ...]


@dataclass
class Call:
    """The arguments of one forward call, taken apart. `tensors` and `leaves` are in step."""

    tensors: list[Tensor]
    leaves: list[Leaf]
    others: dict[int, Any]
    spec: pytree.TreeSpec
    batch: int
    latents: int

    @property
    def key(self) -> CallKey:
        tensors = tuple(
            (t.dtype, str(t.device), (-1, *t.shape[1:]) if leaf.batched else tuple(t.shape))
            for t, leaf in zip(self.tensors, self.leaves, strict=True)
        )
        return CallKey(str(self.spec), repr(sorted(self.others.items())), tensors)

    def arguments(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """The keyword arguments again, with other tensors in the places of the leaves."""
        flat: list[Any] = list(tensors)
        for position, value in sorted(self.others.items()):
            flat.insert(position, value)
        arguments: dict[str, Any] = pytree.tree_unflatten(flat, self.spec)
        return arguments


@dataclass
class Capture:
    """A dense FX graph of one call: placeholders in the order of `leaves`, one flat tuple of tensors as output.

    Attributes:
        batch: the batch size of the examples, which the hints of dynamic sizes refer to.
        fixed_batch: the only batch size that the graph can run, or None if it is dynamic.
        reads: values that the model reads on the host and that were fixed, or None.
    """

    graph_module: fx.GraphModule
    leaves: list[Leaf]
    latents: int
    batch: int
    output_spec: pytree.TreeSpec
    notes: list[str] = field(default_factory=list)
    fixed_batch: int | None = None
    reads: HostReads | None = None

    def serves(self, call: Call) -> bool:
        """Whether this capture can run a call of the same key: its batch, and the values that were fixed."""
        if self.fixed_batch not in (None, call.batch):
            return False
        return self.reads is None or self.reads.hold(call.tensors)

    @property
    def output_sizes(self) -> list[tuple[int, ...]]:
        """The sizes of every output tensor, without the batch."""
        output = next(node for node in self.graph_module.graph.nodes if node.op == "output")
        shapes = [shape_of(value) for value in output.args[0] if isinstance(value, fx.Node)]
        return [tuple(shape[1:]) for shape in shapes if shape]


def take_apart(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Flatten the arguments of `model.forward(*args, **kwargs)`.

    Raises:
        InputError: the arguments do not fit the signature, or hold no tensor of rank 3 or more.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit {type(model).__name__}.forward: {error}; its parameters are "
            f"{', '.join(signature.parameters)}"
        ) from None
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL and value:
            raise InputError(f"{type(model).__name__}.forward takes *{name}: pass its inputs by keyword")
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        elif kind is not inspect.Parameter.VAR_POSITIONAL and value is not None:
            arguments[name] = value
    flat, spec = pytree.tree_flatten_with_path(arguments)
    tensors = [value for _, value in flat if isinstance(value, Tensor)]
    names = [_path_name(path) for path, value in flat if isinstance(value, Tensor)]
    others = {i: value for i, (_, value) in enumerate(flat) if not isinstance(value, Tensor)}
    streams = [i for i, t in enumerate(tensors) if t.dim() >= 3 and t.is_floating_point()]
    if not streams:
        given = ", ".join(f"{n}{list(t.shape)}" for n, t in zip(names, tensors, strict=True)) or "no tensor at all"
        raise InputError(
            f"{type(model).__name__} was called without a floating-point tensor of rank 3 or more (latents or tokens); "
            f"there was {given}"
        )
    latents = streams[0]
    batch = tensors[latents].shape[0]
    leaves = [
        Leaf(
            name, t.dim() > 0 and t.shape[0] == batch and (t.dim() == 1 or i == latents or _may_be_batched(t, tensors))
        )
        for i, (name, t) in enumerate(zip(names, tensors, strict=True))
    ]
    return Call(tensors, leaves, others, spec, batch, latents)


def call_of(model: nn.Module, example_inputs: ExampleInputs) -> Call:
    """`take_apart` for inputs in either form."""
    if isinstance(example_inputs, Mapping):
        return take_apart(model, (), example_inputs)
    return take_apart(model, example_inputs, {})


def _may_be_batched(tensor: Tensor, tensors: Sequence[Tensor]) -> bool:
    # Position ids of rank 2 ([tokens, axes]) have the batch size as their first size only by accident.
    tokens = {size for t in tensors if t.dim() >= 3 for size in t.shape[1:-1]}
    return not (tensor.dim() == 2 and tensor.shape[0] in tokens and tensor.shape[1] <= 4)


def capture(model: nn.Module, call: Call) -> Capture:
    """Export `model` for calls like `call`, with a dynamic batch where the model allows one.

    The model is exported as it is (shared weights, not copied) and left unchanged. The ways of `torch.export` are tried
    from the most general to the most special: without tracing Python bytecode (the more tolerant way), then with it; with
    the values that the model reads on the host fixed; each with a dynamic batch, then with the batch of `call`.

    Raises:
        CaptureError: names the operation and the source line of the model that `torch.export` stopped at.
    """
    failures: list[Exception] = []
    for way in (
        _Way(),
        _Way(strict=True),
        _Way(dynamic=False),
        _Way(dynamic=False, reads=True),
    ):
        if failures and way.dynamic and any(isinstance(failure, _BatchIsFixedError) for failure in failures):
            continue
        try:
            return _export(model, call, way)
        except Exception as error:  # torch.export raises errors of many classes
            failures.append(error)
    raise CaptureError(
        _explain(model, next((f for f in failures if not isinstance(f, _BatchIsFixedError)), failures[0]))
    )


@dataclass(frozen=True)
class _Way:
    """One way to export: batch dynamic or that of the call, Python bytecode traced or not, host reads fixed or not."""

    dynamic: bool = True
    strict: bool = False
    reads: bool = False


class _BatchIsFixedError(Exception):
    """The model's own code allows only the batch size of the example."""


def _export(model: nn.Module, call: Call, way: _Way) -> Capture:
    adapter = _Adapter(model, call)
    tensors = _spread_batch(call) if way.dynamic else list(call.tensors)
    shapes = ([{0: Dim.AUTO} if leaf.batched else None for leaf in call.leaves],) if way.dynamic else None
    if shapes is not None and not call.leaves[call.latents].batched:
        raise _BatchIsFixedError
    with torch.no_grad(), _quiet():
        if way.reads:
            recorder = Recorder()
            with recorder:
                adapter(*tensors)
            adapter.reads = recorder.reads
        program = torch.export.export(
            adapter,
            tuple(tensors),
            dynamic_shapes=None if shapes is None else tuple(map(tuple, shapes)),
            strict=way.strict,
        )
        if _has_mutation(program.graph):
            program = program.run_decompositions({})
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    _tidy(graph_module)
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
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    sizes = [node.meta["val"].shape for node in placeholders]
    if way.dynamic and not is_dynamic(sizes[call.latents][0]):
        raise _BatchIsFixedError
    if not way.dynamic:
        notes.append("the batch size is fixed: the model does not allow a dynamic one")
    batch = tensors[call.latents].shape[0] if way.dynamic else call.batch
    spec = adapter.output_spec(tensors)
    return Capture(
        graph_module, call.leaves, call.latents, batch, spec, notes, None if way.dynamic else call.batch, reads
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


def _has_mutation(graph: fx.Graph) -> bool:
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in graph.nodes
        if node.op == "call_function"
    )


def _tidy(graph_module: fx.GraphModule) -> None:
    """Plain placeholders and one tuple as output; assertions about metadata and shapes removed."""
    graph = graph_module.graph
    for node in reversed(list(graph.nodes)):
        is_check = op_name(node) in ("aten::_assert_tensor_metadata", "aten::_assert_scalar") or (
            node.op == "call_module" and not node.users
        )
        if is_check:
            graph.erase_node(node)
    _sizes_from_placeholders(graph)
    graph.set_codegen(fx.graph.CodeGen())
    remove_dead(graph)
    graph_module.recompile()


def _sizes_from_placeholders(graph: fx.Graph) -> None:
    """Compute every dynamic size from the sizes of placeholders, so that no size ties a branch to what is around it."""
    symbols: dict[sympy.Symbol, fx.Node] = {}
    last = None
    for node in graph.nodes:
        if node.op == "placeholder":
            last = node
    if last is None:
        return
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if (
                isinstance(size, torch.SymInt)
                and isinstance(size.node.expr, sympy.Symbol)
                and size.node.expr not in symbols
            ):
                with graph.inserting_after(last):
                    known = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                    known.meta["val"] = size
                symbols[size.node.expr] = known
    known_nodes = set(symbols.values())
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or node in known_nodes or not isinstance(value, torch.SymInt):
            continue
        if value.node.expr.is_Integer:
            constant = int(value.node.expr)

            def put(used: fx.Node, node: fx.Node = node, constant: int = constant) -> Any:
                return constant if used is node else used

            for user in list(node.users):
                user.args = fx.map_arg(user.args, put)
                user.kwargs = fx.map_arg(user.kwargs, put)
            continue
        with graph.inserting_before(node):
            rebuilt = size_node(graph, value.node.expr, symbols)
        if rebuilt is not None:
            rebuilt.meta.setdefault("val", value)
            node.replace_all_uses_with(rebuilt)


def size_node(graph: fx.Graph, expression: sympy.Expr, symbols: Mapping[sympy.Symbol, fx.Node]) -> fx.Node | None:
    """Nodes that compute `expression` from the nodes of its symbols, or None if one is unknown or nothing is dynamic."""
    if not expression.free_symbols or any(symbol not in symbols for symbol in expression.free_symbols):
        return None
    environment = {symbol: fx.Proxy(symbols[symbol]) for symbol in expression.free_symbols}
    result = sympy_interp(PythonReferenceAnalysis, environment, expression)
    return result.node if isinstance(result, fx.Proxy) else None


def _path_name(path: Any) -> str:
    parts = []
    for entry in path:
        key = getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", None)))
        parts.append(str(key))
    return ".".join(parts)


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
