"""What is read of a call on the host, in one small transfer: timesteps, and a few numbers by which each tensor is known again.

Numbers of floating tensors are compared with a tolerance, so that no decision depends on memory layout or on a compiler's
rounding; those of integers are exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .calls import Call, Input

#: Floating tensors are the same if their prints differ by less than this share of their norm.
TOLERANCE = 1e-4

#: Weights of the sums: multiples of these steps modulo the period, a prime. They are about golden shares of it.
_PERIOD = 1000003
_STEPS = (618035, 754881)
_NUMBERS = 3


@dataclass(frozen=True)
class Print:
    """A tensor as a few numbers. `exact` for integers."""

    numbers: tuple[float, ...]
    exact: bool

    def same(self, other: Print, tolerance: float = TOLERANCE) -> bool:
        """Whether both are of the same tensor. NaN is the same as nothing."""
        if self.exact or other.exact:
            return self == other
        allowed = tolerance * max(self.numbers[0], other.numbers[0])
        return all(abs(a - b) <= allowed for a, b in zip(self.numbers, other.numbers, strict=True))

    @property
    def finite(self) -> bool:
        return all(abs(number) < float("inf") for number in self.numbers)


@dataclass(frozen=True)
class Sight:
    """What is seen of a call: per sample its timestep, the print of its latents, and those of its conditions by path."""

    times: list[float]
    latents: list[Print]
    conditions: list[dict[str, tuple[Hashable, Print]]]


class Eye:
    """Looks at calls. A condition that is the very tensor of an earlier call is not read again."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, list[Print]]] = {}

    def look(self, call: Call, conditions: Sequence[Input]) -> Sight:
        """See a call; one transfer from each device that its tensors are on."""
        wanted: list[Tensor] = []
        times = call.time_of_each()
        if isinstance(times, Tensor):
            wanted.append(times)
        latents = call.latents if isinstance(call.latents, Tensor) else list(call.latents)
        rows = [latents] if isinstance(latents, Tensor) else [row.unsqueeze(0) for row in latents]
        wanted += [_numbers(row.detach()) for row in rows]
        known = {item.path: self._known(item) for item in conditions}
        new = [item for item in conditions if known[item.path] is None]
        wanted += [_numbers(_by_sample(item)) for item in new]
        values = _read(wanted)
        if isinstance(times, Tensor):
            times = values.pop(0)
        prints = [Print(tuple(n), False) for _ in rows for n in _triples(values.pop(0))]
        for item in new:
            exact = not (item.tensor.is_floating_point() or item.tensor.is_complex())
            known[item.path] = found = [Print(tuple(n), exact) for n in _triples(values.pop(0))]
            self._keep(item, found)
        seen: list[dict[str, tuple[Hashable, Print]]] = []
        for k in range(call.batch):
            seen.append({i.path: (_kind(i), (known[i.path] or [])[k if i.batched else 0]) for i in conditions})
        return Sight(times, prints, seen)

    def _known(self, item: Input) -> list[Print] | None:
        entry = self._seen.get(id(item.tensor))
        if entry is None or entry[0]() is not item.tensor or entry[1] != _version(item.tensor):
            return None
        return entry[2] if len(entry[2]) == (item.tensor.shape[0] if item.batched else 1) else None

    def _keep(self, item: Input, prints: list[Print]) -> None:
        if item.tensor.is_inference():  # it counts no versions, so a changed one cannot be told
            return
        if len(self._seen) > 256:
            self._seen = {key: entry for key, entry in self._seen.items() if entry[0]() is not None}
        if len(self._seen) > 256:
            self._seen.clear()
        self._seen[id(item.tensor)] = (weakref.ref(item.tensor), _version(item.tensor), prints)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _kind(item: Input) -> Hashable:
    shape = item.tensor.shape[1:] if item.batched else item.tensor.shape
    return tuple(shape), item.tensor.dtype


def _by_sample(item: Input) -> Tensor:
    value = item.tensor.detach()
    return value if item.batched else value.unsqueeze(0)


def _numbers(value: Tensor) -> Tensor:
    """Prints of the rows of a tensor, float32 [3 * rows]: the norm and two sums with weights that repeat nowhere."""
    flat = value.reshape(value.shape[0], -1)
    if value.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    place = torch.arange(flat.shape[1], device=flat.device)
    if not flat.is_floating_point():
        whole = flat.to(torch.int64)
        sums = [(whole * (place * odd % 4093 + 1)).sum(dim=1) % 16777213 for odd in (1, 1021, 2503)]
        return torch.stack(sums, dim=1).to(torch.float32).flatten()
    flat = flat.to(torch.float32)
    weights = [(place * step % _PERIOD).to(torch.float32) / _PERIOD - 0.5 for step in _STEPS]
    # No matmul: it may round to fewer bits than float32 has.
    sums = [(flat * weight).sum(dim=1) for weight in weights]
    return torch.stack([torch.linalg.vector_norm(flat, dim=1), *sums], dim=1).flatten()


def _triples(numbers: list[float]) -> list[list[float]]:
    return [numbers[k : k + _NUMBERS] for k in range(0, len(numbers), _NUMBERS)]


def _read(wanted: Sequence[Tensor]) -> list[list[float]]:
    """The numbers of float32 vectors, with one transfer from each device."""
    found: list[list[float]] = [[] for _ in wanted]
    for device in {tensor.device for tensor in wanted}:
        here = [k for k, tensor in enumerate(wanted) if tensor.device == device]
        numbers = torch.cat([wanted[k].reshape(-1) for k in here]).tolist()
        for k in here:
            count = wanted[k].numel()
            found[k], numbers = numbers[:count], numbers[count:]
    return found
