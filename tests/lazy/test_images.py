"""Each image equals its own lone run, whatever runs before it or beside it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lazycompress
from lazycompress.lazy.calls import Reader
from lazycompress.lazy.engine import Engine
from lazycompress.lazy.model import LazyModule
from lazycompress.plan.plan import Plan, even

from .models import STEPS, TIMES, Denoiser, alone, last, make_lazy, noise, prompt, steps

SKIPPED = 0.6


def test_compute_is_the_module_itself_and_learned_skips() -> None:
    lazy = make_lazy()
    dense = last(steps(lazy.model, noise(0), prompt(0)))
    learned = alone(lazy, noise(0), prompt(0))
    assert not torch.equal(learned, dense)
    lazy.model.ran.clear()
    assert torch.equal(last(steps(lazy, noise(0), prompt(0))), learned)
    assert len(lazy.model.ran) == round(STEPS * (1 - SKIPPED))
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)
    lazy.policy = "compute"
    assert torch.equal(last(steps(lazy, noise(0), prompt(0))), dense)


@settings(max_examples=25, deadline=None)
@given(
    order=st.lists(st.integers(0, 2), min_size=12, max_size=60),
    prompts=st.lists(st.integers(0, 1), min_size=3, max_size=3),
    seeds=st.lists(st.integers(0, 5), min_size=3, max_size=3),
)
def test_requests_in_any_turns_equal_their_lone_runs(order: list[int], prompts: list[int], seeds: list[int]) -> None:
    lazy = make_lazy()
    expected = [alone(lazy, noise(seed), prompt(p)) for seed, p in zip(seeds, prompts, strict=True)]
    runs = [steps(lazy, noise(seed), prompt(p)) for seed, p in zip(seeds, prompts, strict=True)]
    found: list[Tensor | None] = [None, None, None]
    for which in [*order, *[k for _ in range(STEPS) for k in range(3)]]:
        found[which] = next(runs[which], found[which])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)


def test_large_batches_of_one_prompt_skip_their_share_and_may_be_shuffled() -> None:
    """More samples than are kept of single requests, all of one prompt; half-way they change places."""
    lazy, batch = make_lazy(), 150
    x, same = noise(3, batch), prompt(0).expand(batch, 5)
    expected = alone(lazy, x, same)
    lazy.reset()
    latents = last(itertools.islice(steps(lazy, x, same), STEPS // 2))
    places = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    found = last(steps(lazy, latents[places], same, TIMES[STEPS // 2 :]))
    torch.testing.assert_close(found, expected[places], rtol=0, atol=1e-5)
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)


@pytest.mark.parametrize("apart", [0.0, 0.03])
def test_samples_that_are_alike_keep_apart_when_they_change_places(apart: float) -> None:
    """Two and two samples of one prompt from equal noise, or noise that is nearly equal; half-way they change places."""
    lazy, same = make_lazy(), prompt(0).expand(4, 5)
    x = noise(3, 2)[[0, 1, 0, 1]] + apart * noise(4, 4)
    places = [2, 3, 0, 1] if apart else [1, 0, 3, 2]  # each where one that is not, or is, quite like it was
    expected = torch.cat([alone(lazy, row[None], prompt(0)) for row in x])
    lazy.reset()
    latents = last(itertools.islice(steps(lazy, x, same), STEPS // 2))
    found = last(steps(lazy, latents[places], same, TIMES[STEPS // 2 :]))
    torch.testing.assert_close(found, expected[places], rtol=0, atol=1e-6)
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)


def test_an_interrupted_image_leaves_nothing_to_the_next() -> None:
    lazy = make_lazy()
    for interrupted_at in (1, 4, 9):
        for start in (2, 5):
            expected = alone(lazy, noise(1), prompt(0), TIMES[start:])
            run = steps(lazy, noise(0), prompt(0))
            for _ in range(interrupted_at):
                next(run)
            assert torch.equal(last(steps(lazy, noise(1), prompt(0), TIMES[start:])), expected)


def test_threads_do_not_see_each_other() -> None:
    lazy = make_lazy()
    expected = [alone(lazy, noise(k), prompt(0)) for k in range(3)]
    found: dict[int, Tensor] = {}
    gate = threading.Barrier(3)

    def work(k: int) -> None:
        for x in steps(lazy, noise(k), prompt(0)):
            found[k] = x
            gate.wait(20)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], expected[k]) for k in range(3))
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)


def guided(model: LazyModule, x: Tensor, condition: Tensor, batched: bool) -> Iterator[Tensor]:
    """Guidance with a negative prompt that all requests share, in one batch or in two calls."""
    for now in TIMES:
        time = torch.full((x.shape[0],), now)
        negative = prompt(9, x.shape[0])
        with torch.no_grad():
            if batched:
                both = model(torch.cat([x, x]), time.repeat(2), condition=torch.cat([condition, negative]))
                c, u = both.chunk(2)
            else:
                c, u = model(x, time, condition), model(x, time, condition=negative)
            x = x - 0.1 * (u + 3.0 * (c - u))
        yield x


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_of_several_requests_in_lock_step(batched: bool) -> None:
    lazy = make_lazy()
    requests = [(noise(0), prompt(0)), (noise(1), prompt(0)), (noise(2), prompt(1))]
    expected = []
    for x, condition in requests:
        lazy.reset()
        expected.append(last(guided(lazy, x, condition, batched)))
        assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)
    lazy.reset()
    runs = [guided(lazy, x, condition, batched) for x, condition in requests]
    for _ in range(STEPS):
        found = [next(run) for run in runs]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)


def test_samples_join_and_leave_a_batch_at_different_timesteps() -> None:
    lazy = make_lazy()
    starts = [0, 3, 4, 8]
    expected = [alone(lazy, noise(k), prompt(k % 2)) for k in range(4)]
    latents = [noise(k) for k in range(4)]
    order = torch.Generator().manual_seed(0)
    for tick in range(STEPS + max(starts)):
        active = [k for k in range(4) if 0 <= tick - starts[k] < STEPS]
        active = [active[i] for i in torch.randperm(len(active), generator=order).tolist()]
        x = torch.cat([latents[k] for k in active])
        time = torch.tensor([TIMES[tick - starts[k]] for k in active])
        with torch.no_grad():
            given = lazy(x, time, condition=torch.cat([prompt(k % 2) for k in active]))
        for row, k in enumerate(active):
            latents[k] = latents[k] - 0.1 * given[row : row + 1]
    # Another batch rounds otherwise; a wrong reuse is off by a thousand times more.
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(latents, expected, strict=True))
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_dies_with_its_image(bad: float) -> None:
    lazy = make_lazy()
    expected = [alone(lazy, noise(k), prompt(0)) for k in range(2)]
    x = torch.cat([noise(0), noise(1)])
    for k, now in enumerate(TIMES):
        with torch.no_grad():
            x = x - 0.1 * lazy(x, torch.full((2,), now), condition=prompt(0).repeat(2, 1))
        if k == 3:
            x = torch.cat([x[:1], x[1:] * bad])
    assert torch.allclose(x[:1], expected[0], atol=1e-5)
    assert not x[1:].isfinite().all()
    for _ in range(2):
        assert torch.equal(last(steps(lazy, noise(1), prompt(0))), expected[1])


def test_latents_changed_in_place_are_no_matter() -> None:
    lazy = make_lazy()
    expected = alone(lazy, noise(0), prompt(0))
    x = noise(0)
    for now in TIMES:
        with torch.no_grad():
            x.sub_(0.1 * lazy(x, torch.full((1,), now), prompt(0)))
    assert torch.equal(x, expected)


def test_equal_requests_in_lock_step_are_not_taken_for_one() -> None:
    lazy = make_lazy()
    expected = alone(lazy, noise(0), prompt(0))
    one, two = steps(lazy, noise(0), prompt(0)), steps(lazy, noise(0), prompt(0))
    for _ in range(STEPS):
        found = next(one), next(two)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)


def stochastic(model: LazyModule, seed: int) -> Tensor:
    x, generator = noise(seed), torch.Generator().manual_seed(50 + seed)
    for now in TIMES:
        with torch.no_grad():
            given = model(x, torch.full((1,), now), prompt(0))
        x = 0.6 * x - 0.1 * given + 0.8 * torch.randn(x.shape, generator=generator)
    return x


def test_a_sampler_that_adds_noise_reuses_within_a_scope_alone() -> None:
    lazy = make_lazy()
    dense = stochastic(lazy.model, 0)
    assert torch.equal(stochastic(lazy, 0), dense)
    assert lazy.summary().skip_ratio == 0.0
    found = []
    for _ in range(2):
        lazy.reset()
        with lazycompress.image(lazy):
            found.append(stochastic(lazy, 0))
        assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)
    assert torch.equal(*found)
    # Without the scope its image is over.
    with lazycompress.image(lazy):
        assert torch.equal(stochastic(lazy, 0), found[0])


def test_a_scope_tells_the_timesteps() -> None:
    lazy = make_lazy(share=0.5)
    times = [990.0, 700.0, 333.0, 100.0]
    with lazycompress.image(lazy, timesteps=times):
        last(steps(lazy, noise(0), prompt(0), times))
    assert lazy.summary().skip_ratio == pytest.approx(0.5)


@pytest.mark.parametrize("count", [4, 8, 10, 20, 50, 100])
def test_any_number_of_steps_gets_its_share(count: int) -> None:
    lazy = make_lazy(share=0.5)
    times = [1000.0 * (1 - k / count) for k in range(count)]
    last(steps(lazy, noise(0), prompt(0), times))
    assert lazy.summary().skip_ratio == pytest.approx(0.5, abs=0.13 if count < 10 else 0.06)


def heun(model: LazyModule, x: Tensor, condition: Tensor) -> Tensor:
    """Two calls at each timestep but the first, as diffusers' second-order samplers make them."""
    with torch.no_grad():
        for now, after in itertools.pairwise(TIMES):
            one = model(x, torch.full((1,), now), condition)
            two = model(x - 0.1 * one, torch.full((1,), after), condition)
            x = x - 0.05 * (one + two)
    return x


