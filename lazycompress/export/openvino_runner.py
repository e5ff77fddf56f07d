"""Calls an exported OpenVINO folder like the model it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, InputError, MissingExtraError
from ..report import Summary, Usage
from .card import FileBranch, Output, read_card
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
        card = read_card(directory)
        self._timestep: str = card["timestep"]
        self._inputs = [port.get_any_name() for port in self.compiled.inputs]
        self._outputs = [port.get_any_name() for port in self.compiled.outputs]
        self._branches = [FileBranch(**branch) for branch in card["branches"]]
        self.usage = Usage([branch.macs for branch in self._branches])

    def __call__(self, **inputs: Any) -> Any:
        missing = [name for name in self._inputs if not isinstance(inputs.get(name), Tensor)]
        if missing:
            raise InputError(
                f"the exported model needs the tensors {', '.join(self._inputs)}; missing: {', '.join(missing)}"
            )
        results = self.request.infer({name: inputs[name].detach().contiguous().numpy() for name in self._inputs})
        found = {name: torch.from_numpy(results[name].copy()) for name in self._outputs}
        decisions = found.pop(DECISIONS, None)
        if decisions is not None:
            self.usage.add(inputs[self._timestep].float().reshape(-1).expand(decisions.shape[1]), decisions)
        return Output(found)

    def reset(self) -> None:
        """Forget the image that was sampled last, and the statistics."""
        self.request.reset_state()
        self.usage.clear()

    def summary(self) -> Summary:
        """What was reused since the last reset; all zero for a file without telemetry."""
        return self.usage.summary(self._branches)
