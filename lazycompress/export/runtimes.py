"""Formats of files, and what runs them: `openvino`, `onnx` and `executorch`, and those that other packages bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .. import kinds
from ..errors import ExportError
from ..report import Summary, Usage
from .card import Weights
from .trace import TracedModel


class Runner(Protocol):
    """One file that is loaded, with the state of one image, or of one batch of images."""

    usage: Usage

    def __call__(self, **inputs: Any) -> Mapping[str, Tensor]:
        """One call with the original's inputs by name: its outputs by name, in the order of the card's `outputs`.

        Decisions, where the file gives them (float32 [branches, batch]), are no output: they are told to `usage.add`.
        """
        ...

    def twin(self) -> Runner:
        """Another state of the same file: for calls that take turns."""
        ...

    def reset(self) -> None:
        """Forget the image that was sampled last, and the statistics."""
        ...

    def summary(self) -> Summary:
        """What was reused since the last reset."""
        ...


class Runtime(Protocol):
    """A format; a module, or an object.

    Attributes:
        STATEFUL: whether the file can keep caches by itself, from call to call; else they are inputs and outputs.
        ROUNDING: largest difference to torch that a file of float32 may have, as a share of the largest output.

    A format that cannot gather samples has a further one, `DECIDES = "batch"`: what decides where an export does not say.
    """

    @property
    def STATEFUL(self) -> bool: ...

    @property
    def ROUNDING(self) -> float: ...

    def write_traced(
        self,
        traced: TracedModel,
        folder: Path,
        *,
        stateful: bool,
        telemetry: bool,
        weights: Weights,
        stages: Sequence[str],
    ) -> Mapping[str, Any]:
        """Write the files of a traced lazy model into a folder that is there.

        Args:
            traced: the program, and the names of its inputs and outputs. Of the outputs the last one is the decisions.
            folder: new; whatever is written there is kept.
            stateful: never true where `STATEFUL` is not.
            telemetry: keep the decisions among the outputs, as `trace.DECISIONS`.
            weights: how float32 weights are stored.
            stages: what was done to the branches: "quantize", "weights".

        Returns:
            What else `lazycompress.json` says of it, see `card.FileCard`: `opset` and `ir`, or nothing.

        Raises:
            ExportError: it cannot be written so.
        """
        ...

    def open_folder(self, folder: Path, card: Mapping[str, Any]) -> Runner:
        """Load what `write_traced` wrote; `card` is what `lazycompress.json` says.

        Raises:
            ExportError: it does not load.
        """
        ...


def runtime_of(format: Any) -> Runtime:
    """The runtime of a format; its libraries are imported now.

    Raises:
        ExportError: there is none of that name; says which there are.
        MissingExtraError: its libraries are not installed.
    """
    found: Runtime = kinds.find("runtimes", format, ExportError)
    missing = [name for name in ("STATEFUL", "ROUNDING", "write_traced", "open_folder") if not hasattr(found, name)]
    if missing:
        raise ExportError(f"the export format {format!r} lacks {', '.join(missing)}")
    return found
