"""Requests of one prompt, in turns or in threads: in graphs, too, each image equals its own lone run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lazycompress
from lazycompress.errors import InputError
from lazycompress.runtime import LazyModel, wrap

from .conftest import make_lively_gates

TIMES = tuple(range(980, 0, -140))
LABELS = (1, 2)
NOTHING = (9, 9)


def noise(seed: int) -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def captured(short: nn.Module) -> LazyModel:
    first = {"hidden_states": noise(0), "timestep": torch.full((2,), 980), "class_labels": torch.tensor(LABELS)}
    return wrap(short, (), first, make_lively_gates)


@pytest.fixture
def lazy(captured: LazyModel) -> LazyModel:
    captured.policy = "learned"
    captured.reset()
    return captured


def steps(
    lazy: LazyModel,
    seed: int,
    labels: tuple[int, ...] = LABELS,
    guided: bool = False,
    named: bool = False,
    start: int = 0,
) -> Iterator[Tensor]:
    """One request, a step at a time: an ODE's sampler, with guidance in two calls if asked for."""
    x = noise(seed)
    for now in TIMES[start:]:
        outputs = []
        for name, which in (("cond", labels), ("uncond", NOTHING))[: 1 + guided]:
            inside: AbstractContextManager[None] = lazy.cache_context(name) if named else nullcontext()
            with torch.no_grad(), inside:
                result = lazy(hidden_states=x, timestep=torch.full((2,), now), class_labels=torch.tensor(which)).sample
            outputs.append(result[:, :1])
        x = x - 0.1 * (outputs[-1] + 2.0 * (outputs[0] - outputs[-1]))
        yield x


def last(run: Iterator[Tensor]) -> Tensor:
    *_, image = run
    return image


def alone(lazy: LazyModel, make: Callable[[], Iterator[Tensor]]) -> tuple[Tensor, float]:
    """The image of a lone run, and how much of it was reused."""
    lazy.reset()
    image = last(make())
    reused = lazy.summary().skip_ratio
    lazy.reset()
    return image, reused


@settings(max_examples=12, deadline=None)
@given(
    order=st.lists(st.integers(0, 2), min_size=6, max_size=30),
    seeds=st.lists(st.integers(0, 4), min_size=3, max_size=3, unique=True),
    guided=st.booleans(),
    named=st.booleans(),
)
def test_requests_of_one_prompt_in_any_turns_equal_their_lone_runs(
    captured: LazyModel, order: list[int], seeds: list[int], guided: bool, named: bool
) -> None:
    makes = [lambda seed=seed: steps(captured, seed, guided=guided, named=named) for seed in seeds]
    expected = [alone(captured, make) for make in makes]
    runs = [make() for make in makes]
    found: list[Tensor | None] = [None, None, None]
    for which in [*order, *[k for _ in TIMES for k in range(3)]]:
        found[which] = next(runs[which], found[which])
    for ours, (theirs, _) in zip(found, expected, strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)
    shares = [reused for _, reused in expected]
    assert min(shares) > 0.1
    assert captured.summary().skip_ratio == pytest.approx(sum(shares) / 3)


def test_prompts_in_lock_step_with_one_negative_prompt(lazy: LazyModel) -> None:
    makes = [
        lambda k=k, labels=labels: steps(lazy, k, labels, guided=True) for k, labels in enumerate([(1, 2), (3, 4)])
    ]
    expected = [alone(lazy, make)[0] for make in makes]
    for step in zip(*(make() for make in makes), strict=True):
        found = step
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


class Request:
    """One image of the one prompt, a sample of whatever batch it is in."""

    def __init__(self, seed: int) -> None:
        self.x = noise(seed)[:1]
        self.step = 0

    def take(self, output: Tensor) -> None:
        self.x = self.x - 0.1 * output[None, :1]
        self.step += 1


def together(lazy: LazyModel, requests: list[Request]) -> None:
    """One step of each of them, in one call."""
    with torch.no_grad():
        outputs = lazy(
            hidden_states=torch.cat([one.x for one in requests]),
            timestep=torch.tensor([TIMES[one.step] for one in requests]),
            class_labels=torch.ones(len(requests), dtype=torch.int64),
        ).sample
    for one, output in zip(requests, outputs, strict=True):
        one.take(output)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True), max_size=14))
def test_samples_join_leave_and_change_places(captured: LazyModel, batches: list[list[int]]) -> None:
    captured.policy = "learned"
    captured.reset()
    found = [Request(seed) for seed in range(5)]
    for batch in batches:
        going = [found[k] for k in batch if found[k].step < len(TIMES)]
        if going:
            together(captured, going)
    for ours, seed in zip(found, range(5), strict=True):
        lone = Request(seed)
        captured.reset()
        for _ in range(ours.step):
            together(captured, [lone])
        torch.testing.assert_close(ours.x, lone.x, rtol=0, atol=1e-5)


