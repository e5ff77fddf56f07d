"""What a plan is: lengths, the first call, even plans, forecast weights."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazycompress.errors import InputError
from lazycompress.plan.forecasts import lagrange
from lazycompress.plan.plan import Plan, dense, even


@given(calls=st.integers(1, 300), share=st.floats(0.01, 1.0))
def test_even_plans_keep_to_their_share(calls: int, share: float) -> None:
    plan = even([float(k) for k in range(calls)], share)
    assert plan.computes[0]
    assert sum(plan.computes) == max(1, math.floor(share * calls + 1e-9))
    gaps = [len(run) for run in "".join("x" if c else "." for c in plan.computes).split("x")[1:]]
    assert max(gaps) - min(gaps) <= 1


def test_dense_plans_compute_everything() -> None:
    assert dense([3.0, 2.0, 1.0]).share == 1.0


@given(at=st.floats(-10, 10), coefficients=st.tuples(*[st.floats(-5, 5)] * 3))
def test_forecasts_of_second_order_are_exact_on_parabolas(at: float, coefficients: tuple[float, float, float]) -> None:
    def parabola(t: float) -> float:
        return coefficients[0] + coefficients[1] * t + coefficients[2] * t * t

    times = [3.0, 1.0, -2.0]
    found = sum(w * parabola(t) for w, t in zip(lagrange(times, at), times, strict=True))
    assert found == pytest.approx(parabola(at), abs=1e-6)


@pytest.mark.parametrize(
    ("timesteps", "computes", "order", "says"),
    [
        ((1.0, 0.0), (True,), 2, "2 timesteps and 1 decisions"),
        ((), (), 2, "0 timesteps"),
        ((float("nan"),), (True,), 2, "finite"),
        ((1.0, 0.0), (False, True), 2, "first call"),
        ((1.0,), (True,), 3, "order 0, 1 or 2; there was 3"),
    ],
)
def test_plans_that_say_nothing_are_refused(
    timesteps: tuple[float, ...], computes: tuple[bool, ...], order: int, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        Plan(timesteps, computes, order)
