"""Calls an exported OpenVINO folder like the model it came from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, InputError, MissingExtraError
from ..report import Summary, Usage
from .openvino import MODEL_FILE
from .trace import DECISIONS

try:
    import openvino as ov
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("openvino", "openvino", "running an OpenVINO folder") from _error


class OpenVINORunner:
    """One infer request of an exported model, with its own state.

    Called with the original's keyword arguments (tensors), it returns an object with the original's outputs as
    attributes; the first one is also at index 0. With telemetry in the file, `summary()` tells what was reused.

    Args:
        directory: what `lazycompress.export` wrote.
        device: OpenVINO device.
        config: OpenVINO properties; the precision is float32 unless it says otherwise.

    Raises:
        ExportError: the folder holds no model that OpenVINO loads.
    """

    def __init__(self, directory: str | Path, device: str = "CPU", config: dict[str, Any] | None = None) -> None:
        path = Path(directory) / MODEL_FILE
        if not path.is_file():
            raise ExportError(f"{directory} holds no {MODEL_FILE}; lazycompress.export writes it")
        properties = {"INFERENCE_PRECISION_HINT": "f32", **(config or {})}
        self.compiled = ov.Core().compile_model(path, device, properties)
        self.request = self.compiled.create_infer_request()
        self._inputs = {port.get_any_name(): port for port in self.compiled.inputs}
        self._outputs = [port.get_any_name() for port in self.compiled.outputs]
        self._branches = branches_of(Path(directory))
        self.usage = Usage([branch.macs for branch in self._branches])

    def __call__(self, **inputs: Any) -> Any:
        unknown = [name for name in self._inputs if not isinstance(inputs.get(name), Tensor)]
        if unknown:
            raise InputError(f"the exported model needs the tensors {', '.join(self._inputs)}; missing: {', '.join(unknown)}")
        feed = {name: inputs[name].detach().contiguous().numpy() for name in self._inputs}
        results = self.request.infer(feed)
        found = {name: torch.from_numpy(results[name].copy()) for name in self._outputs}
        decisions = found.pop(DECISIONS, None)
        timestep = next((n for n in self._inputs if n == self._timestep), None)
        if decisions is not None and timestep is not None:
            self.usage.add(inputs[timestep].float().reshape(-1).expand(decisions.shape[1]), decisions)
        return _Output(found)
