"""Calls an exported OpenVINO folder like the model it came from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError, MissingExtraError
from ..files import kind_of, path_of
from ..gate import timestep_per_sample
from ..report import Summary, Usage
from .card import FileBranch, Output, fresh_state, need_ports, need_sizes, read_card, tensors_of
from .openvino import MODEL_FILE
from .trace import DECISIONS

try:
    import openvino as ov
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("openvino", "openvino", "running an OpenVINO folder") from _error


class OpenVINORunner:
    """One infer request of an exported model, with its own state.

    Called with the original's keyword arguments (tensors or arrays), it returns an object with the original's outputs as
    attributes; the first one is also at index 0. With telemetry in the file, `summary()` tells what was reused.

    Args:
        directory: what `lazycompress.export` wrote.
        device: OpenVINO device.
        config: OpenVINO properties; unless it says otherwise the precision is float32, and activations are not quantized
            beside compressed weights (faster with `{"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}`, less exact).
        card: what `lazycompress.json` says; left out, it is read.

    Raises:
        ExportError: the folder holds no model that OpenVINO loads.
    """

    def __init__(
        self,
        directory: str | Path,
        device: str = "CPU",
        config: dict[str, Any] | None = None,
        *,
        card: dict[str, Any] | None = None,
    ) -> None:
        path = path_of(directory) / MODEL_FILE
        if kind_of(path) != "file":
            raise ExportError(f"{directory} holds no {MODEL_FILE}; lazycompress.export writes it")
        # Some plugins round activations to 8 bits beside compressed weights, if they are not told otherwise.
        exact = {"INFERENCE_PRECISION_HINT": "f32"} | (
            {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} if device == "CPU" else {}
        )
        properties = exact | (config or {})
        card = card or read_card(directory)
        if "branches" not in card:
            raise ExportError(f"{directory} is a pipeline: its denoisers' files are in {', '.join(card['denoisers'])}")
        try:
            self.compiled = ov.Core().compile_model(path, device, properties)
        except RuntimeError as error:
            said = " ".join(str(error).split())[-300:]
            raise ExportError(f"the file in {directory} does not load: {said}") from error
        self.request = self.compiled.create_infer_request()
        self._timestep: str = card["timestep"]
        #: Caches that the file leaves to its caller; none where they are state.
        self._state: list[dict[str, Any]] = [] if card["stateful"] else card["state"]
        known = {name for port in self.compiled.inputs for name in port.get_names()}
        need_ports(directory, known, card)
        self._sizes = {
            name: [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
            for port in self.compiled.inputs
            for name in port.get_names()
        }
        self._state = [entry for entry in self._state if entry["name"] in known]
        self._past: dict[str, Any] = {}
        self._batch = -1
        self._latents: str = card["latents"]
        self._inputs = [name for name in card["inputs"] if name in known]
        found = {name for port in self.compiled.outputs for name in port.get_names()}
        self._outputs = [name for name in [*card["outputs"], DECISIONS] if name in found]
        self._branches = [FileBranch(**branch) for branch in card["branches"]]
        self.usage = Usage([branch.macs for branch in self._branches])

    def __call__(self, **inputs: Any) -> Any:
        inputs = tensors_of(inputs, self._inputs)
        need_sizes(inputs, self._sizes)
        feed: dict[str, Any] = {name: inputs[name].detach().contiguous().numpy() for name in self._inputs}
        batch = inputs[self._latents].shape[0]
        if batch != self._batch:
            self._past, self._batch = {e["name"]: fresh_state(e, batch) for e in self._state}, batch
        results = self.request.infer(feed | self._past)
        self._past = {name: results[name.replace("past", "present", 1)].copy() for name in self._past}
        found = {name: torch.from_numpy(results[name].copy()) for name in self._outputs}
        decisions = found.pop(DECISIONS, None)
        if decisions is not None:
            self.usage.add(timestep_per_sample(inputs[self._timestep], inputs[self._latents]), decisions)
        return Output(found)

    def twin(self) -> OpenVINORunner:
        """Another state of the same compiled model, with the same statistics: for calls that take turns."""
        other = copy.copy(self)
        other.request = self.compiled.create_infer_request()
        other._past, other._batch = {}, -1
        return other

    def reset(self) -> None:
        """Forget the image that was sampled last, and the statistics."""
        self.request.reset_state()
        self._batch = -1
        self.usage.clear()

    def summary(self) -> Summary:
        """What was reused since the last reset; all zero for a file without telemetry."""
        return self.usage.summary(self._branches)
