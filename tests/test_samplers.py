"""Every kind of sampler, guidance in one batch and in two calls: samples of a batch and images in a row never see each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from lazycompress.gates import Gates
from lazycompress.report import Usage
from lazycompress.runtime import LazyModel, wrap
from lazycompress.train.trainer import _gates_of, clock_times, tell_calls_apart
from tests.conftest import make_lively_gates

BATCH, STEPS, NULL, GUIDANCE = 16, 6, 19, 2.0
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++"},
    "UniPCMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
}
every_sampler = pytest.mark.parametrize("scheduler", list(SCHEDULERS))
every_guidance = pytest.mark.parametrize("guidance", ["one batch", "two calls"])
every_gate = pytest.mark.parametrize("kind", ["static", "lively"])


@cache
def tiny() -> LazyModel:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=2, sample_size=4, patch_size=2,
        num_embeds_ada_norm=NULL + 1,
    ).eval()  # fmt: skip
    labels = torch.tensor([1, 2])
    call = {"hidden_states": torch.randn(2, 1, 4, 4), "timestep": torch.ones(2), "class_labels": labels}
    return wrap(model, (), call)


def start(images: range, seed: int) -> tuple[Tensor, Tensor, list[torch.Generator]]:
    """Noise, labels and generators of some of the images: each has its own, whoever it is sampled with."""
    noise = torch.randn(BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in images]
    return noise[list(images)], torch.tensor([i % (NULL - 1) for i in images]), generators


def sample(model: Any, scheduler: str, guidance: str, images: range = range(BATCH), seed: int = 1) -> Tensor:
    """Final latents of some of the images, [images, 1, 4, 4]."""
    plan = getattr(diffusers, scheduler)(**SCHEDULERS[scheduler])
    plan.set_timesteps(STEPS)
    noise, labels, generators = start(images, seed)
    latents = noise * getattr(plan, "init_noise_sigma", 1.0)
    null = torch.full_like(labels, NULL)
    scale = getattr(plan, "scale_model_input", lambda value, timestep: value)
    more = {"generator": generators} if scheduler == "DDPMScheduler" else {}

    def predict(value: Tensor, timestep: Tensor, which: Tensor) -> Tensor:
        output: Tensor = model(
            hidden_states=value, timestep=timestep.float().repeat(len(value)), class_labels=which
        ).sample
        return output[:, :1]

    for timestep in plan.timesteps:
        value = scale(latents, timestep)
        if guidance == "one batch":
            both = predict(torch.cat([value, value]), timestep, torch.cat([null, labels]))
            without, given = both.chunk(2)
        else:
            without, given = predict(value, timestep, null), predict(value, timestep, labels)
        latents = plan.step(without + GUIDANCE * (given - without), timestep, latents, **more).prev_sample
    return latents


class Taken(Usage):
    """Keeps the decisions of every call, bool [branches, batch]."""

    def __init__(self, macs: list[int]) -> None:
        super().__init__(macs)
        self.taken: list[Tensor] = []

    def add(self, timestep: Tensor, lazy: Tensor) -> None:
        super().add(timestep, lazy)
        self.taken.append(lazy.clone())


def decisions(lazy: LazyModel, make: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `make` samples, from a fresh start, and the decisions of its calls."""
    lazy.reset()
    usage = lazy.usage
    lazy.usage = counter = Taken(usage.macs)
    try:
        with torch.no_grad():
            images = make()
    finally:
        lazy.usage = usage
        lazy.reset()
    return images, counter.taken


def with_gates(kind: str, scheduler: str, guidance: str) -> tuple[LazyModel, Tensor]:
    """The model with gates for this sampler, and the schedule that the static ones follow, bool [steps, branches]."""
    lazy = tiny()
    calls = tell_calls_apart(lazy, lambda model: sample(model, scheduler, guidance))
    assert len(calls) == (2 if guidance == "two calls" else 1)
    times = torch.tensor(clock_times(lazy, calls[0]), dtype=torch.float64)
    branches = len(lazy.branches)
    schedule = torch.rand(len(times), branches, generator=torch.Generator().manual_seed(3)) < 0.5
    schedule[0] = False
    if kind == "static":
        everywhere = [(t, b) for t in range(1, len(times)) for b in range(branches)]
        gates = _gates_of(lazy, times, [np.asarray(schedule)], everywhere)
    else:
        gates = make_lively_gates(lazy.branches)
        gates.phase.copy_(lazy.gates.phase)
        gates.direction.copy_(lazy.gates.direction)
    lazy.set_gates(gates)
    return lazy, schedule


@every_gate
@every_guidance
@every_sampler
def test_a_batch_of_sixteen_equals_sixteen_singles_decision_for_decision(
    scheduler: str, guidance: str, kind: str
) -> None:
    lazy, schedule = with_gates(kind, scheduler, guidance)
    together, of_batch = decisions(lazy, lambda: sample(lazy, scheduler, guidance))
    columns = 2 if guidance == "one batch" else 1
    for i in range(BATCH):
        single, of_single = decisions(lazy, lambda i=i: sample(lazy, scheduler, guidance, range(i, i + 1)))  # type: ignore[misc]
        for batch, alone in zip(of_batch, of_single, strict=True):
            assert torch.equal(batch[:, i::BATCH], alone)
            assert alone.shape[1] == columns
        torch.testing.assert_close(single[0], together[i], rtol=1e-4, atol=1e-4)
    taken = torch.stack(of_batch)  # [calls, branches, batch]
    assert 0.1 < taken.float().mean() < 0.9
    if kind == "static":
        every = 2 if guidance == "two calls" else 1
        for k in range(every):
            assert torch.equal(taken[k::every], schedule.unsqueeze(2).expand(-1, -1, taken.shape[2]))
    else:
        assert (taken != taken[:, :, :1]).any(), "all samples decide alike: the test would show nothing"


@every_gate
@every_guidance
@every_sampler
def test_two_images_in_a_row_equal_two_fresh_starts(scheduler: str, guidance: str, kind: str) -> None:
    lazy, _ = with_gates(kind, scheduler, guidance)
    few = range(3)
    fresh = [decisions(lazy, lambda s=s: sample(lazy, scheduler, guidance, few, s)) for s in (1, 2)]  # type: ignore[misc]

    def in_a_row() -> Tensor:
        return torch.stack([sample(lazy, scheduler, guidance, few, seed) for seed in (1, 2)])

    images, taken = decisions(lazy, in_a_row)
    assert torch.equal(images, torch.stack([image for image, _ in fresh]))
    expected = [lazy for _, of_each in fresh for lazy in of_each]
    assert all(torch.equal(a, b) for a, b in zip(taken, expected, strict=True))
    first_calls = 2 if guidance == "two calls" else 1
    assert not any(lazy.any() for lazy in taken[len(taken) // 2 :][:first_calls]), "a new image begins with computing"
    assert any(lazy.any() for lazy in taken)


@every_guidance
@every_sampler
def test_gates_that_always_compute_leave_a_sampler_as_it_is(scheduler: str, guidance: str) -> None:
    lazy = tiny()
    lazy.set_gates(Gates([b.name for b in lazy.branches], [b.width for b in lazy.branches], torch.linspace(0, 980, 8)))
    images, taken = decisions(lazy, lambda: sample(lazy, scheduler, guidance, range(3)))
    with torch.no_grad():
        dense = sample(lazy.model, scheduler, guidance, range(3))
    torch.testing.assert_close(images, dense, rtol=1e-5, atol=1e-5)
    assert not any(lazy.any() for lazy in taken)
