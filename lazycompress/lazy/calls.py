"""What a call of a denoiser is made of: latents, timesteps, and what the image is conditioned on.

Nothing here reads a value of a tensor on the host.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..graph.call import pattern
from ..graph.insert import is_timestep_name

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class Input:
    """One tensor of a call: its path among the arguments, and whether its first dimension is the batch."""

    path: str
    tensor: Tensor
    batched: bool


@dataclass(frozen=True)
class Call:
    """One call, read.

    Attributes:
        latents: a tensor [batch, ...], or one tensor for each sample.
        timesteps: floating or integer tensor, or a Python number.
        inputs: all other tensors but further timesteps.
        constants: paths and values of what is no tensor.
    """

    latents: Tensor | Sequence[Tensor]
    timesteps: Tensor | float
    inputs: tuple[Input, ...]
    constants: tuple[tuple[str, Hashable], ...]

    @property
    def batch(self) -> int:
        return len(self.latents)

    @property
    def device(self) -> torch.device:
        return self.latents[0].device if self.batch else torch.device("cpu")

    def time_of_each(self) -> Tensor | list[float]:
        """Timesteps of the samples: float32 [batch], of per-token ones the largest; numbers if the call has a number."""
        if not isinstance(self.timesteps, Tensor):
            return [float(self.timesteps)] * self.batch
        value = self.timesteps.detach().to(torch.float32)
        if value.numel() == 1:
            return value.reshape(1).expand(self.batch)
        if value.numel() % self.batch == 0:
            return value.reshape(self.batch, -1).amax(dim=1)
        return value.amax().expand(self.batch)


@dataclass(frozen=True)
class Reader:
    """Reads the calls of one module.

    Attributes:
        model: the module's class name, for messages.
        names: the parameters of its forward that may be given by position, in their order.
        timestep: the argument that holds the timestep; empty: found by its name.
        moving: paths of inputs that change from call to call within an image, and so say nothing of which image it is.
        known: paths that were there when that was found out; None: it was not.
    """

    model: str
    names: tuple[str, ...]
    timestep: str = ""
    moving: frozenset[str] = frozenset()
    known: frozenset[str] | None = None

    @classmethod
    def of(cls, module: nn.Module, timestep: str = "") -> Reader:
        """For the calls of `module`.

        Raises:
            InputError: its forward has no signature.
        """
        try:
            parameters = inspect.signature(type(module).forward).parameters
        except (TypeError, ValueError):
            raise InputError(
                f"{type(module).__name__}.forward has no signature (a scripted module?): pass the eager module"
            ) from None
        names = [name for name, parameter in parameters.items() if parameter.kind in _POSITIONAL]
        return cls(type(module).__name__, tuple(names[1:]), timestep)

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Take the arguments of a call apart.

        Raises:
            InputError: there are no latents, or no timestep, or no sample at all.
        """
        given = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        given |= {f"argument {k}": value for k, value in enumerate(args[len(self.names) :], len(self.names))}
        ordered = {name: given.pop(name) for name in self.names if name in given} | given
        latents_name, latents = self._latents(ordered)
        batch = len(latents)
        if not batch:
            raise InputError(f"{self.model} was called with a batch of no samples")
        leaves = [leaf for name, value in ordered.items() if name != latents_name for leaf in _leaves(name, value)]
        timestep = self._timestep(leaves, batch)
        inputs, constants = [], []
        for path, value in leaves:
            if path == timestep or is_timestep_name(path):  # a second one is one to go to
                continue
            if isinstance(value, Tensor):
                inputs.append(Input(path, value, value.dim() > 0 and value.shape[0] == batch))
            elif value is not None:
                constants.append((path, value if isinstance(value, _PLAIN) else (type(value).__name__, id(value))))
        return Call(latents, dict(leaves)[timestep], tuple(inputs), tuple(constants))

    def conditions(self, call: Call, scoped: bool) -> list[Input]:
        """The inputs of a call that stay as they are while one image is made.

        Inside a scope those that nobody has seen so far are none: a ControlNet that came later moves.
        """
        found = [item for item in call.inputs if pattern(item.path) not in self.moving]
        if scoped and self.known is not None:
            found = [i for i in found if pattern(i.path) in self.known or not i.tensor.is_floating_point()]
        return found

    def constants(self, call: Call) -> tuple[tuple[str, Hashable], ...]:
        """The values of a call, no tensors, that stay as they are while one image is made."""
        return tuple((path, value) for path, value in call.constants if pattern(path) not in self.moving)

    def comparing(self, before: Call, after: Call) -> Reader:
        """A reader that knows what moved between two consecutive calls of one image, and what was there."""
        moving, known = set(self.moving), set(self.known or ())
        old = {item.path: item.tensor for item in before.inputs}
        for item in after.inputs:
            known.add(pattern(item.path))
            if item.path in old and _differ(old[item.path], item.tensor):
                moving.add(pattern(item.path))
        numbers_before = dict(before.constants)
        for path, value in after.constants:
            known.add(pattern(path))
            if path in numbers_before and value != numbers_before[path]:
                moving.add(pattern(path))
        return replace(self, moving=frozenset(moving), known=frozenset(known))

    def _latents(self, arguments: Mapping[str, Any]) -> tuple[str, Tensor | Sequence[Tensor]]:
        for name, value in arguments.items():
            if _is_stream(value):
                return name, value
            if isinstance(value, list | tuple) and value and all(_is_stream(part) for part in value):
                return name, value
        raise InputError(
            f"{self.model} was called without a floating-point tensor of rank 3 or more (latents or tokens); there was "
            f"{', '.join(_described(name, value) for name, value in arguments.items()) or 'nothing'}"
        )

    def _timestep(self, leaves: Sequence[tuple[str, Any]], batch: int) -> str:
        fitting = [path for path, value in leaves if _may_be_timestep(value, batch)]
        if self.timestep:
            if self.timestep not in fitting:
                raise InputError(
                    f"recipe key timestep_input: no input is called {self.timestep!r}; there are "
                    f"{', '.join(path for path, _ in leaves)}"
                )
            return self.timestep
        for path in fitting:
            if is_timestep_name(path):
                return path
        raise InputError(
            f"none of the inputs {', '.join(path for path, _ in leaves)} of {self.model} looks like the timestep: name it "
            "with the recipe key timestep_input"
        )


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{path}.{key}", part)
    elif isinstance(value, list | tuple):
        for k, part in enumerate(value):
            yield from _leaves(f"{path}.{k}", part)
    else:
        yield path, value


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point()


def _may_be_timestep(value: Any, batch: int) -> bool:
    if isinstance(value, Tensor):
        return not value.is_complex() and value.numel() > 0 and (value.dim() <= 2 or value.numel() <= 64 * batch)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _differ(before: Tensor, after: Tensor) -> bool:
    """Whether two tensors differ by more than rounding."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return True
    if not before.is_floating_point():
        return not torch.equal(before, after)
    scale = float(before.abs().max()) if before.numel() else 0.0
    return not torch.allclose(before.float(), after.float(), rtol=1e-4, atol=1e-4 * scale, equal_nan=True)


def _described(name: str, value: Any) -> str:
    return f"{name}{list(value.shape)}" if isinstance(value, Tensor) else name
