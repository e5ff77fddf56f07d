"""Learning: the linear model of a trajectory, the search under a budget, and what the gates then do."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.errors import InputError
from lazycompress.recipe_loading import load_recipe
from lazycompress.runtime import LazyModel
from lazycompress.sampling import build_inputs, build_sampler
from lazycompress.train.schedule import Limits, Planner, run_lengths
from lazycompress.train.trajectory import Effects, linearise, run
from lazycompress.train.whole import of_whole, together
from tests.conftest import two_blocks

QUICK = {"units": "branches", "train.effort": 0.25, "sampling.steps": 12, "sampling.batch": 8}


@pytest.fixture
def lazy(digits: nn.Module) -> LazyModel:
    return lazycompress.apply(digits, "digits_dit.yaml", overrides={**QUICK, "train.enabled": False})


@pytest.fixture(scope="module")
def before(short: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    """Weights of the model before it was learned with, and which of them need gradients."""
    return {name: value.clone() for name, value in short.state_dict().items()}, [
        p.requires_grad for p in short.parameters()
    ]


@pytest.fixture(scope="module")
def learned(short: nn.Module, before: object) -> LazyModel:
    """What was learned; tests must not change it."""
    return lazycompress.apply(short, "digits_dit.yaml", overrides={**QUICK, "sampling.batch": 4}, progress=False)


@pytest.fixture
def sampler(lazy: LazyModel):  # type: ignore[no-untyped-def]
    assert lazy.recipe is not None
    assert lazy.recipe.sampling is not None
    return build_sampler(lazy.recipe.sampling)


def made_up(steps: int = 10, branches: int = 3, seed: int = 0, ages: int = 5) -> Effects:
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(16, 2, steps, branches, ages, generator=generator)
    effects[..., 0] = 0.0
    return Effects(
        effects,
        effects.sum(dim=3, keepdim=True),
        torch.zeros(16, 2),
        torch.zeros(16),
        torch.arange(steps, 0, -1.0),
        torch.arange(steps, 0, -1.0).double(),
        torch.ones(steps).bool(),
        0.0,
        torch.zeros(16, 1),
    )


def anywhere(steps: int, branches: int, max_reuse: int = 4) -> Limits:
    allowed = np.ones((steps, branches), dtype=bool)
    allowed[0] = False
    return Limits(allowed, max_reuse)


@pytest.mark.slow
def test_effects_predict_what_one_reuse_does_to_the_image(lazy: LazyModel, sampler) -> None:  # type: ignore[no-untyped-def]
    """The square of the projected effect, averaged over many probes, is the measured error of single decisions."""
    effects = linearise(lazy, sampler, None, seed=5, probes=16, max_age=2)
    torch.manual_seed(5)
    dense = run(lazy, sampler, None)
    predicted, measured = [], []
    for step, branch in [(3, 0), (5, 7), (8, 3), (10, 11), (11, 4)]:
        schedule = torch.zeros(12, 12, dtype=torch.bool)
        schedule[step, branch] = True
        torch.manual_seed(5)
        error = (run(lazy, sampler, schedule) - dense).square().flatten(1).mean(1)
        measured.append(float(error.mean()))
        predicted.append(float(effects.effects[:, :, step, branch, 1].square().mean()))
    ratio = np.array(predicted) / np.array(measured)
    assert np.all((ratio > 0.5) & (ratio < 2.0)), (predicted, measured)


def test_a_sampler_without_gradients_is_one_clear_line(lazy: LazyModel, sampler) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LazyCompressError, match=r"must.*not run under torch\.no_grad"):
        linearise(lazy, torch.no_grad()(sampler), None, seed=0, probes=1, max_age=1)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_run_lengths_count_steps_since_the_last_computation(decisions: list[bool]) -> None:
    expected, age = [], 0
    for reuse in decisions:
        age = age + 1 if reuse and expected else 0
        expected.append(age)
    column = np.array(decisions)
    column[0] = False
    assert run_lengths(column).tolist() == expected


@settings(max_examples=20, deadline=None)
@given(st.floats(0.3, 1.0), st.integers(1, 4), st.integers(0, 50))
def test_a_schedule_keeps_budget_and_limits(target: float, max_reuse: int, seed: int) -> None:
    effects = made_up(seed=seed)
    limits = anywhere(10, 3, max_reuse)
    planner = Planner(effects, [10, 20, 30], limits)
    schedule, order = planner.fill(target)
    assert not schedule[0].any()
    assert all(run_lengths(schedule[:, b]).max() <= max_reuse for b in range(3))
    assert sorted(order) == sorted(zip(*map(list, np.nonzero(schedule)), strict=True))
    if max_reuse == 4 and target >= 0.35:
        assert target - 30 / 600 <= planner.macs_ratio(schedule) <= target + 1e-9
    swapped = planner.swap(target, schedule, rounds=20)
    assert planner.predicted(swapped) <= planner.predicted(schedule) + 1e-9
    assert (
        planner.macs_ratio(swapped) <= planner.macs_ratio(schedule) + 1e-9
        or planner.macs_ratio(swapped) <= target + 1e-9
    )
    assert all(run_lengths(swapped[:, b]).max() <= max_reuse for b in range(3))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 50), st.integers(0, 2), st.integers(4, 8))
def test_no_exchange_makes_whole_steps_better(seed: int, order: int, computed: int) -> None:
    effects = made_up(steps=9, branches=2, ages=12, seed=seed)
    limits = anywhere(9, 2, max_reuse=3)
    planner, whole = Planner(effects, [10, 20], limits, order), of_whole(effects, limits, order)
    schedule = together(planner, whole, computed / 9)
    assert schedule is not None
    assert (schedule[:, 0] == schedule[:, 1]).all()
    assert planner.macs_ratio(schedule) == pytest.approx(computed / 9)
    column = schedule[:, :1]
    found = whole.predicted(column)
    for reused, other in product(np.flatnonzero(column[:, 0]), np.flatnonzero(~column[:, 0])[1:]):
        exchanged = column.copy()
        exchanged[[reused, other]] = ~exchanged[[reused, other]]
        if run_lengths(exchanged[:, 0]).max() <= 3:
            assert whole.predicted(exchanged) >= found * (1 - 1e-5)


def test_whole_steps_leave_out_what_may_not_reuse() -> None:
    effects = made_up(steps=10, branches=3)
    limits = anywhere(10, 3)
    limits.allowed[:, 1] = False
    planner = Planner(effects, [10, 10, 10], limits)
    schedule = together(planner, of_whole(effects, limits, 0), 0.6)
    assert schedule is not None
    assert not schedule[:, 1].any()
    assert 0.5 <= planner.macs_ratio(schedule) <= 0.6
    assert together(planner, of_whole(effects, limits, 0), 0.2) is None


def test_the_search_sees_that_two_effects_cancel() -> None:
    effects = made_up(steps=6, branches=1)
    table = effects.effects
    table[..., 1:] = 9.0
    for step, effect in ((1, 1.0), (3, 1.1), (5, -1.2)):
        table[..., step, 0, 1] = effect
    planner = Planner(effects, [1], anywhere(6, 1, max_reuse=1))
    schedule, _ = planner.fill(4 / 6)
    # Priced one by one, steps 1 and 3 are the cheapest; together with step 1, step 5 nearly vanishes.
    assert np.flatnonzero(schedule[:, 0]).tolist() == [1, 5]
    assert planner.predicted(schedule) == pytest.approx(0.04, rel=1e-5)


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("target", [0.7, 0.5])
def test_asked_for_a_ratio_the_gates_give_it_on_fresh_noise(digits: nn.Module, target: float) -> None:
    overrides = {**QUICK, "sampling.batch": 32, "target": target}
    lazy = lazycompress.apply(digits, "digits_dit.yaml", overrides=overrides, progress=False)
    sampler = build_sampler(lazy.recipe.sampling)
    torch.manual_seed(99)
    with torch.no_grad():
        images = sampler(lazy)
    assert target - 0.02 <= lazy.summary().macs_ratio <= target + 1e-6
    torch.manual_seed(99)
    with torch.no_grad():
        dense = sampler(digits)
    fewer = build_sampler(lazy.recipe.sampling.model_copy(update={"steps": round(12 * target)}))
    torch.manual_seed(99)
    with torch.no_grad():
        other = fewer(digits)
    assert float((images - dense).square().mean()) < 0.8 * float((other - dense).square().mean())


@pytest.mark.slow(seconds=16)
def test_the_same_seed_gives_the_same_gates_and_leaves_the_callers_noise_alone(short: nn.Module) -> None:
    def learn(seed: int) -> tuple[LazyModel, Tensor]:
        torch.manual_seed(123)
        overrides = {**QUICK, "train.seed": seed, "sampling.batch": 4}
        lazy = lazycompress.apply(short, "digits_dit.yaml", overrides=overrides, progress=False)
        return lazy, torch.rand(1)

    first, noise = learn(0)
    again, noise_again = learn(0)
    other, _ = learn(1)
    assert torch.equal(first.gates.bias, again.gates.bias)
    assert torch.equal(first.gates.rank, again.gates.rank)
    assert torch.equal(noise, noise_again)
    # Two seeds may find the same schedule, but not for the same reasons.
    assert first.training_report.error == again.training_report.error != other.training_report.error
    assert not torch.equal(first.gates.rank, other.gates.rank)


@pytest.mark.slow(seconds=15)
def test_guards_hold_in_what_runs(digits: nn.Module) -> None:
    guards = {
        "guards.warmup_steps": 3,
        "guards.last_steps": 2,
        "guards.max_reuse": 2,
        "guards.exclude": ["re:.*attn.*"],
    }
    lazy = lazycompress.apply(digits, "digits_dit.yaml", overrides={**QUICK, **guards, "target": 0.8}, progress=False)
    with torch.no_grad():
        build_sampler(lazy.recipe.sampling)(lazy)
    _, reused = lazy.usage.heatmap()
    assert reused[:3].sum() == 0
    assert reused[-2:].sum() == 0
    attention = [i for i, branch in enumerate(lazy.branches) if branch.kind == "attention"]
    assert reused[:, attention].sum() == 0
    assert reused.sum() > 0
    assert max(run_lengths(reused[:, b].bool().numpy()).max() for b in range(12)) <= 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"guards.exclude": ["re:nothing"]}, r"guards\.exclude: 're:nothing' matches none of the branches"),
        ({"guards.exclude": ["re:("]}, "is not a regular expression"),
        pytest.param(
            {"target": 0.2, "guards.max_reuse": 1}, "the guards leave at most", marks=pytest.mark.slow(seconds=10)
        ),
    ],
)
def test_guards_that_cannot_hold_are_one_line(short: nn.Module, overrides: dict[str, object], expected: str) -> None:
    with pytest.raises(LazyCompressError, match=expected):
        lazycompress.apply(short, "digits_dit.yaml", overrides={**QUICK, **overrides}, progress=False)


def test_training_leaves_the_weights_as_they_are(
    short: nn.Module, before: tuple[dict[str, Tensor], list[bool]], learned: LazyModel
) -> None:
    assert learned.training_report is not None
    weights, requires = before
    assert all(torch.equal(weights[name], value) for name, value in short.state_dict().items())
    assert [p.requires_grad for p in short.parameters()] == requires
    assert all(p.grad is None for p in short.parameters())


def test_the_recipes_inputs_fit_the_model(digits: nn.Module) -> None:
    recipe = load_recipe("digits_dit.yaml")
    assert recipe.sampling is not None
    inputs = build_inputs(digits, recipe.sampling)
    assert inputs["hidden_states"].shape == (32, 1, 8, 8)
    assert inputs["timestep"].shape == (32,)
    assert set(inputs["class_labels"].tolist()) <= set(range(10))


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_set_target_moves_the_budget_without_training(digits: nn.Module, short: nn.Module, whole: bool) -> None:
    overrides = QUICK if whole else {**QUICK, "sampling.batch": 4}
    lazy = lazycompress.apply(digits if whole else short, "digits_dit.yaml", overrides=overrides, progress=False)
    sampler = build_sampler(lazy.recipe.sampling)
    assert lazy.expected_macs_ratio() == pytest.approx(lazy.training_report.macs_ratio)
    reused = []
    for target in (0.8, 0.5, 0.3):
        promised = lazy.set_target(target)
        lazy.reset()
        with torch.no_grad():
            sampler(lazy)
        measured = lazy.summary().macs_ratio
        assert measured == pytest.approx(promised, abs=1e-5)
        assert target - 1 / 12 < measured <= target + 1e-5, "less than one step of twelve too much is reused"
        assert lazy.gates.together or not whole, "a schedule of whole steps is moved by whole steps"
        reused.append(float((lazy.usage.heatmap()[1] > 0).float().mean()))
    assert reused == sorted(reused)
    assert lazy.set_target(1.0) == 1.0


@pytest.mark.parametrize(
    ("target", "expected"), [(0.01, r"allow 0\.\d\d at least"), (0.0, "a share in"), (1.5, "a share in")]
)
def test_a_target_out_of_reach_is_one_line(learned: LazyModel, target: float, expected: str) -> None:
    before = learned.gates.bias.detach().clone()
    with pytest.raises(LazyCompressError, match=expected):
        learned.set_target(target)
    assert torch.equal(learned.gates.bias, before)


def test_a_model_made_in_inference_mode_is_not_learned_with_gradients() -> None:
    with torch.inference_mode():
        model = two_blocks()
    recipe = {"units": "branches", "sampling.steps": 2, "sampling.batch": 1}
    with pytest.raises(InputError, match=r"was made under torch\.inference_mode\(\).*units: calls"):
        lazycompress.apply(model, load_recipe("digits_dit.yaml", overrides=recipe), progress=False)


def test_learning_does_not_depend_on_the_default_dtype() -> None:
    overrides = {"units": "branches", "sampling.steps": 4, "sampling.batch": 2, "train.effort": 0.02}
    recipe = load_recipe("digits_dit.yaml", overrides=overrides)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            lazy = lazycompress.apply(two_blocks().float(), recipe, progress=False)
        finally:
            torch.set_default_dtype(torch.float32)
        gates: dict[str, Tensor] = lazy.gates.state_dict()
        assert all(value.dtype is torch.float32 for value in gates.values() if value.is_floating_point())
        found.append(gates["bias"])
    torch.testing.assert_close(found[0], found[1])
