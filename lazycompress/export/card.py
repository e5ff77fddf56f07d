"""`lazycompress.json`: what an export folder says about itself, and what runners make of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ExportError, InputError

CARD_FILE = "lazycompress.json"


def read_card(directory: str | Path) -> dict[str, Any]:
    """`lazycompress.json` of an export.

    Raises:
        ExportError: the folder has none, or one that no export wrote.
    """
    path = Path(directory) / CARD_FILE
    if not path.is_file():
        raise ExportError(f"{directory} is no export of lazycompress: {CARD_FILE} is missing")
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
    if not isinstance(card, dict) or not {"denoisers", "branches", "plan"} & card.keys():
        raise ExportError(
            f"{path} says nothing of branches, a plan or denoisers: it is not what an export writes; export again"
        )
    return card


def exports_in(directory: str | Path) -> list[Path]:
    """The folders of an export's files: its own, or those of the denoisers of a pipeline.

    Raises:
        ExportError: the folder is no export.
    """
    folder = Path(directory)
    names = read_card(folder).get("denoisers")
    return [folder] if names is None else [folder / name for name in names]


def tensors_of(inputs: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    """The named inputs as tensors; numpy arrays are taken too.

    Raises:
        InputError: one is missing.
    """
    found = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items() if k in names}
    missing = [name for name in names if not isinstance(found.get(name), Tensor)]
    if missing:
        raise InputError(f"the exported model needs the tensors {', '.join(names)}; missing: {', '.join(missing)}")
    return found


def need_sizes(inputs: dict[str, Tensor], sizes: dict[str, list[int | None]]) -> None:
    """Refuse what a file was not made for: some runtimes give an empty result in place of an error.

    Args:
        inputs: of one call.
        sizes: of the file's inputs; None where any will do.

    Raises:
        InputError: an input has other sizes.
    """
    for name, tensor in inputs.items():
        wanted = sizes[name]
        given = list(tensor.shape)
        fits = len(given) == len(wanted) and all(w in (None, g) for w, g in zip(wanted, given, strict=True))
        if not fits:
            shown = ", ".join("any" if size is None else str(size) for size in wanted)
            raise InputError(
                f"input {name}: the dimensions {given} are not the file's [{shown}]; export the model with an example of them"
            )


def fresh_state(entry: dict[str, Any], batch: int) -> np.ndarray[Any, Any]:
    """One entry of the card's "state" before the first step of an image, for a batch of that size.

    Its sizes that change with those of the inputs (-2) are 1: the file takes any, and uses none of it.
    """
    shape = [batch * entry["scale"] if size == -1 else max(size, 1) for size in entry["shape"]]
    return np.full(shape, entry["fill"], dtype=entry["dtype"])


@dataclass(frozen=True)
class FileBranch:
    """What an export's description says about a branch."""

    name: str
    kind: str
    macs: int


class Output(dict[str, Tensor]):
    """Outputs by name, as attributes, and by position."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the exported model has no output {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key: str | int) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)
