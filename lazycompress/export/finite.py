"""A model that holds NaN is not exported: the file would agree with it, and be called good."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ExportError
from ..runtime import LazyModel
from .trace import is_weight


def need_finite(lazy: LazyModel, stored: torch.dtype = torch.float32) -> None:
    """Look at every weight of a lazy model and of its gates, whether its example call reads it or not.

    Buffers may hold infinity, as masks do.

    Args:
        lazy: the model.
        stored: what large weights are stored as.

    Raises:
        ExportError: names the first one with NaN or infinity, with a value beyond `stored`, or of a kind that files lack.
    """
    name = type(lazy.model).__name__
    for key, weight in lazy.model.named_parameters():
        _need(weight, f"weight {key} of {name}", infinity=False)
        if stored != torch.float32 and weight.dtype == torch.float32 and is_weight(key, weight.numel()):
            narrowed(weight.detach(), stored, key)
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
    try:
        bad = bool((value.isnan() if infinity else ~value.isfinite()).any())
    except (NotImplementedError, RuntimeError, TypeError) as error:  # a quantized tensor, of a kind of its own
        raise ExportError(
            f"the {name} is a {type(value).__name__}, which no file has: export the model as it was before, and have the recipe "
            "quantize it"
        ) from error
    if bad:
        what = "NaN" if infinity else "NaN or infinity"
        raise ExportError(f"the {name} holds {what}: nothing was exported")
