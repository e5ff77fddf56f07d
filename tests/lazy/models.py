"""A small denoiser, its samplers, and lazy forms of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lazycompress.lazy.calls import Reader
from lazycompress.lazy.engine import Engine
from lazycompress.lazy.follow import in_turns
from lazycompress.lazy.model import LazyModule
from lazycompress.plan.plan import Plan, even

STEPS = 10


@dataclass(frozen=True)
class Even:
    """Plans evenly spread calls, in each stream alike: what a plan is, without learning one."""

    timesteps: tuple[float, ...]
    streams: tuple[int, ...]

    def plan(self, target: float, timesteps: tuple[float, ...] | None = None) -> Plan:
        times, streams = self.timesteps, self.streams
        if timesteps is not None:
            times, streams = in_turns(timesteps, max(streams) + 1)
        computes = [False] * len(times)
        for stream in set(streams):
            places = [k for k, own in enumerate(streams) if own == stream]
            for k, computed in zip(places, even([times[k] for k in places], target).computes, strict=True):
                computes[k] = computed
        return Plan(times, tuple(computes), 2, streams)


TIMES = [1000.0 * (1 - k / STEPS) for k in range(STEPS)]


class Denoiser(nn.Module):
    """Mixes tokens and channels, with a condition; the output is about as large as the latents."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(6, width), nn.Linear(width, 6)
        self.condition, self.mix = nn.Linear(5, width), nn.Linear(16, 16)
        self.ran: list[int] = []

    def forward(
        self, x: Tensor, timestep: Any, condition: Tensor, scale: float = 1.0, extra: Tensor | None = None
    ) -> Tensor:
        time = torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1, 1) / 1000
        hidden = self.enter(x) + self.condition(condition)[:, None] + time
        hidden = hidden + self.mix(torch.tanh(hidden).transpose(1, 2)).transpose(1, 2)
        if extra is not None:
            hidden = hidden + extra
        given: Tensor = self.leave(torch.sin(hidden)) * scale
        return given


def noise(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, 6, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(1000 + seed))


def make_lazy(share: float = 0.4, order: int = 2, plan: Plan | None = None) -> LazyModule:
    model = Denoiser().eval()
    model.register_forward_pre_hook(lambda module, given: model.ran.append(1))
    return LazyModule(model, Engine(Reader.of(model), plan or even(TIMES, share, order)))


def steps(
    model: Callable[..., Tensor], x: Tensor, condition: Tensor, times: list[float] | None = None
) -> Iterator[Tensor]:
    """An Euler sampler that stops after every call, and gives its latents."""
    times = TIMES if times is None else times
    for now, after in zip(times, [*times[1:], 0.0], strict=True):
        with torch.no_grad():
            x = x - (now - after) / 1000 * model(x=x, timestep=torch.full((x.shape[0],), now), condition=condition)
        yield x


def last(states: Iterator[Tensor]) -> Tensor:
    *_, found = states
    return found


def alone(model: LazyModule, x: Tensor, condition: Tensor, times: list[float] | None = None) -> Tensor:
    """What a run gives with nothing before it and nothing beside it; the share of calls that it skips is not none."""
    model.reset()
    found = last(steps(model, x, condition, times))
    model.reset()
    return found
