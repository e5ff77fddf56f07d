"""`save_pretrained` of a lazy denoiser: the dense model as ever, and its plan in a folder beside it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from ...lazy.attach import Handle, handle_of
from ...storage import save
from .graph import GATES_FOLDER

_SAVE = "save_pretrained"


class SavesPlanToo:
    """Stands before a module's `save_pretrained`, with its signature."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)

    @property
    def _own(self) -> Any:
        module: Any = self.handle.module
        return getattr(type(module), _SAVE).__get__(module)

    def __call__(self, save_directory: str | Path, *args: Any, **options: Any) -> Any:
        given = self._own(save_directory, *args, **options)
        if handle_of(self.handle.module) is self.handle:
            save(self.handle, Path(save_directory) / GATES_FOLDER, overwrite=True)
        return given


def save_plan_too(handle: Handle) -> None:
    """From now on the module's `save_pretrained` writes the plan, too."""
    if hasattr(type(handle.module), _SAVE):
        handle.module.__dict__[_SAVE] = SavesPlanToo(handle)
