"""A wrapped file on calls that were recorded of the torch module, on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, LazyCompressError
from .check import Report
from .sessions import computed_by, open_session


def replay(folder: Path, card: Mapping[str, Any], found: Mapping[str, Tensor]) -> Report:
    """Call a wrapped file as the module was called.

    Args:
        folder: of the file.
        card: of it.
        found: recorded calls of the torch module: inputs where they change, outputs, and whether it computed.

    Raises:
        ExportError: nothing is recorded, it holds NaN or infinity, or the file does not run on it.
    """
    session, inputs = open_session(folder / card["model"]), dict[str, Any]()
    difference = largest = before = 0.0
    flipped, number, broken = 0, 0, ""
    while f"{number}.computed" in found:
        inputs |= {
            name.removeprefix(f"{number}.in."): value.numpy()
            for name, value in found.items()
            if name.startswith(f"{number}.in.")
        }
        expected = [found[name] for name in sorted(found) if name.startswith(f"{number}.out.")]
        if not expected or not all(bool(value.isfinite().all()) for value in expected):
            raise ExportError(
                f"{folder}: the outputs of recorded call {number} are missing, NaN or infinity: export again"
            )
        try:
            outputs = [torch.from_numpy(value).double() for value in session(inputs)]
        except LazyCompressError:
            raise
        except Exception as error:  # runtimes have error classes of their own
            said = " ".join(str(error).split())[-300:]
            raise ExportError(f"the file in {folder} does not run on recorded call {number}: {said}") from error
        sizes, wanted = ([list(value.shape) for value in values] for values in (outputs, expected))
        if sizes != wanted:
            raise ExportError(f"the file in {folder} gives outputs of the sizes {sizes}, torch {wanted}")
        for own, other in zip(outputs, expected, strict=True):
            if not bool(own.isfinite().all()):
                broken = broken or f"an output of recorded call {number}"
                continue
            difference = max(difference, float((own - other.double()).abs().max()))
            largest = max(largest, float(other.abs().max()))
        count = computed_by(session, card["clock"])
        flipped += (count > before or not number) != bool(found[f"{number}.computed"])
        before, number = count, number + 1
    if not number:
        raise ExportError(f"{folder}: no call is recorded: export again")
    return Report(str(folder), difference, largest, card["parity"]["tolerance"], flipped, 0, broken)


__all__ = ["replay"]
