"""States that take turns: guidance in two calls a step, named or told apart by conditioning; nothing outlives its image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lazycompress.contexts import MOST_ASLEEP
from lazycompress.gates import Gates
from lazycompress.runtime import LazyModel, wrap

MakeGates = Callable[..., Gates]
TIMES = range(980, 0, -140)


def inputs(labels: Iterable[int], timestep: int, seed: int) -> dict[str, Tensor]:
    labels = torch.tensor(list(labels))
    generator = torch.Generator().manual_seed(seed)
    # Every label has its own latents, so that a batch and its singles see the same.
    latents = torch.randn(32, 1, 8, 8, generator=generator)[labels]
    return {
        "hidden_states": latents + timestep / 980,
        "timestep": torch.full((len(labels),), timestep),
        "class_labels": labels % 10,
    }


def output(model: nn.Module, labels: Iterable[int], timestep: int, seed: int = 0) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs(labels, timestep, seed)).sample
    return result


@pytest.fixture(scope="module")
def captured(digits: nn.Module) -> LazyModel:
    return wrap(digits, (), inputs([1, 2], 980, 0))


@pytest.fixture
def lazy(captured: LazyModel, lively_gates: MakeGates) -> LazyModel:
    """Captured once; for each test with new gates, and nothing kept."""
    captured.set_gates(lively_gates(captured.branches))
    captured.policy = "learned"
    captured.reset()
    return captured


def alone(lazy: LazyModel, labels: list[int], times: Iterable[int] = TIMES, seed: int = 0) -> list[Tensor]:
    lazy.reset()
    found = [output(lazy, labels, t, seed) for t in times]
    lazy.reset()
    return found


@pytest.mark.parametrize("named", [False, True])
def test_two_calls_a_step_give_what_each_gives_alone(lazy: LazyModel, named: bool) -> None:
    expected = [alone(lazy, [1, 2]), alone(lazy, [3, 4])]
    found: list[list[Tensor]] = [[], []]
    for timestep in TIMES:
        for k, labels in enumerate(([1, 2], [3, 4])):
            with lazy.cache_context(("cond", "uncond")[k]) if named else nullcontext():
                found[k].append(output(lazy, labels, timestep))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert 0.2 < lazy.summary().skip_ratio < 0.8


def test_names_tell_calls_of_equal_conditioning_apart(lazy: LazyModel) -> None:
    lazy.policy = "reuse"
    for timestep in TIMES:
        for name, seed in (("cond", 0), ("uncond", 1)):
            with lazy.cache_context(name):
                output(lazy, [1, 2], timestep, seed)
    assert lazy.summary().skip_ratio == pytest.approx(1 - 1 / len(TIMES))


def test_equal_calls_without_a_name_never_share_a_cache(lazy: LazyModel) -> None:
    """Two calls at one timestep with equal conditioning and other latents: which is which is unknown, so no reuse across."""
    lazy.policy = "reuse"
    first = [output(lazy, [1, 2], 980, seed) for seed in (0, 1)]
    dense = [output(lazy.model, [1, 2], 980, seed) for seed in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(first, dense, strict=True))


@pytest.mark.parametrize("named", [False, True])
def test_a_batch_in_turns_equals_singles_in_turns(lazy: LazyModel, named: bool) -> None:
    pairs = {"cond": [1, 2, 3], "uncond": [4, 5, 6]}

    def sample(which: slice) -> dict[str, list[Tensor]]:
        lazy.reset()
        found: dict[str, list[Tensor]] = {name: [] for name in pairs}
        for timestep in TIMES:
            for name, labels in pairs.items():
                with lazy.cache_context(name) if named else nullcontext():
                    found[name].append(output(lazy, labels[which], timestep))
        return found

    together, singles = sample(slice(None)), [sample(slice(i, i + 1)) for i in range(3)]
    for name in pairs:
        for step, batch in enumerate(together[name]):
            joined = torch.cat([single[name][step] for single in singles])
            torch.testing.assert_close(batch, joined, rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [False, True])
def test_an_interrupted_image_does_not_reach_the_next(lazy: LazyModel, named: bool) -> None:
    """Prompt A stops at 700, prompt B runs from 560 on, then A again from 420 on: everything is fresh."""
    lazy.policy = "reuse"

    def step(labels: list[int], timestep: int, seed: int = 0) -> Tensor:
        with lazy.cache_context("cond") if named else nullcontext():
            return output(lazy, labels, timestep, seed)

    for timestep in (980, 840, 700):
        step([1, 2], timestep)
    assert torch.equal(step([3, 4], 560), output(lazy.model, [3, 4], 560))
    step([3, 4], 490)
    assert torch.equal(step([1, 2], 420, seed=1), output(lazy.model, [1, 2], 420, seed=1))


def test_guidance_that_ends_and_starts_again_is_fresh(lazy: LazyModel) -> None:
    """Where the latents have moved on since."""
    lazy.policy = "reuse"
    for timestep, both in ((980, True), (840, True), (700, False), (560, False)):
        output(lazy, [1, 2], timestep)
        if both:
            output(lazy, [3, 4], timestep)
    lazy.usage.clear()
    output(lazy, [1, 2], 420)
    assert lazy.summary().skip_ratio == 1.0
    assert torch.equal(output(lazy, [3, 4], 420, seed=1), output(lazy.model, [3, 4], 420, seed=1))


def test_states_of_many_prompts_do_not_pile_up(lazy: LazyModel) -> None:
    for label in range(20):
        for timestep in (980, 840):
            output(lazy, [label, label], timestep)
    assert len(lazy._states) <= 1 + MOST_ASLEEP
    lazy.reset()
    for label in range(20):
        for timestep in range(980, 0, -150):  # the next would be past the last that was learned at
            output(lazy, [label, label], timestep)
    assert len(lazy._states) <= 2


def test_sizes_of_one_batch_may_differ_between_the_calls(lazy: LazyModel) -> None:
    """Guidance for one of two images only: batches of two and of one take turns."""
    expected = [alone(lazy, [1, 2]), alone(lazy, [3])]
    found: list[list[Tensor]] = [[], []]
    for timestep in TIMES:
        for k, labels in enumerate(([1, 2], [3])):
            found[k].append(output(lazy, labels, timestep))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_one_sample_of_a_batch_goes_on_while_another_begins(lazy: LazyModel) -> None:
    lazy.policy = "reuse"
    output(lazy, [1, 2], 980)
    lazy.usage.clear()
    found = output(lazy, [1, 3], 840)
    assert lazy.summary().skip_ratio == 0.5
    torch.testing.assert_close(found[1:], output(lazy.model, [3], 840), rtol=0, atol=1e-5)


def test_learning_keeps_the_two_calls_apart(digits: nn.Module) -> None:
    """Guidance in two calls and in one batch of two halves: the same effects of every decision on the image."""
    from lazycompress.train.trajectory import linearise, run

    labels, null = [1, 2, 3], [7, 8, 9]
    lazy = wrap(digits, (), inputs(labels, 980, 0))

    def two_calls(model: nn.Module) -> Tensor:
        sample = torch.randn(3, 1, 8, 8)
        for now, _ in pairwise(TIMES):
            cond, uncond = (
                model(hidden_states=sample, timestep=torch.full((3,), now), class_labels=torch.tensor(which)).sample
                for which in (labels, null)
            )
            sample = sample - 0.1 * (uncond + 2.0 * (cond - uncond))
        return sample

    def one_batch(model: nn.Module) -> Tensor:
        sample = torch.randn(3, 1, 8, 8)
        both = torch.tensor([*null, *labels])
        for now, _ in pairwise(TIMES):
            double = torch.cat([sample, sample])
            out = model(hidden_states=double, timestep=torch.full((6,), now), class_labels=both).sample
            uncond, cond = out.chunk(2)
            sample = sample - 0.1 * (uncond + 2.0 * (cond - uncond))
        return sample

    a = linearise(lazy, two_calls, None, seed=3, probes=2, max_age=3)
    b = linearise(lazy, one_batch, None, seed=3, probes=2, max_age=3)
    assert a.effects.shape[2] == b.effects.shape[2] == len(TIMES) - 1
    assert a.may_reuse.tolist() == b.may_reuse.tolist() == [False] + [True] * (len(TIMES) - 2)
    torch.testing.assert_close(a.effects, b.effects, rtol=1e-3, atol=1e-4 * float(b.effects.abs().max()))
    schedule = torch.rand(len(TIMES) - 1, len(lazy.branches), generator=torch.Generator().manual_seed(0)) > 0.5
    images = []
    for sampler in (two_calls, one_batch):
        torch.manual_seed(3)
        images.append(run(lazy, sampler, schedule))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
