"""A tape: the outputs of one dense run, and what playing them back tells of the sampler.

Playing back calls no model. The tape is all that planning needs memory for, beyond what sampling takes: the outputs of one
run, on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..sampling import Sampler
from .outputs import first_of, with_first
from .runs import Denoise, Dense, Read, Reading, play, reading_of

#: Playing a tape back gives the image again, to this share of its size: a sampler is the same at each run, or it is not.
SAME = 1e-3


@dataclass(frozen=True, eq=False)
class Tape:
    """One dense run.

    Attributes:
        seed: of its noise.
        readings: of the calls.
        outputs: of the calls, whole, their tensors on the CPU.
        final: latents of the dense run, [B, ...].
    """

    seed: int
    readings: tuple[Reading, ...]
    outputs: tuple[Any, ...]
    final: Tensor
    device: torch.device

    def output(self, call: int) -> Any:
        """As the model gave it, on its device."""
        return pytree.tree_map_only(Tensor, lambda value: value.to(self.device), self.outputs[call])

    def value(self, call: int) -> Tensor:
        """The first tensor of an output, on the CPU."""
        return first_of(self.outputs[call])

    @property
    def bytes(self) -> int:
        """Memory that the outputs take."""
        tensors = [t for output in self.outputs for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def record(dense: Dense, denoise: Denoise, sampler: Sampler, read: Read, seed: int) -> Tape:
    """One dense run, on tape.

    Raises:
        InputError: the sampler never called the model, or an output is not finite.
    """
    readings: list[Reading] = []
    outputs: list[Any] = []
    devices: list[torch.device] = []

    def answer(call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        readings.append(reading_of(read, args, kwargs))
        output = dense(call, args, kwargs)
        devices.append(first_of(output).device)
        # A copy: some loops, and some runtimes, write into what they were given.
        outputs.append(pytree.tree_map_only((Tensor, np.ndarray), _copied, output))
        return output

    final = play(sampler, denoise, answer, seed)
    if not outputs:
        raise InputError("the sampler returned without calling the model it was given")
    if not bool(torch.isfinite(final).all()):
        raise InputError("the final latents are not finite, though every output of the model is: look at the sampler")
    return Tape(seed, tuple(readings), tuple(outputs), final.cpu(), devices[0])


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value.copy()


def play_back(tape: Tape, denoise: Denoise, sampler: Sampler, changed: Mapping[int, Tensor] | None = None) -> Tensor:
    """Final latents, on the CPU, of the recorded outputs, some of their first tensors exchanged. No call of the model."""
    changes = changed or {}

    def answer(call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call >= len(tape.outputs):
            raise InputError(
                f"the sampler made {len(tape.outputs)} calls in one run and more in another one: planning needs a "
                "sampler whose runs all make the same calls"
            )
        output = tape.output(call)
        return with_first(output, changes[call].to(tape.device)) if call in changes else output

    return play(sampler, denoise, answer, tape.seed).cpu()


def check_repeats(tape: Tape, denoise: Denoise, sampler: Sampler) -> None:
    """Playing back what was recorded gives the same image.

    Raises:
        InputError: it does not.
    """
    off = (play_back(tape, denoise, sampler).float() - tape.final.float()).square().mean().sqrt()
    if float(off) > SAME * float(tape.final.float().square().mean().sqrt()):
        raise InputError(
            "the same outputs gave another image in a second run of the sampler: it has to begin every run from torch's "
            "global generator, which is seeded before; a generator of its own must be seeded inside of it"
        )
