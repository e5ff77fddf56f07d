"""What a denoiser file takes and gives, and which of its inputs is what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..graph.insert import is_timestep_name


@dataclass(frozen=True)
class Port:
    """An input or output: its name, its sizes (None where any will do), and its element type by numpy's name."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def floating(self) -> bool:
        return "float" in self.dtype


@dataclass(frozen=True)
class Roles:
    """Which input is what.

    Attributes:
        latents: what is denoised, [batch, ...].
        timestep: a number, one for each sample, or one for each token.
        conditions: what stays as it is while one image is made.
    """

    latents: Port
    timestep: Port
    conditions: tuple[Port, ...]


def find_roles(
    inputs: Sequence[Port], outputs: Sequence[Port], timestep_input: str | None = None, moving: Sequence[str] = ()
) -> Roles:
    """Tell the inputs of a denoiser apart.

    Args:
        inputs: in their order.
        outputs: the first is what the latents become.
        timestep_input: the timestep's name; None: found by its name.
        moving: inputs that change within an image, and so are no conditions.

    Raises:
        InputError: there is no such input, nothing that looks like latents or a timestep, or outputs without a batch.
    """
    known = {port.name: port for port in inputs}
    there = ", ".join(known) or "none"
    for name in (*moving, *([timestep_input] if timestep_input is not None else [])):
        if name not in known:
            raise InputError(f"the file has no input {name!r}; it has {there}")
    for port in outputs:
        if not port.shape or not port.floating:
            raise InputError(f"output {port.name} is no floating-point tensor with a batch: there is no forecast of it")
    latents = _latents(inputs, outputs[0], timestep_input, there)
    named = [p for p in inputs if p is not latents and is_timestep_name(p.name) and len(p.shape) <= 2]
    if timestep_input is not None:
        timestep = known[timestep_input]
    elif named:
        timestep = named[0]
    else:
        raise InputError(f"none of the inputs {there} looks like the timestep: pass timestep_input")
    others = (latents.name, timestep.name, *moving, *(port.name for port in named))
    return Roles(latents, timestep, tuple(port for port in inputs if port.name not in others))


def _latents(inputs: Sequence[Port], output: Port, timestep: str | None, there: str) -> Port:
    """The input most like the output: as many dimensions, then most sizes in common, then the first."""

    def alike(port: Port) -> tuple[bool, int]:
        sizes = zip(port.shape, output.shape, strict=False)
        return len(port.shape) == len(output.shape), sum(a == b and a is not None for a, b in sizes)

    fitting = [port for port in inputs if port.floating and len(port.shape) >= 2 and port.name != timestep]
    if not fitting:
        raise InputError(f"none of the inputs {there} looks like latents: a floating-point tensor [batch, ...]")
    return max(fitting, key=alike)
