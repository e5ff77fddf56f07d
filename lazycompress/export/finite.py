"""A model that holds NaN is not exported: the file would agree with it, and be called good."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ExportError
from ..runtime import LazyModel


def need_finite(lazy: LazyModel) -> None:
    """Look at every weight of a lazy model and of its gates, whether its example call reads it or not.

    Buffers may hold infinity, as masks do.

    Raises:
        ExportError: names the first one with NaN or infinity.
    """
    name = type(lazy.model).__name__
    for key, weight in lazy.model.named_parameters():
        _need(weight, f"weight {key} of {name}", infinity=False)
    for key, buffer in lazy.model.named_buffers():
        _need(buffer, f"buffer {key} of {name}", infinity=True)
    for key, value in lazy.gates.state_dict().items():
        _need(value, f"{key} of the gates", infinity=key == "rank")


def narrowed(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A weight in fewer bits.

    Raises:
        ExportError: one of its values is beyond what that dtype holds.
    """
    narrow = value.to(dtype)
    if bool((value.isfinite() & ~narrow.isfinite()).any()):
        raise ExportError(
            f"the weight {name} goes up to {float(value.abs().max()):.3g}, beyond {dtype}: export with weights='f32' or 'bf16'"
        )
    return narrow


def _need(value: Tensor, name: str, infinity: bool) -> None:
    if value.is_meta or not value.is_floating_point():
        return
    value = value.detach()
    if bool((value.isnan() if infinity else ~value.isfinite()).any()):
        what = "NaN" if infinity else "NaN or infinity"
        raise ExportError(f"the {name} holds {what}: nothing was exported")
