"""The gate's arithmetic, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lazycompress import gate
from lazycompress.gates import Gates

grids = st.lists(st.integers(0, 2000), min_size=1, max_size=12, unique=True).map(
    lambda values: torch.tensor(sorted(values), dtype=torch.float32)
)


@given(grids, st.lists(st.floats(-100, 2100, width=32), min_size=1, max_size=5))
def test_hat_interpolates_like_numpy(grid: torch.Tensor, times: list[float]) -> None:
    table = torch.arange(len(grid), dtype=torch.float32) ** 2
    found = gate.hat(torch.tensor(times), grid) @ table
    expected = np.interp(times, grid.numpy(), table.numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-3)


@given(grids)
def test_hat_is_one_gate_per_step_at_the_grid_points(grid: torch.Tensor) -> None:
    assert torch.equal(gate.hat(grid, grid), torch.eye(len(grid)))


def score(streams: list[torch.Tensor], dims: list[int], hats: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    """Of gates that do not look at the elapsed time."""
    return gate.score(streams, dims, hats, weight, bias, torch.ones(len(hats)), torch.tensor(0.0))


def valid(
    now: torch.Tensor,
    past: torch.Tensor,
    prints: torch.Tensor,
    past_prints: torch.Tensor,
    direction: float = 1.0,
    phase: float = 0.0,
    began: float = 1e9,
) -> list[bool]:
    times = torch.full((len(past), 4), began)
    found = gate.valid(now, past, prints, past_prints, times, torch.tensor(direction), torch.tensor(phase))
    return found.tolist()


def test_score_is_the_mean_over_tokens_so_resolution_does_not_matter() -> None:
    torch.manual_seed(0)
    stream, weight = torch.randn(2, 16, 8), torch.randn(1, 8)
    hats, bias = torch.ones(2, 1), torch.tensor([0.3])
    small = score([stream], [2], hats, weight, bias)
    large = score([stream.repeat_interleave(4, dim=1)], [2], hats, weight, bias)
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(small, torch.sigmoid(stream.mean(1) @ weight[0] + 0.3))


def test_score_of_feature_maps_and_folded_batches_equals_that_of_tokens() -> None:
    torch.manual_seed(0)
    tokens, weight, hats, bias = torch.randn(2, 12, 8), torch.randn(1, 8), torch.ones(2, 1), torch.zeros(1)
    expected = score([tokens], [2], hats, weight, bias)
    maps = tokens.transpose(1, 2).reshape(2, 8, 3, 4)
    torch.testing.assert_close(score([maps], [1], hats, weight, bias), expected)
    torch.testing.assert_close(score([tokens.reshape(6, 4, 8)], [2], hats, weight, bias), expected)


def test_score_stays_float32_for_a_bfloat16_stream() -> None:
    stream = torch.randn(2, 4, 8).bfloat16()
    assert score([stream], [2], torch.ones(2, 1), torch.randn(1, 8), torch.zeros(1)).dtype is torch.float32


def test_score_falls_with_the_logarithm_of_the_elapsed_time() -> None:
    hats, weight, bias = torch.ones(3, 1), torch.zeros(1, 4), torch.tensor([1.5])
    since = torch.tensor([0.1, 1.0, 20.0])
    found = gate.score([torch.randn(3, 2, 4)], [2], hats, weight, bias, since, torch.tensor(2.0))
    torch.testing.assert_close(found, torch.sigmoid(1.5 - 2 * since.log()))


def test_valid_needs_the_timestep_strictly_past_the_last_one_and_the_same_conditions() -> None:
    past, prints = torch.tensor([500.0, 500.0, 500.0, 500.0]), torch.zeros(4, 3)
    now = torch.tensor([499.0, 500.0, 501.0, 499.0])
    changed = prints.clone()
    changed[3, 1] = 1.0
    assert valid(now, past, changed, prints) == [True, False, False, False]
    assert valid(now, past, changed, prints, direction=-1.0) == [False, False, True, False]


def test_a_second_call_at_one_timestep_goes_on_if_the_sampler_makes_such_calls_but_not_where_the_image_began() -> None:
    now, prints = torch.tensor([500.0]), torch.zeros(1, 3)
    assert valid(now, now, prints, prints, phase=0.0) == [False]
    assert valid(now, now, prints, prints, phase=5.0) == [True]
    assert valid(now, now, prints, prints, phase=5.0, began=500.0) == [False]
    moved = gate.clock(now, now, torch.tensor([True]), torch.tensor(1.0), torch.tensor(5.0))
    assert moved.tolist() == [495.0]


def test_valid_is_false_for_a_state_of_another_batch_size() -> None:
    assert valid(torch.ones(3), torch.full((2,), 9.0), torch.zeros(3, 3), torch.zeros(2, 3)) == [False] * 3


@given(st.lists(st.tuples(st.booleans(), st.lists(st.booleans(), min_size=2, max_size=2)), min_size=1, max_size=12))
def test_elapsed_counts_from_the_last_computation_of_each_branch_and_the_last_two_of_any(
    calls: list[tuple[bool, list[bool]]],
) -> None:
    direction, never = torch.tensor(1.0), -gate.NEVER
    past = torch.full((1, 6), never)
    began = 0.0
    computed: list[list[float]] = [[], [], []]  # of two branches, and of any
    for step, (goes_on, reuse) in enumerate(calls):
        now = torch.tensor([1000.0 - 10 * step])
        goes_on = goes_on and step > 0
        lazy = torch.tensor(reuse).unsqueeze(1) & goes_on
        if goes_on:
            since = gate.elapsed(now, past, direction)[0].tolist()
            assert since[:2] == [began - float(now), 10.0]
            assert since[2:5] == [history[-1] - float(now) for history in computed]
            any_ = computed[-1]
            assert since[5] == (any_[-2] - float(now) if len(any_) > 1 else pytest.approx(gate.SOONEST))
        else:
            began, computed = float(now), [[], [], []]
        for history, reuses in zip(computed, [*lazy[:, 0].tolist(), bool(lazy.all())], strict=True):
            history += [] if reuses else [float(now)]
        past = gate.times(now, past, torch.tensor([goes_on]), lazy, never)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """A schedule [branches, calls], where it may reuse, times of the calls in their order, and the direction."""
    steps = draw(st.integers(2, 20))
    gaps = draw(st.lists(st.integers(1, 60), min_size=steps, max_size=steps))
    times, direction = torch.tensor(gaps, dtype=torch.float32).cumsum(0), draw(st.sampled_from([1, -1]))
    row = st.lists(st.booleans(), min_size=steps, max_size=steps)
    schedule = torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))
    allowed = torch.tensor(draw(st.lists(row, min_size=len(schedule), max_size=len(schedule)))) | schedule
    schedule[:, 0] = allowed[:, 0] = False
    return schedule, allowed, times.flip(0) if direction > 0 else times, direction


@given(schedules())
def test_gates_that_follow_a_schedule_take_its_decisions(
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int],
) -> None:
    schedule, allowed, times, direction = made
    gates = Gates([str(k) for k in range(len(schedule))], [4] * len(schedule), times, direction)
    flip = (lambda table: table.flip(1)) if direction > 0 else (lambda table: table)
    gates.follow(flip(schedule), flip(allowed))
    assert torch.equal(gates.decisions(times), schedule.T)


def test_half_the_steps_reuse_about_half_as_often() -> None:
    times = torch.arange(1000.0, 0, -10)
    schedule = (torch.arange(100) % 4 != 0).unsqueeze(0)  # computes every 40
    gates = Gates(["a"], [4], times)
    gates.follow(schedule.flip(1), torch.ones_like(schedule))
    for steps in (25, 50, 200):
        other = torch.linspace(1000, 1000 / steps, steps)
        computed = int((~gates.decisions(other)).sum())
        assert 20 <= computed <= 34, (steps, computed)


def prints(*conditions: torch.Tensor) -> torch.Tensor:
    return gate.fingerprint(conditions, torch.zeros(len(conditions[0]), 3, 4))


@given(st.integers(1, 3), st.integers(0, 9), st.integers(0, 9))
def test_fingerprint_tells_labels_apart(batch: int, first: int, second: int) -> None:
    a, b = prints(torch.full((batch,), first)), prints(torch.full((batch,), second))
    assert gate.same(a, b).tolist() == [first == second] * batch
    assert a.shape == (batch, 3)


@given(st.lists(st.integers(-1000, 250_000), min_size=1, max_size=300), st.integers(0, 299), st.integers(1, 200_000))
def test_fingerprint_tells_token_ids_apart(ids: list[int], place: int, by: int) -> None:
    one = torch.tensor([ids])
    other = one.clone()
    other[0, place % len(ids)] += by
    assert not gate.same(prints(one), prints(other))
    spread = torch.zeros(1, 3 * len(ids), dtype=torch.int64)[:, ::3].copy_(one)
    assert torch.equal(prints(one), prints(spread))


def test_fingerprint_sees_a_swap_of_two_tokens() -> None:
    text = torch.randn(1, 5, 8)
    swapped = text[:, [1, 0, 2, 3, 4]]
    assert not gate.same(prints(text), prints(swapped))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.sampled_from([(1, 4), (77, 768), (512, 2048)]), st.sampled_from([1e-6, 1e-3, 3e4]))
def test_fingerprint_does_not_see_rounding(seed: int, shape: tuple[int, int], scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    text = scale * torch.randn(2, *shape, generator=random)
    rounded = text * (1 + 2e-6 * torch.randn(text.shape, generator=random))
    assert gate.same(prints(text), prints(rounded)).all()
    other = text + 0.02 * scale * torch.randn(text.shape, generator=random)
    assert not gate.same(prints(text), prints(other)).any()


def test_what_is_not_finite_is_the_same_as_nothing() -> None:
    for value in (float("nan"), float("inf")):
        found = prints(torch.full((1, 4), value))
        assert not gate.same(found, found)
