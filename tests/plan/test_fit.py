"""Fitted forecasts: better than polynomials on fresh noise, the best there are as priced, and nothing where nothing fits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazycompress.errors import InputError
from lazycompress.plan.calibration import Calibration
from lazycompress.plan.fit import fit
from lazycompress.plan.forecasts import forecast
from lazycompress.plan.judge import judge
from lazycompress.plan.plan import Plan, even, stream_of
from lazycompress.plan.price import Pricing
from lazycompress.plan.record import Reading, calibrate
from lazycompress.plan.search import plan_for

from .toy import Toy, euler, read

TIMES = (5.0, 4.0, 3.0, 2.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(Toy(pull=1.0), euler(images=16), read=read, progress=False)


@pytest.fixture(scope="module")
def guided() -> Calibration:
    def passes(args: tuple[Any, ...], kwargs: Any) -> Reading:
        return Reading(read(args, kwargs), int(not args[2].any()))

    return calibrate(Toy(pull=1.0), euler(images=16, scale=3.0), read=passes, progress=False)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("target", [0.34, 0.5])
def test_fitted_forecasts_leave_less_error_on_fresh_noise(calibration: Calibration, target: float, order: int) -> None:
    plain = even(calibration.timesteps, target, order)
    fitted = fit(calibration, plain)
    ours, polynomial = judge(Toy(pull=1.0), euler(images=16), [fitted, plain], read=read, seeds=[8, 9])
    assert ours.errors.mean() < 0.5 * polynomial.errors.mean()
    assert (fitted.computes, fitted.order) == (plain.computes, order)


@settings(deadline=None)
@given(seed=st.integers(0, 999))
def test_no_other_weights_are_priced_lower(calibration: Calibration, seed: int) -> None:
    """Where a little counts for each call alone: of the windows by themselves many weights are as good."""
    rng = np.random.default_rng(seed)
    computes = (True, *(rng.random(len(calibration.timesteps) - 1) < 0.4).tolist())
    best = fit(calibration, Plan(calibration.timesteps, computes, int(rng.integers(1, 3))), ridge=1e-12)
    other = replace(
        best, fitted=tuple(tuple(w + 1e-2 * float(rng.standard_normal()) for w in own) for own in best.fitted)
    )
    if any(best.fitted):
        assert _cost(calibration, best) <= _cost(calibration, other) * (1 + 1e-6)


def _cost(calibration: Calibration, plan: Plan) -> float:
    """What is minimised, written down afresh."""
    pricing = Pricing.of(calibration, windows=3).mean()
    made = np.zeros((len(plan.timesteps),) * 2)
    past: list[int] = []
    for call, computes in enumerate(plan.computes):
        if computes:
            past.append(call)
            made[call, call] = 1.0
        elif plan.fitted[call]:
            newest = past[::-1][: len(plan.fitted[call])]
            made[call, newest] = plan.fitted[call]
    off = made - np.eye(len(made))
    together = pricing.weighted @ off
    alone = pricing.reacted[:, None] * off
    return float(0.95 * np.sum((together @ pricing.gram) * together) + 0.05 * np.sum((alone @ pricing.gram) * alone))


def test_plans_for_any_steps_are_fitted(calibration: Calibration) -> None:
    for timesteps in (None, tuple(np.linspace(1, 0, 33)[:-1].tolist())):
        plan = plan_for(calibration, 0.4, timesteps)
        assert any(plan.fitted)
        assert [bool(weights) for weights in plan.fitted] == [not computes for computes in plan.computes]


def test_weights_for_calls_that_nobody_saw_are_held_firmly(calibration: Calibration) -> None:
    """Shifted by a trifle, the same calls are other ones: their weights stay nearer to the polynomial's."""
    seen = plan_for(calibration, 0.4, orders=(1,))
    unseen = plan_for(calibration, 0.4, [t + 1e-9 for t in calibration.timesteps], orders=(1,))
    assert unseen.computes == seen.computes
    plain = replace(seen, fitted=())
    assert 0 < _away(unseen, plain) < 0.9 * _away(seen, plain)


def _away(plan: Plan, plain: Plan) -> float:
    """How far fitted weights are from the polynomial's."""
    found = 0.0
    for call, weights in enumerate(plan.fitted):
        if weights:
            past = [t for t, computes in zip(plan.timesteps[:call], plan.computes, strict=False) if computes]
            own = [w for _, w in forecast(past, plan.timesteps[call], plain.order)]
            found += sum((a - b) ** 2 for a, b in zip(weights, own, strict=True))
    return found


def test_nothing_is_fitted_where_weights_say_nothing(calibration: Calibration) -> None:
    """The last output again is that; and which of two calls at one timestep is which, no forecast is told."""
    last = even(calibration.timesteps, 0.4, 0)
    dense = even(calibration.timesteps, 1.0, 2)
    assert fit(calibration, last) == last
    assert fit(calibration, dense) == dense
    times = (calibration.timesteps[0], *calibration.timesteps[:-1])
    twice = Plan(times, (True, *[k % 3 == 0 for k in range(1, len(times))]), 2)
    assert fit(replace(calibration, timesteps=times), twice) == twice


def test_outputs_that_are_always_zero_leave_the_polynomial(calibration: Calibration) -> None:
    silent = replace(calibration, gram=np.zeros_like(calibration.gram))
    plan = fit(silent, even(calibration.timesteps, 0.4, 1))
    for call, weights in enumerate(plan.fitted):
        if weights:
            past = [t for t, computes in zip(plan.timesteps[:call], plan.computes, strict=False) if computes]
            assert weights == pytest.approx([w for _, w in forecast(past, plan.timesteps[call], 1)])


def test_passes_of_guidance_that_skip_alike_share_their_weights(guided: Calibration) -> None:
    computes = tuple((k // 2) % 3 == 0 for k in range(len(guided.timesteps)))
    plan = fit(guided, Plan(guided.timesteps, computes, 1, guided.streams))
    assert set(plan.streams) == {0, 1}
    assert any(plan.fitted)
    assert stream_of(plan, 0) == stream_of(plan, 1)


def test_a_forecast_has_the_plans_weights_at_its_own_calls_only() -> None:
    plan = Plan(TIMES, (True, False, True, False, False, True), 1, fitted=((), (0.9,), (), (1.7, -0.6), (), ()))
    assert plan.forecast([5.0], 4.0) == [(0, 0.9)]
    assert plan.forecast([5.0, 3.0], 2.0) == [(1, 1.7), (0, -0.6)]
    assert plan.forecast([5.0, 3.0], 1.0) == forecast([5.0, 3.0], 1.0, 1)
    assert plan.forecast([5.0, 3.0], 2.5) == forecast([5.0, 3.0], 2.5, 1)
    assert plan.forecast([4.0, 3.0], 2.0) == forecast([4.0, 3.0], 2.0, 1)
    assert plan.forecast([3.0], 2.0) == forecast([3.0], 2.0, 1)


@pytest.mark.parametrize(
    ("fitted", "message"),
    [
        (((),), "6 timesteps and weights for 1"),
        (((0.5,), (), (), (), (), ()), "call 1 of the plan computes, and has 1 weights"),
        (((), (0.5, 0.5), (), (), (), ()), "call 2 of the plan is forecast from 1 outputs, and has 2 weights"),
        (((), (math.nan,), (), (), (), ()), "one of call 2 was not"),
    ],
)
def test_weights_that_fit_no_call_are_one_line(fitted: tuple[tuple[float, ...], ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan(TIMES, (True, False, True, False, False, True), 1, fitted=fitted)
