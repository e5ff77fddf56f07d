"""The gate's arithmetic, against its definition."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazycompress import gate

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


def test_score_is_the_mean_over_tokens_so_resolution_does_not_matter() -> None:
    torch.manual_seed(0)
    stream, weight = torch.randn(2, 16, 8), torch.randn(1, 8)
    hats, bias = torch.ones(2, 1), torch.tensor([0.3])
    small = gate.score([stream], [2], hats, weight, bias)
    large = gate.score([stream.repeat_interleave(4, dim=1)], [2], hats, weight, bias)
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(small, torch.sigmoid(stream.mean(1) @ weight[0] + 0.3))


def test_score_of_feature_maps_and_folded_batches_equals_that_of_tokens() -> None:
    torch.manual_seed(0)
    tokens, weight, hats, bias = torch.randn(2, 12, 8), torch.randn(1, 8), torch.ones(2, 1), torch.zeros(1)
    expected = gate.score([tokens], [2], hats, weight, bias)
    maps = tokens.transpose(1, 2).reshape(2, 8, 3, 4)
    torch.testing.assert_close(gate.score([maps], [1], hats, weight, bias), expected)
    torch.testing.assert_close(gate.score([tokens.reshape(6, 4, 8)], [2], hats, weight, bias), expected)


def test_score_stays_float32_for_a_bfloat16_stream() -> None:
    stream = torch.randn(2, 4, 8).bfloat16()
    assert gate.score([stream], [2], torch.ones(2, 1), torch.randn(1, 8), torch.zeros(1)).dtype is torch.float32


def test_valid_needs_the_timestep_strictly_past_the_last_one_and_the_same_conditions() -> None:
    past, prints = torch.tensor([500.0, 500.0, 500.0, 500.0]), torch.zeros(4, 2)
    now = torch.tensor([499.0, 500.0, 501.0, 499.0])
    changed = prints.clone()
    changed[3, 1] = 1.0
    falling = gate.valid(now, past, changed, prints, torch.tensor(1.0))
    assert falling.tolist() == [True, False, False, False]
    rising = gate.valid(now, past, changed, prints, torch.tensor(-1.0))
    assert rising.tolist() == [False, False, True, False]


def test_valid_is_false_for_a_state_of_another_batch_size() -> None:
    now = gate.valid(torch.ones(3), torch.full((2,), 9.0), torch.zeros(3, 1), torch.zeros(2, 1), torch.tensor(1.0))
    assert now.tolist() == [False, False, False]


@given(st.integers(1, 3), st.integers(0, 9), st.integers(0, 9))
def test_fingerprint_tells_labels_apart(batch: int, first: int, second: int) -> None:
    latents = torch.zeros(batch, 3, 4)
    a = gate.fingerprint([torch.full((batch,), first)], latents)
    b = gate.fingerprint([torch.full((batch,), second)], latents)
    assert torch.equal(a, b) == (first == second)
    assert a.shape == (batch, 2)


def test_fingerprint_sees_a_swap_of_two_tokens() -> None:
    text = torch.randn(1, 5, 8)
    swapped = text[:, [1, 0, 2, 3, 4]]
    latents = torch.zeros(1, 3, 4)
    assert not torch.equal(gate.fingerprint([text], latents), gate.fingerprint([swapped], latents))