def test_a_second_call_at_a_timestep_goes_on_with_the_image() -> None:
    times = [t for now, after in itertools.pairwise(TIMES) for t in (now, after)]
    # Where the second call is not computed, it gives the first one's output, and so the next latents are the same again.
    lazy = make_lazy(plan=even(times, 0.5))
    for _ in range(2):
        lazy.reset()
        with lazycompress.image(lazy):
            heun(lazy, noise(0), prompt(0))
        assert lazy.summary().images == 1
        assert lazy.summary().skip_ratio == pytest.approx(0.5)
    lazy = make_lazy(plan=Plan(tuple(times), tuple(k < 3 or k % 2 == 0 for k in range(len(times)))))
    first = heun(lazy, noise(0), prompt(0))
    assert lazy.summary().images == 1
    assert torch.equal(heun(lazy, noise(0), prompt(0)), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float64])
def test_timesteps_of_any_dtype_even_where_they_round_to_the_same(dtype: torch.dtype) -> None:
    lazy = make_lazy(share=0.5)
    count = 500 if dtype is torch.bfloat16 else 50
    x, times = noise(0), [1000.0 * (1 - k / count) for k in range(count)]
    for now in times:
        with torch.no_grad():
            x = x - 1 / count * lazy(x, torch.full((1,), now).to(dtype), prompt(0))
    assert lazy.summary().images == 1
    assert lazy.summary().skip_ratio == pytest.approx(0.5, abs=0.03)


