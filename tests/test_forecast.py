"""Forecast outputs of calls that compute nothing: what they are, against hooks on the original's own modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lazycompress import gate
from lazycompress.gates import Gates
from lazycompress.integrations.digits.model import digits_sampler, draw_noise
from lazycompress.runtime import LazyModel, wrap
from lazycompress.train.schedule import Limits, Planner
from lazycompress.train.trajectory import Effects, linearise, run
from lazycompress.train.whole import of_whole

STEPS = 12


def random_schedule(seed: int, branches: int = 12, steps: int = STEPS) -> Tensor:
    """Bool [steps, branches]: about a third reuse, and everything at about a third of the steps, at the first nothing."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.rand(steps, branches, generator=generator) < 0.4
    schedule[torch.rand(steps, generator=generator) < 0.4] = True
    schedule[0] = False
    return schedule


def following(schedule: Tensor, order: int = 1) -> LazyModel:
    """The digits model, captured once, with gates that take a schedule's decisions."""
    lazy = captured()
    times = torch.tensor([float(t) for t in digits_timesteps()])
    gates = Gates([b.name for b in lazy.branches], [b.width for b in lazy.branches], times)
    gates.order.fill_(order)
    gates.follow(schedule.T.flip(1), torch.ones_like(schedule.T))
    lazy.set_gates(gates)
    lazy.reset()
    return lazy


@cache
def captured() -> LazyModel:
    return wrap(_digits(), (), example())


def digits_timesteps() -> list[int]:
    from lazycompress.integrations.digits.model import build_scheduler

    scheduler = build_scheduler()
    scheduler.set_timesteps(STEPS)
    return [int(t) for t in scheduler.timesteps]


def _digits() -> nn.Module:
    from lazycompress.integrations.digits.model import load_bundled

    return load_bundled()


def example() -> dict[str, Tensor]:
    return {
        "hidden_states": draw_noise(2),
        "timestep": torch.full((2,), 900),
        "class_labels": torch.arange(2),
    }


