"""Calls an exported ONNX folder like the model it came from, carrying its state from call to call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch.utils import dlpack

from ..errors import ExportError, MissingExtraError
from ..files import kind_of, path_of
from ..gate import timestep_per_sample
from ..report import Summary, Usage
from .card import FileBranch, Output, fresh_state, need_ports, need_sizes, read_card, tensors_of
from .onnx import MODEL_FILE
from .trace import DECISIONS

try:
    import onnxruntime as ort
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("onnxruntime", "onnx", "running an ONNX folder") from _error


class OnnxRunner:
    """An ONNX Runtime session with the state of one image (or one batch of images).

    Called with the original's keyword arguments (tensors or arrays), it returns an object with the original's outputs as
    attributes and by position. Caches stay in ONNX Runtime's own memory: each call's outputs are bound as the next call's inputs.
    With telemetry in the file, `summary()` tells what was reused.

    Args:
        directory: what `lazycompress.export(..., format="onnx")` wrote.
        session: ONNX Runtime session options; left out, the defaults.
        card: what `lazycompress.json` says; left out, it is read.

    Raises:
        ExportError: the folder holds no ONNX export.
    """

    def __init__(
        self,
        directory: str | Path,
        session: ort.SessionOptions | None = None,
        *,
        card: dict[str, Any] | None = None,
    ) -> None:
        path = path_of(directory) / MODEL_FILE
        if kind_of(path) != "file":
            raise ExportError(f"{directory} holds no {MODEL_FILE}; lazycompress.export(..., format='onnx') writes it")
        card = card or read_card(directory)
        if "branches" not in card:
            raise ExportError(f"{directory} is a pipeline: its denoisers' files are in {', '.join(card['denoisers'])}")
        if session is None:
            session = ort.SessionOptions()
            session.log_severity_level = 3  # it warns of every constant that it folds
        try:
            self.session = ort.InferenceSession(str(path), session, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's classes derive from Exception alone
            said = " ".join(str(error).split())[-300:]
            raise ExportError(f"the file in {directory} does not load: {said}") from error
        need_ports(directory, [port.name for port in self.session.get_inputs()], card)
        self._state = card["state"]
        past = {entry["name"] for entry in self._state}
        self._inputs = [i.name for i in self.session.get_inputs() if i.name not in past]
        self._sizes = {
            i.name: [size if isinstance(size, int) else None for size in i.shape] for i in self.session.get_inputs()
        }
        self._known = {i.name for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]
        self._latents: str = card["latents"]
        self._timestep: str = card["timestep"]
        self._past: dict[str, Any] = {}
        self._batch = -1
        self._branches = [FileBranch(**branch) for branch in card["branches"]]
        self.usage = Usage([branch.macs for branch in self._branches])

    def __call__(self, **inputs: Any) -> Any:
        inputs = tensors_of(inputs, self._inputs)
        need_sizes(inputs, self._sizes)
        batch = inputs[self._latents].shape[0]
        if batch != self._batch:
            self._past, self._batch = self._fresh(batch), batch
        binding = self.session.io_binding()
        for name in self._inputs:
            binding.bind_ortvalue_input(
                name, ort.OrtValue.ortvalue_from_numpy(inputs[name].detach().contiguous().numpy())
            )
        for name, value in self._past.items():
            if name in self._known:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        results = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._past = {name: results.pop(name.replace("past", "present", 1)) for name in self._past}
        found = {name: dlpack.from_dlpack(value._ortvalue.to_dlpack()) for name, value in results.items()}
        decisions = found.pop(DECISIONS, None)
        if decisions is not None:
            self.usage.add(timestep_per_sample(inputs[self._timestep], inputs[self._latents]), decisions)
        return Output(found)

    def twin(self) -> OnnxRunner:
        """Another state of the same session, with the same statistics: for calls that take turns."""
        other = copy.copy(self)
        other._past, other._batch = {}, -1
        return other

    def reset(self) -> None:
        """Forget the image that was sampled last, and the statistics."""
        self._batch = -1
        self.usage.clear()

    def summary(self) -> Summary:
        """What was reused since the last reset; all zero for a file without telemetry."""
        return self.usage.summary(self._branches)

    def _fresh(self, batch: int) -> dict[str, Any]:
        return {e["name"]: ort.OrtValue.ortvalue_from_numpy(fresh_state(e, batch)) for e in self._state}