def test_timesteps_for_each_token_and_plain_numbers() -> None:
    class Tokens(Denoiser):
        def forward(self, x: Tensor, timestep: Tensor, condition: Tensor, **more: object) -> Tensor:  # type: ignore[override]
            return super().forward(x, timestep.amax(dim=1), condition)

    model = Tokens().eval()
    lazy = LazyModule(model, Engine(Reader.of(model), even(TIMES, 0.4)))
    x = noise(0)
    for now in TIMES:
        with torch.no_grad():
            x = x - 0.1 * lazy(x, torch.cat([torch.zeros(1, 4), torch.full((1, 12), now)], dim=1), prompt(0))
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)
    numbers = make_lazy()
    expected = alone(numbers, noise(0), prompt(0))
    x = noise(0)
    for now in TIMES:
        with torch.no_grad():
            x = x - 0.1 * numbers(x, now, prompt(0))
    assert torch.equal(x, expected)
    assert numbers.summary().skip_ratio == pytest.approx(SKIPPED)


def test_layout_and_rounding_decide_nothing() -> None:
    lazy = make_lazy()
    expected = alone(lazy, noise(0, 2), prompt(0, 2))
    x = noise(0, 2)
    for k, now in enumerate(TIMES):
        wide = torch.cat([x, x], dim=2)[..., :6] if k % 2 else x.transpose(1, 2).contiguous().transpose(1, 2)
        condition = prompt(0, 2) * (1 + 1e-6 * k)
        with torch.no_grad():
            x = x - 0.1 * lazy(wide, torch.full((2,), now), condition)
    assert torch.allclose(x, expected, atol=1e-4)
    assert lazy.summary().skip_ratio == pytest.approx(SKIPPED)


def test_another_condition_or_constant_is_another_image() -> None:
    lazy = make_lazy()
    x = noise(0)
    with torch.no_grad():
        lazy(x, TIMES[0], prompt(0))
        given = lazy(x, TIMES[1], prompt(1))
        assert torch.equal(given, lazy.model(x, TIMES[1], prompt(1)))
        lazy(x, TIMES[0], prompt(2), scale=2.0)
        assert torch.equal(lazy(x, TIMES[1], prompt(2), scale=3.0), lazy.model(x, TIMES[1], prompt(2), scale=3.0))
    assert lazy.summary().skipped == 0


def test_a_call_that_cannot_be_read_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    lazy = make_lazy()
    with torch.no_grad(), pytest.raises(RuntimeError):
        lazy(torch.zeros(2), 1.0, prompt(0))  # the module's own error
    assert lazy.summary().unread == 1
    assert len(caplog.records) == 1
    assert torch.equal(last(steps(lazy, noise(0), prompt(0))), alone(lazy, noise(0), prompt(0)))


def test_a_call_that_fails_is_forgotten() -> None:
    lazy = make_lazy()
    expected = alone(lazy, noise(0), prompt(0))
    with pytest.raises(RuntimeError):
        lazy(noise(0), TIMES[0], prompt(0), extra=torch.zeros(7, 7))
    assert torch.equal(last(steps(lazy, noise(0), prompt(0))), expected)
