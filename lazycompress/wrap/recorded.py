"""Calls of the torch module that a wrapped file's dense one was made of, recorded for `export.replay`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ExportError
from ..lazy.attach import Handle
from ..lazy.engine import Engine, run
from .plans import of_all_passes
from .ports import Port

#: Calls that are recorded, from the beginning of an image on: with a usual plan some compute and others do not.
CALLS = 6

#: How far latents go from call to call, as a share of the output.
_STEP = 0.05

#: Largest difference to torch, as a share of the largest output: of a module in float32, and in half precision.
_EXACT, _HALF = 1e-3, 5e-2


@torch.no_grad()
def record(lazy: Handle, card: Mapping[str, Any], ports: Sequence[Port]) -> dict[str, Tensor]:
    """A few calls of the module as its plan has them: inputs where they change, outputs, and whether it computed.

    Args:
        lazy: the module; its images and statistics stay as they are.
        card: of the wrapped file: names latents and timestep.
        ports: inputs of the file.

    Raises:
        ExportError: the file takes other inputs than the module is called with.
    """
    args, kwargs = lazy.example or ((), {})
    given = dict(zip(lazy.engine.reader.names, args, strict=False)) | dict(kwargs)
    for port in ports:
        _ = _for(port, given.get(port.name))
    engine = Engine(lazy.engine.reader, of_all_passes(lazy.plan))
    latents, timestep = card["latents"], card["timestep"]
    found: dict[str, Tensor] = {}
    for number, at in enumerate(engine.plan.timesteps[:CALLS]):
        now = given[timestep]
        given[timestep] = torch.full_like(now, at) if isinstance(now, Tensor) else at
        output, computed = run(engine, lazy.inner, (), given, None)
        for port in ports:
            if not number or port.name in (latents, timestep):
                found[f"{number}.in.{port.name}"] = _for(port, given[port.name])
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        for k, leaf in enumerate(outputs):
            found[f"{number}.out.{k}"] = leaf.to("cpu", torch.float32, copy=True)
        found[f"{number}.computed"] = torch.tensor(computed)
        given[latents] = _onward(given[latents], outputs[0])
    return found


def tolerance_of(lazy: Handle) -> float:
    """How far a file may be from the module, as a share of the largest output."""
    kinds = {parameter.dtype for parameter in lazy.module.parameters() if parameter.is_floating_point()}
    return _HALF if kinds & {torch.float16, torch.bfloat16} else _EXACT


def _for(port: Port, value: Any) -> Tensor:
    """An argument of the module as the file takes it: numbers as tensors, and what each sample has one of for each token, too.

    Raises:
        ExportError: it is no such argument.
    """
    numbers = value if isinstance(value, list | tuple) else [value]
    if not isinstance(value, Tensor) and all(isinstance(number, bool | int | float) for number in numbers):
        value = torch.tensor(value)
    dtype = getattr(torch, port.dtype, None)
    if not isinstance(value, Tensor) or value.dim() > len(port.shape) or dtype is None:
        raise ExportError(f"the file's input {port.name} is nothing that the module is called with")
    return value[(..., *[None] * (len(port.shape) - value.dim()))].to("cpu", dtype, copy=True)


def _onward(latents: Tensor, output: Tensor) -> Tensor:
    """Latents a step further; of an output of more channels the first ones count."""
    if latents.dim() != output.dim() or any(a > b for a, b in zip(latents.shape, output.shape, strict=True)):
        return latents
    own = output[tuple(slice(size) for size in latents.shape)]
    return latents - _STEP * own.to(latents.dtype)


__all__ = ["record", "tolerance_of"]
