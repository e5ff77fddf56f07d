"""Stage 6, export to ExecuTorch: a `.pte` for phones and small devices, with real `If`, caches and clock as inputs and outputs.

ExecuTorch plans its memory ahead, so a file has one batch size and one size of everything: those of the example. It decides
for the batch as one. The kernels are those of the runtime itself: its delegates (XNNPACK and others) take no operation within
an `If`, since weights are operands there.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError, InputError, MissingExtraError
from ..files import kind_of, path_of
from ..gate import timestep_per_sample
from ..report import Summary, Usage
from .card import FileBranch, Output, Weights, fresh_state, need_sizes, read_card, tensors_of
from .trace import TracedModel

try:
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime, Verification
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("executorch", "executorch", "export to ExecuTorch") from _error

MODEL_FILE = "model.pte"

#: See `runtimes.Runtime`.
STATEFUL, ROUNDING, DECIDES = False, 1e-4, "batch"


def write_traced(
    traced: TracedModel, folder: Path, *, stateful: bool, telemetry: bool, weights: Weights, stages: Sequence[str]
) -> Mapping[str, Any]:
    """See `runtimes.Runtime`."""
    if weights != "f32" or stages:
        asked = "quantized branches" if stages else f"weights of {weights}"
        raise ExportError(
            f"the format executorch holds float32 alone, there are {asked}: use openvino or onnx for these"
        )
    (folder / MODEL_FILE).write_bytes(convert(traced, telemetry))
    return {}


def open_folder(folder: Path, card: Mapping[str, Any]) -> ExecuTorchRunner:
    """See `runtimes.Runtime`."""
    return ExecuTorchRunner(folder, card=dict(card))


class _Given(nn.Module):
    """A program with some of its outputs."""

    def __init__(self, program: nn.Module, outputs: int) -> None:
        super().__init__()
        self.program = program
        self.outputs = outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given: tuple[Tensor, ...] = self.program(*tensors)[: self.outputs]
        return given


def convert(traced: TracedModel, telemetry: bool = False) -> bytes:
    """Convert a traced lazy model, for the sizes of its example.

    Args:
        traced: the program and its names, traced with one batch size for inputs and state, and deciding for the whole batch.
        telemetry: keep the output `lazy_decisions`, float32 [branches, batch], 1 where a branch was reused.

    Raises:
        ExportError: ExecuTorch does not take the program.
    """
    graphs = [
        module.graph for module in traced.program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)
    ]
    if any(graph.find_nodes(op="call_function", target=torch.ops.aten.nonzero.default) for graph in graphs):
        raise ExportError("ExecuTorch decides for a batch as one, not for each sample: export with decide='batch'")
    if traced.one_size is None:
        raise ExportError("ExecuTorch plans memory for the sizes of the example alone")
    try:
        with torch.no_grad(), _quiet():
            given = _Given(traced.program.module(), len(traced.outputs) - (not telemetry))
            program = torch.export.export(given, tuple(t.contiguous() for t in traced.one_size), strict=False)
            _copy_results(program.graph_module)
            # Views stay operations: of an `If` whose body ends in one, the runtime would give other memory.
            config = ExecutorchBackendConfig(remove_view_copy=False)
            return bytes(to_edge_transform_and_lower(program).to_executorch(config).buffer)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"ExecuTorch does not take the lowered graph: {' '.join(lines)[:300]}") from error


def _copy_results(module: torch.fx.GraphModule) -> None:
    """Copy what each `If` gives, at once: the bodies of all share their memory, and the next one writes into it."""
    for branch in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
        for result in branch.users:  # they take one of its results each
            branch.append(result)
            with module.graph.inserting_after(result):
                copied = module.graph.call_function(torch.ops.aten.clone.default, (result,))
            copied.meta = dict(result.meta)
            result.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
    module.graph.lint()
    module.recompile()


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class ExecuTorchRunner:
    """An ExecuTorch method with the state of one image (or one batch of images).

    Called with the original's keyword arguments (tensors or arrays, of the sizes and dtypes of the export's example), it returns
    an object with the original's outputs as attributes and by position. With telemetry in the file, `summary()` tells what was
    reused.

    Args:
        directory: what `lazycompress.export(..., format="executorch")` wrote.
        card: what `lazycompress.json` says; left out, it is read.

    Raises:
        ExportError: the folder holds no ExecuTorch export, or it does not load.
    """

    def __init__(self, directory: str | Path, *, card: dict[str, Any] | None = None) -> None:
        path = path_of(directory) / MODEL_FILE
        if kind_of(path) != "file":
            raise ExportError(
                f"{directory} holds no {MODEL_FILE}; lazycompress.export(..., format='executorch') writes it"
            )
        card = card or read_card(directory)
        if "branches" not in card:
            raise ExportError(f"{directory} is a pipeline: its denoisers' files are in {', '.join(card['denoisers'])}")
        try:
            program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
            self._method = program.load_method("forward")
        except RuntimeError as error:
            raise ExportError(
                f"the file in {directory} does not load: {' '.join(str(error).split())[-300:]}"
            ) from error
        self._inputs: list[str] = card["inputs"]
        self._state: list[dict[str, Any]] = card["state"]
        self._outputs: list[str] = card["outputs"]
        self._timestep: str = card["timestep"]
        self._latents: str = card["latents"]
        self._telemetry: bool = card["telemetry"]
        metadata = self._method.metadata
        if metadata.num_inputs() != len(self._inputs) + len(self._state):
            raise ExportError(
                f"{directory}/lazycompress.json is of another file: that one has {metadata.num_inputs()} inputs"
            )
        self._sizes: dict[str, list[int | None]] = {
            name: list(metadata.input_tensor_meta(k).sizes()) for k, name in enumerate(self._inputs)
        }
        self._dtypes = {name: metadata.input_tensor_meta(k).dtype() for k, name in enumerate(self._inputs)}
        self._past: list[Tensor] = []
        self._branches = [FileBranch(**branch) for branch in card["branches"]]
        self.usage = Usage([branch.macs for branch in self._branches])

    def __call__(self, **inputs: Any) -> Output:
        tensors = tensors_of(inputs, self._inputs)
        need_sizes(tensors, self._sizes)
        for name, tensor in tensors.items():
            if _CODES.get(self._dtypes[name], tensor.dtype) != tensor.dtype:
                raise InputError(f"input {name}: the file takes {_CODES[self._dtypes[name]]}, this is {tensor.dtype}")
        given = [tensors[name].detach().contiguous() for name in self._inputs]
        past = self._past or [
            torch.from_numpy(fresh_state(entry, len(tensors[self._latents]))) for entry in self._state
        ]
        # What the method gives lies in its own memory, which the next call writes into.
        results = [value.clone() for value in self._method.execute([*given, *past])]
        named = len(self._outputs)
        self._past = results[named : named + len(self._state)]
        if self._telemetry:
            decisions = results[-1]
            self.usage.add(timestep_per_sample(tensors[self._timestep], tensors[self._latents]), decisions)
        return Output(zip(self._outputs, results, strict=False))

    def twin(self) -> ExecuTorchRunner:
        """Another state of the same method, with the same statistics: for calls that take turns."""
        other = copy.copy(self)
        other._past = []
        return other

    def reset(self) -> None:
        """Forget the image that was sampled last, and the statistics."""
        self._past = []
        self.usage.clear()

    def summary(self) -> Summary:
        """What was reused since the last reset; all zero for a file without telemetry."""
        return self.usage.summary(self._branches)


#: Dtypes by the runtime's number of them (`runtime/core/portable_type/scalar_type.h`).
_CODES = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32,
    7: torch.float64, 11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip
