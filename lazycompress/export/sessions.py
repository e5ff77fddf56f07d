"""Files that are loaded, dense ones and wrapped ones, called alike with arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InputError, MissingExtraError

if TYPE_CHECKING:
    import openvino as ov

Arrays = Mapping[str, npt.NDArray[Any]]


class Session(Protocol):
    """A file that is loaded. What a wrapped one keeps, it keeps."""

    def __call__(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        """The outputs, in their order."""
        ...

    def clock(self) -> npt.NDArray[Any]:
        """Of a wrapped file: its clock after the last call, see `clock.Columns`."""
        ...


class OpenVINOSession:
    """A request of a file for OpenVINO on the CPU, in float32."""

    def __init__(self, path: Path) -> None:
        try:
            import openvino as ov
        except ImportError as error:  # pragma: no cover - exercised by the packaging tests
            raise MissingExtraError("openvino", "openvino", "running an OpenVINO model") from error

        model = read(path)
        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        try:
            self._request = ov.Core().compile_model(model, "CPU", exact).create_infer_request()
        except RuntimeError as error:
            raise InputError(f"{path} does not load: {' '.join(str(error).split())[-300:]}") from None

    def __call__(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        return [value.copy() for value in self._request.infer(dict(inputs)).values()]

    def clock(self) -> npt.NDArray[Any]:
        states = {state.name.rpartition(".")[2]: state for state in self._request.query_state()}
        found: npt.NDArray[Any] = states["clock"].state.data
        return found


class OnnxSession:
    """A session of ONNX Runtime on the CPU; what a wrapped file gives as `present_*` it is handed as `past_*`."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:  # pragma: no cover - exercised by the packaging tests
            raise MissingExtraError("onnxruntime", "onnx", "running an ONNX model") from error
        options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it has error classes of its own
            raise InputError(f"{path} does not load: {' '.join(str(error).split())[-300:]}") from None
        self._outputs = [info.name for info in self._session.get_outputs()]
        # Zeros are of no image. Inputs that have them as a default are not among the session's.
        self._past: dict[str, npt.NDArray[Any]] = {
            info.name: np.zeros([size if isinstance(size, int) else 1 for size in info.shape], np.float32)
            for info in self._session.get_inputs()
            if _is_state(info.name.replace("past_", "present_", 1))
        }

    def __call__(self, inputs: Arrays) -> list[npt.NDArray[Any]]:
        found = dict(zip(self._outputs, self._session.run(None, dict(inputs) | self._past), strict=True))
        self._past = {name.replace("present_", "past_", 1): found.pop(name) for name in list(found) if _is_state(name)}
        return list(found.values())

    def clock(self) -> npt.NDArray[Any]:
        return self._past["past_clock"]


def read(path: Path) -> ov.Model:
    """A model from its XML.

    Raises:
        InputError: OpenVINO cannot read it.
    """
    import openvino as ov

    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot read {path}: {' '.join(str(error).split())[-300:]}") from None


def open_session(path: Path) -> Session:
    """A file, loaded.

    Raises:
        InputError: it is of another format, or does not load.
        MissingExtraError: its runtime is not installed.
    """
    kinds: dict[str, type[OpenVINOSession | OnnxSession]] = {".xml": OpenVINOSession, ".onnx": OnnxSession}
    if path.suffix not in kinds:
        raise InputError(f"{path} is neither an OpenVINO IR (.xml) nor an ONNX model (.onnx)")
    return kinds[path.suffix](path)


def _is_state(name: str) -> bool:
    return name in ("present_clock", "present_latents") or name.startswith("present_output_")


def computed_by(session: Session, widths: Mapping[str, int]) -> float:
    """How many calls of the image of the last call a wrapped file computed.

    Args:
        session: of the file.
        widths: of the clock's columns, by name.
    """
    clock = session.clock()[0]
    columns = dict(zip(widths, np.cumsum([0, *widths.values()])[:-1].tolist(), strict=True))
    used = np.flatnonzero(clock[:, columns["computed"]] > 0)
    return float(clock[used[clock[used, columns["age"]].argmin()], columns["computed"]]) if len(used) else 0.0


__all__ = ["Arrays", "OnnxSession", "OpenVINOSession", "Session", "computed_by", "open_session", "read"]