def sample(model: nn.Module, batch: int = 3, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return digits_sampler(draw_noise(batch, seed), torch.arange(batch), STEPS)(model)


@contextmanager
def hooked(model: nn.Module, schedule: Tensor, order: int) -> Iterator[None]:
    """The schedule on the original's attention and feed-forward modules and its output, with nothing of the package."""
    modules = [part for block in model.transformer_blocks for part in (block.attn1, block.ff)]
    times = digits_timesteps()
    calls = [0] * (len(modules) + 1)
    kept: dict[int, Tensor] = {}
    outputs: list[tuple[int, Tensor]] = []

    def hook_of(k: int):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            step = calls[k]
            calls[k] += 1
            if not bool(schedule[step, k]):
                kept[k] = output
            return kept[k]

        return hook

    def whole(module: nn.Module, args: object, output: object) -> object:
        step = calls[-1]
        calls[-1] += 1
        value: Tensor = output[0]  # type: ignore[index]
        if not bool(schedule[step].all()):
            outputs.append((times[step], value))
            return output
        if order:
            points = outputs[-1 - order :]
            value = torch.zeros_like(value)
            for t, computed in points:
                others = [other for other, _ in points if other != t]
                value += computed * float(np.prod([(times[step] - other) / (t - other) for other in others]))
        return (value,) if isinstance(output, tuple) else type(output)(sample=value)

    handles = [module.register_forward_hook(hook_of(k)) for k, module in enumerate(modules)]
    handles.append(model.register_forward_hook(whole))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_reuse_equals_hooks_on_the_original(order: int, seed: int) -> None:
    schedule = random_schedule(seed)
    lazy = following(schedule, order)
    found = sample(lazy)
    assert torch.equal(lazy.usage.heatmap()[1].bool(), schedule)
    assert 0 < int(schedule.all(dim=1).sum()) < STEPS - 1
    with hooked(lazy.model, schedule, order):
        expected = sample(lazy.model)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert float((expected - sample(lazy.model)).abs().max()) > 1e-2


@pytest.mark.parametrize("order", [1, 2])
def test_two_images_in_a_row_and_singles_equal_fresh_starts(order: int) -> None:
    lazy = following(random_schedule(2), order)
    together = sample(lazy, batch=4)
    again = sample(lazy, batch=4)
    assert torch.equal(together, again)
    with torch.no_grad():
        singles = [digits_sampler(draw_noise(4)[k : k + 1], torch.arange(4)[k : k + 1], STEPS)(lazy) for k in range(4)]
    torch.testing.assert_close(together, torch.cat(singles), rtol=0, atol=2e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_controllers_run_equals_the_gates_run(order: int) -> None:
    """What training judges is what will run."""
    schedule = random_schedule(3)
    lazy = following(schedule, order)
    sampler = digits_sampler(draw_noise(3), torch.arange(3), STEPS)
    torch.testing.assert_close(run(lazy, sampler, schedule), sample(lazy), rtol=0, atol=2e-5)


@given(
    st.lists(st.floats(0.5, 40), min_size=4, max_size=8),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2**31 - 1),
)
def test_a_value_that_moves_along_a_polynomial_is_met_exactly(
    gaps: list[float], batch: int, scale: int, order: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(order + 1, batch * scale, 4, dtype=torch.float64, generator=generator)
    times = (1000 - torch.tensor(gaps, dtype=torch.float64).cumsum(0)).float()
    lazy_at = torch.rand(len(gaps), batch, generator=generator) < 0.5
    lazy_at[: order + 1] = False
    some = torch.rand(len(gaps), batch, generator=generator) < 0.5  # of two branches one may be reused all the same
    cache, *rates = torch.zeros(order + 1, batch * scale, 4, dtype=torch.float64)
    past = torch.full((batch, 6), -gate.NEVER)
    for step, now in enumerate(times):
        goes_on = torch.full((batch,), step > 0)
        elapsed = gate.elapsed(now.expand(batch), past, torch.tensor(1.0))
        pace = gate.pace(elapsed, goes_on, 7.0)
        place = (float(now) - 900) / 50
        fresh = sum(factor * place**k for k, factor in enumerate(factors))
        assert isinstance(fresh, Tensor)
        lazy = lazy_at[step]
        value = gate.forecast(
            torch.where(lazy.repeat_interleave(scale)[:, None], torch.nan, fresh), cache, rates, lazy, pace, scale
        )
        rates = [gate.hold(fresh, cache, rates, lazy, pace, scale, which) for which in range(order)]
        cache = value
        past = gate.times(now.expand(batch), past, goes_on, torch.stack([lazy, lazy | some[step]]), -gate.NEVER)
        # The clock is float32: gaps of half a unit at 1000 are known to 1e-4 of their length.
        torch.testing.assert_close(cache, fresh, rtol=1e-2, atol=5e-2)


def planner_of(effects: Tensor, times: Tensor, order: int) -> Planner:
    samples, probes, steps, branches, _ = effects.shape
    made = Effects(
        effects, effects[..., :1, :], torch.zeros(samples, probes), torch.zeros(samples), times.float(), times.double(),
        torch.ones(steps).bool(), 0.0, torch.zeros(samples, 1),
    )  # fmt: skip
    return Planner(made, [1] * branches, Limits(np.ones((steps, branches), dtype=bool), 3), order)


def test_the_planner_prices_a_line_through_the_last_two_computations() -> None:
    """Outputs that move with the timestep: repeating them costs, going on along the line costs nothing."""
    times = torch.tensor([100.0, 90, 70, 40, 30, 10])
    effects = torch.zeros(2, 1, 6, 1, 8)
    for t in range(6):
        for age in range(t + 1):
            effects[:, :, t, 0, age] = times[t - age] - times[t]
    schedule = np.array([0, 0, 1, 0, 1, 1], dtype=bool)[:, None]
    assert planner_of(effects, times, 1).predicted(schedule) == pytest.approx(0.0, abs=1e-9)
    assert planner_of(effects, times, 0).predicted(schedule) == pytest.approx((20 + 10 + 30) ** 2)
    # With a single computation before it there is no line yet.
    early = np.array([0, 1, 0, 0, 0, 0], dtype=bool)[:, None]
    assert planner_of(effects, times, 1).predicted(early) == pytest.approx(10.0**2)


def test_the_planner_prices_a_parabola_through_the_last_three_computations() -> None:
    times = torch.tensor([100.0, 90, 70, 40, 30, 10])
    effects = torch.zeros(2, 1, 6, 1, 12)
    for t in range(6):
        for age in range(t + 1):
            effects[:, :, t, 0, age] = times[t - age] ** 2 - times[t] ** 2
    schedule = np.array([0, 0, 0, 1, 0, 1], dtype=bool)[:, None]
    assert planner_of(effects, times, 2).predicted(schedule) == pytest.approx(0.0, abs=1e-6)
    assert planner_of(effects, times, 1).predicted(schedule) > 1e4


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow(seconds=10))])
def test_effects_around_a_schedule_predict_what_one_more_forecast_does(order: int) -> None:
    schedule = (torch.arange(STEPS) % 3 == 2).unsqueeze(1).expand(STEPS, 12).clone()
    lazy = following(schedule, order)
    lazy.gates.order.fill_(order)
    sampler = digits_sampler(draw_noise(8), torch.arange(8), STEPS)
    effects = linearise(lazy, sampler, schedule, seed=0, probes=16, max_age=3)
    before = run(lazy, sampler, schedule)
    limits = Limits(np.ones((STEPS, 12), dtype=bool), 3)
    planner = of_whole(effects, limits, order)
    planner.scale = float("inf")
    dense = run(lazy, sampler, None)
    predicted, measured = [], []
    for step in (4, 5, 7, 8, 10):
        more = schedule.clone()
        more[step] = ~more[step]
        image = run(lazy, sampler, more)
        change = (image - before).square().flatten(1).mean(1)
        column = planner.column(0, more[:, 0].numpy()) - planner.column(0, schedule[:, 0].numpy())
        predicted.append(float((column**2).mean()))
        measured.append(float(change.mean()))
    ratio = np.array(predicted) / np.array(measured)
    assert np.all((ratio > 0.4) & (ratio < 2.5)), (predicted, measured)
    assert float((before - dense).square().mean()) > 0


@pytest.mark.slow(seconds=15)
def test_outputs_in_half_precision_are_forecast_in_full() -> None:
    """Their state is float32: a value that moves on call by call would lose its digits in 8 bits."""
    schedule = random_schedule(5)
    lazy = following(schedule, 2)
    expected = sample(lazy)
    half = wrap(_digits(), (), example(), lambda _: copy.deepcopy(lazy.gates)).to(torch.bfloat16)
    with torch.no_grad():
        found = digits_sampler(draw_noise(3).bfloat16(), torch.arange(3), STEPS)(half).float()
    assert torch.equal(half.usage.heatmap()[1].bool(), schedule)
    assert float((found - expected).square().mean()) < 0.05 * float(expected.square().mean())
    program = half.program(half.example)
    kept = [spec for spec in program.lowered.state if spec.name.startswith(("past_output", "past_slope", "past_curve"))]
    assert [spec.dtype for spec in kept] == [torch.float32] * 3
