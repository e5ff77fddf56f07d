"""What compilers leave alone: code that runs around a module, whoever compiled the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def eager(function: _Function) -> _Function:
    """The function, run as it is, and whatever it calls as well."""
    return cast(_Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def around(function: _Function) -> _Function:
    """The function, run as it is; what it calls may be compiled."""
    return cast(_Function, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]
