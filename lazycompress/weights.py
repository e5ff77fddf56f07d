"""What tells the weights of one model from those of another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .errors import ExportError

#: Models up to so many bytes are hashed whole; of larger ones some of each tensor.
WHOLE = 2 * 2**30

#: Of a large model: so many pieces of each tensor, evenly spread from its first value to its last, of so many values.
PIECES, LENGTH = 16, 4096

#: Values that are brought to the CPU at once.
_CHUNK = 2**22


def weights_hash(module: nn.Module) -> str:
    """SHA-256, in hexadecimal digits, of the names, shapes, dtypes and bytes of a model's parameters and saved buffers.

    The same on every device. All bytes of models up to 2 GiB; of larger ones 16 pieces of 4096 values from each tensor, first
    and last among them, so that the time stays a second or two. Empty for a model of which some weights are not there to be
    read (on the meta device, as offloading leaves them).
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    values = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    if any(value.is_meta for value in values.values()):
        return ""
    whole = sum(value.numel() * value.element_size() for value in values.values()) <= WHOLE
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
        for part in _plain(value.detach()):
            for piece in _pieces(part.reshape(-1), whole):
                digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def dtype_of(module: nn.Module) -> str:
    """The dtype of most of a model's floating-point parameters, such as `bfloat16`; empty if there are none."""
    counts: dict[str, int] = {}
    for value in module.parameters():
        if value.is_floating_point():
            name = str(value.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + value.numel()
    return max(counts, key=lambda name: counts[name]) if counts else ""


def _plain(value: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that a tensor is made of: itself, or the parts of a quantized one."""
    if type(value) in (Tensor, nn.Parameter) or not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _plain(getattr(value, name))


def _pieces(flat: Tensor, whole: bool) -> Iterator[Tensor]:
    if whole:
        for first in range(0, flat.numel(), _CHUNK):
            yield flat[first : first + _CHUNK]
        return
    last = max(0, flat.numel() - LENGTH)
    for first in sorted({k * last // (PIECES - 1) for k in range(PIECES)}):
        yield flat[first : first + LENGTH]


def device_of(module: nn.Module) -> torch.device:
    """Where the first of a model's values is; the CPU for a model without any."""
    for value in (*module.parameters(), *module.buffers()):
        return value.device
    return torch.device("cpu")


def need_same(module: nn.Module, model: str, weights: str, dtype: str, what: str) -> None:
    """Refuse what was learned with another model.

    Args:
        module: the model at hand.
        model, weights, dtype: class, hash and dtype that a file names; empty where it does not tell.
        what: is to be used with `module`, for the message.

    Raises:
        ExportError: the class is another, or the weights are.
    """
    name = type(getattr(module, "_orig_mod", module)).__name__
    how = "strict=False takes them all the same"
    if model and model != name:
        raise ExportError(f"{what} are of a {model}; this is a {name}: {how}")
    if weights and (found := weights_hash(module)) and found != weights:
        own = dtype_of(module)
        then = f"in {dtype}; these are in {own}" if own != dtype else "with other values, names or shapes"
        raise ExportError(f"{what} were learned on other weights of {name}, {then}: {how}")
