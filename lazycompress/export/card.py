"""`lazycompress.json`: what an export folder says about itself, and what runners make of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ExportError

CARD_FILE = "lazycompress.json"


def read_card(directory: str | Path) -> dict[str, Any]:
    """`lazycompress.json` of an export.

    Raises:
        ExportError: the folder has none.
    """
    path = Path(directory) / CARD_FILE
    if not path.is_file():
        raise ExportError(f"{directory} is no export of lazycompress: {CARD_FILE} is missing")
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


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