def test_samples_that_change_places_skip_as_much(lazy: LazyModel) -> None:
    lazy.policy = "reuse"
    requests = [Request(seed) for seed in range(3)]
    for places in ([0, 1, 2], [2, 0, 1], [1], [2, 1, 0], [0, 2]):
        together(lazy, [requests[k] for k in places])
    assert lazy.summary().skip_ratio == pytest.approx(9 / 12)
    together(lazy, [requests[1], Request(7)])
    assert lazy.summary().skip_ratio == pytest.approx(10 / 14)


def test_another_image_in_the_midst_of_the_timesteps_begins_anew(lazy: LazyModel) -> None:
    """Of the same prompt, by hand, after an image that was left there: nothing but the latents says so."""
    lazy.policy = "reuse"
    left = steps(lazy, 0)
    for _ in range(3):
        next(left)
    of_other, _ = alone(lazy, lambda: steps(lazy, 2, start=3))
    left = steps(lazy, 0)
    for _ in range(3):
        next(left)
    assert torch.equal(last(steps(lazy, 2, start=3)), of_other)


def test_an_image_that_begins_in_the_midst_is_not_one_that_was_left_there(lazy: LazyModel) -> None:
    """Request A stops; B of the same prompt begins, and C in the midst of the timesteps, past A's last one."""
    lazy.policy = "reuse"
    makes = [lambda: steps(lazy, 1), lambda: steps(lazy, 2, start=4)]
    (of_b, _), (of_c, _) = (alone(lazy, make) for make in makes)
    interrupted, b, c = steps(lazy, 0), *(make() for make in makes)
    for _ in range(3):
        next(interrupted)
    first = next(b)
    assert torch.equal(last(c), of_c)
    assert torch.equal(last(iter([first, *b])), of_b)


@pytest.mark.parametrize("how", ["by latents", "named", "scoped"])
def test_threads_do_not_see_each_other(lazy: LazyModel, how: str) -> None:
    makes = [lambda k=k: steps(lazy, k, guided=True, named=how == "named") for k in range(3)]
    expected = [alone(lazy, make) for make in makes]
    found: dict[int, Tensor] = {}
    gate = threading.Barrier(3)

    def work(k: int) -> None:
        inside: AbstractContextManager[None] = lazycompress.image(lazy) if how == "scoped" else nullcontext()
        with inside:
            for image in makes[k]():
                found[k] = image
                gate.wait(20)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], expected[k][0]) for k in range(3))
    assert lazy.summary().skip_ratio == pytest.approx(sum(reused for _, reused in expected) / 3)
    if how == "scoped":
        assert len(lazy._states) == 0


def test_an_image_of_a_stochastic_sampler_is_opened_and_over(lazy: LazyModel) -> None:
    """Nothing explains its latents, so what began inside of the block goes on there, and nothing does after it."""
    lazy.policy = "reuse"
    with lazycompress.image(lazy):
        for k, now in enumerate(TIMES[:4]):
            call(lazy, k, now)
    assert lazy.summary().skip_ratio == pytest.approx(3 / 4)
    with lazycompress.image(lazy), torch.no_grad():
        dense = lazy.model(
            hidden_states=noise(4), timestep=torch.full((2,), TIMES[4]), class_labels=torch.tensor(LABELS)
        ).sample
        assert torch.equal(call(lazy, 4, TIMES[4]), dense)


def test_two_runs_of_a_stochastic_sampler_at_once_go_on_with_their_own(lazy: LazyModel) -> None:
    lazy.policy = "reuse"
    gate = threading.Barrier(2)

    def work(run: int) -> None:
        with lazycompress.image(lazy):
            for k, now in enumerate(TIMES):
                gate.wait(20)
                call(lazy, 10 * run + k, now)

    threads = [threading.Thread(target=work, args=(run,)) for run in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lazy.summary().skip_ratio == pytest.approx(1 - 1 / len(TIMES))


def call(lazy: LazyModel, seed: int, now: int) -> Tensor:
    with torch.no_grad():
        found: Tensor = lazy(
            hidden_states=noise(seed), timestep=torch.full((2,), now), class_labels=torch.tensor(LABELS)
        ).sample
    return found


def test_a_second_call_at_a_timestep_is_one_of_the_same_image(lazy: LazyModel) -> None:
    """As second-order samplers make them, and timesteps that are rounded; another request's call is not."""
    x = noise(0)
    for now in (980, 840, 840, 700):
        with torch.no_grad():
            x = (
                x
                - 0.1
                * lazy(hidden_states=x, timestep=torch.full((2,), now), class_labels=torch.tensor(LABELS)).sample[:, :1]
            )
        assert lazy.context == 0
    call(lazy, 1, 700)
    assert lazy.context == 1


def test_no_image_is_opened_for_what_is_not_lazy(short: nn.Module) -> None:
    with pytest.raises(InputError, match="is not lazy: there is no image to open"), lazycompress.image(short):
        pass
