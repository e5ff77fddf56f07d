"""Plans that are searched for: priced right where the theory is exact, any number of steps, shares, guards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lazycompress.errors import InputError
from lazycompress.plan import search
from lazycompress.plan.calibration import Calibration
from lazycompress.plan.fit import UNSEEN, fit
from lazycompress.plan.forecasts import forecast
from lazycompress.plan.frontier import frontier
from lazycompress.plan.judge import judge
from lazycompress.plan.learn import learn_plan
from lazycompress.plan.move import moved
from lazycompress.plan.plan import Plan
from lazycompress.plan.price import Pricing, points_of
from lazycompress.plan.record import Reading, calibrate
from lazycompress.plan.search import Guards, Steps, computed_of, evens, least_share, plan_for, predict
from lazycompress.wrap.plans import of_all_passes

from .toy import Toy, euler, read


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(Toy(pull=1.0), euler(images=16), read=read, progress=False)


@given(
    computes=st.lists(st.booleans(), min_size=1, max_size=12).map(lambda c: [True, *c]),
    order=st.sampled_from([0, 1, 2]),
    twice=st.booleans(),
)
def test_plans_are_priced_by_the_forecast_that_runs(computes: list[bool], order: int, twice: bool) -> None:
    """Samplers of second order call twice at one timestep."""
    times = np.array([float(-((k + 1) // 2) if twice else -(k**1.5)) for k in range(len(computes))])
    points, weights = points_of(np.array([computes]), times, order)
    for call in range(len(computes)):
        found = np.zeros(len(computes))
        for point, weight in zip(points, weights, strict=True):
            found[max(point[0, call], 0)] += weight[0, call]
        expected = np.zeros(len(computes))
        past = [k for k in range(call + 1) if computes[k]]
        if computes[call]:
            expected[call] = 1.0
        else:
            for k, weight in forecast([times[p] for p in past], times[call], order):
                expected[past[k]] = weight
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("target", [0.25, 0.5, 0.7])
def test_predicted_errors_are_true_where_the_theory_is_exact(calibration: Calibration, target: float) -> None:
    """The toy responds to all errors by a factor: they add up, and one window has them all."""
    plans = [*evens(calibration, target), replace(plan_for(calibration, target), fitted=())]
    for plan, found in zip(plans, judge(Toy(pull=1.0), euler(images=16), plans, read=read, seeds=[7]), strict=True):
        assert 0.5 < Pricing.of(calibration, windows=1).plan(plan).mean() / found.errors.mean() < 2.0


@pytest.mark.parametrize("target", [0.25, 0.34, 0.5])
def test_plans_beat_even_ones_on_fresh_noise(calibration: Calibration, target: float) -> None:
    ours, *even = judge(
        Toy(pull=1.0),
        euler(images=16),
        [plan_for(calibration, target), *evens(calibration, target, (0, 1, 2))],
        read=read,
        seeds=[8, 9],
    )
    assert ours.errors.mean() < min(other.errors.mean() for other in even)
    assert ours.calls == sum(ours.plan.computes) * 2


@settings(deadline=None, max_examples=6)
@given(steps=st.integers(1, 250), target=st.floats(0.02, 1.0))
def test_one_calibration_plans_any_number_of_steps(calibration: Calibration, steps: int, target: float) -> None:
    timesteps = [1 - k / steps for k in range(steps)]
    plan = plan_for(calibration, target, timesteps, orders=(1,))
    assert plan.timesteps == tuple(timesteps)
    assert plan.share == pytest.approx(max(target, 1 / steps), abs=1 / steps)
    assert plan.share <= max(target, 1 / steps) + 1e-9


def test_interpolated_calibrations_price_like_their_own(calibration: Calibration) -> None:
    own = calibrate(Toy(pull=1.0), euler(32, images=16), read=read, progress=False)
    for plan in evens(own, 0.4, (0, 1)):
        assert 0.4 < predict(calibration, plan).mean() / predict(own, plan).mean() < 2.5


def test_a_long_search_says_how_far_it_is(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _ = plan_for(calibration, 0.5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(search, "PATIENCE", 0.0)
    _ = plan_for(calibration, 0.5)
    assert "planning 20 calls" in capsys.readouterr().err


def test_the_same_arguments_give_the_same_plan(calibration: Calibration) -> None:
    torch.manual_seed(1)
    first = plan_for(calibration, 0.4)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert plan_for(calibration, 0.4) == first


def test_plans_keep_to_guards(calibration: Calibration) -> None:
    plan = plan_for(calibration, 0.5, first=3, last=2, max_reuse=2)
    assert all(plan.computes[:3])
    assert all(plan.computes[-2:])
    assert ".." not in "".join("x" if c else "." for c in plan.computes).replace("..", ",")


def test_each_stream_begins_with_a_computation(calibration: Calibration) -> None:
    plan = plan_for(calibration, 0.5, [t for t in calibration.timesteps for _ in (0, 1)], streams=[0, 0] * 20)
    assert plan.computes[0]
    with pytest.raises(InputError, match="no stream 1"):
        plan_for(calibration, 0.5, streams=[0, 1] * 10)


@pytest.mark.parametrize(
    ("target", "keywords", "says"),
    [
        (0.0, {}, "above 0 and at most 1"),
        (float("nan"), {}, "above 0 and at most 1"),
        (1.5, {}, "above 0 and at most 1"),
        (0.5, {"timesteps": []}, "one timestep or more"),
        (0.5, {"timesteps": [1.0, float("inf")]}, "finite"),
        (0.5, {"orders": [3]}, "orders"),
        (0.1, {"first": 3}, "raise the target"),
        (0.5, {"max_reuse": 0}, "max_reuse"),
        (0.5, {"reach": lambda timesteps: np.ones(3)}, "reach gave"),
    ],
)
def test_what_cannot_be_planned_is_refused(calibration: Calibration, target: float, keywords: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan_for(calibration, target, **keywords)


def test_plans_for_other_calls_are_not_judged(calibration: Calibration) -> None:
    plan = plan_for(calibration, 0.5, [1 - k / 10 for k in range(10)])
    with pytest.raises(InputError, match="10 calls of an image, and the sampler makes 20"):
        judge(Toy(), euler(), [plan], read=read, seeds=[0])
    shifted = Plan(tuple(t + 0.1 for t in calibration.timesteps), (True,) * 20)
    with pytest.raises(InputError, match=r"call 1 is at timestep 1\.1"):
        judge(Toy(), euler(), [shifted], read=read, seeds=[0])


def test_other_calls_repeat_the_last_output_only_where_told_to(calibration: Calibration) -> None:
    """What that costs where calls are far apart is priced too low."""
    timesteps = np.linspace(1, 0, 9)[:-1].tolist()
    cheap = replace(calibration, scale=(1e-6, 1.0, 1.0))
    assert plan_for(cheap, 0.5).order == 0
    assert plan_for(cheap, 0.5, timesteps).order != 0
    assert plan_for(cheap, 0.5, timesteps, orders=(0,)).order == 0


@given(target=st.floats(0.2, 0.9), steps=st.integers(2, 30), last=st.integers(0, 1))
@settings(deadline=None, max_examples=15)
def test_no_fitted_even_plan_is_priced_lower(calibration: Calibration, target: float, steps: int, last: int) -> None:
    timesteps = np.linspace(1, 0, steps + 1)[:-1].tolist()
    guards = Guards(last=last)
    assume(computed_of(target, [0] * steps) > last)
    plan = plan_for(calibration, target, timesteps, last=last)
    there = moved(calibration, timesteps)
    even = [fit(there, other, UNSEEN) for other in evens(there, target, (1, 2)) if guards.keeps(other)]
    price = float(predict(there, plan).mean())
    assert all(price <= float(predict(there, other).mean()) * (1 + 1e-9) for other in even)


@pytest.fixture(scope="module")
def guided() -> Calibration:
    return calibrate(Toy(pull=1.0), euler(images=16, scale=3.0), read=passes, progress=False)


def passes(args: tuple[Any, ...], kwargs: Any) -> Reading:
    return Reading(read(args, kwargs), int(not args[2].any()))


@pytest.mark.parametrize("target", [0.25, 0.37, 0.5])
def test_the_calls_of_a_step_of_guidance_are_decided_alike(guided: Calibration, target: float) -> None:
    plan = plan_for(guided, target)
    assert plan.computes[0::2] == plan.computes[1::2]
    assert target - 1 / 20 < plan.share <= target
    assert of_all_passes(plan).share == plan.share  # a file follows one plan for all passes
    moved = plan_for(guided, target, [t for t in np.linspace(1, 0, 31)[:-1] for _ in (0, 1)], streams=[0, 1] * 30)
    assert moved.computes[0::2] == moved.computes[1::2]


def test_guidance_that_ends_has_calls_that_are_decided_one_by_one() -> None:
    streams = (0, 1) * 10 + (0,) * 10
    assert Steps.of(streams).size == 1
    assert computed_of(0.5, streams) == 15
    assert computed_of(0.5, (0, 1) * 15) == 14
    assert computed_of(0.5, (0, 0, 1, 1)) == 2
    assert least_share((0, 1) * 10, Guards(first=1)) == 0.1
    assert least_share((0, 1) * 10, Guards(first=3)) == 0.2


def test_learned_plans_are_no_worse_than_even_ones_and_their_report_is_one_line() -> None:
    found = learn_plan(Toy(pull=1.0), euler(images=16), 0.4, read=read, progress=False)
    assert found.report.error <= found.report.even
    assert found.report.runs <= 15
    assert found.plan.share == found.report.share == 0.4
    assert "\n" not in str(found.report)
    assert "40% of the calls computed (target 40%)" in str(found.report)


def test_what_true_runs_found_is_priced_in(calibration: Calibration) -> None:
    """Where forecasts of second order were worse than priced, plans for other shares go without them."""
    wary = replace(calibration, scale=(1.0, 1.0, 1e6))
    free = plan_for(calibration, 0.5, orders=(1, 2))
    assert free.order == 2
    assert plan_for(wary, 0.5, orders=(1, 2)).order == 1
    assert plan_for(wary, 0.3, orders=(1, 2)).order == 1
    assert predict(wary, free) == pytest.approx(1e6 * predict(calibration, free))


@pytest.mark.parametrize("size", [0.5, pytest.param(8.0, marks=pytest.mark.slow(seconds=7))])
def test_a_learned_calibration_prices_plans_as_true_runs_found_them(size: float) -> None:
    """Whatever the response to small errors says: here, the last calls of the loop are scaled after it."""
    found = learn_plan(Toy(pull=1.0), euler(images=16), 0.4, read=read, progress=False)
    off = replace(found.calibration, gain=found.calibration.gain * size)
    again = learn_plan(Toy(pull=1.0), euler(images=16), 0.4, read=read, progress=False, calibration=off)
    assert 0.3 < predict(again.calibration, again.plan).mean() / again.report.error < 3.0


def test_gains_that_mislead_are_believed_less() -> None:
    """Plans are searched with gains that differ less, too, and with none that do; true runs choose."""
    right = learn_plan(Toy(pull=1.0), euler(images=16), 0.3, read=read, progress=False)
    calls = np.arange(len(right.calibration.timesteps))
    misled = replace(right.calibration, gain=right.calibration.gain * np.exp(-calls / 2.0) + 1e-6)
    found = learn_plan(Toy(pull=1.0), euler(images=16), 0.3, read=read, progress=False, calibration=misled)
    assert found.report.error < 3 * right.report.error
    spread = np.log(found.calibration.gain)
    assert (
        np.ptp(spread) <= 0.5 * np.ptp(np.log(misled.gain)) + 1e-9
    )  # and plans for other budgets believe them as little


def test_more_compute_is_priced_at_less_error(calibration: Calibration) -> None:
    points = frontier(calibration, (0.25, 0.5, 0.75))
    assert [round(point.plan.share, 2) for point in points] == [0.25, 0.5, 0.75]
    assert points[0].error > points[1].error > points[2].error > 0
