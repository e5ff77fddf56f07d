"""A plan of whole calls in files: what is saved is followed, and an export gives what the module gives."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.integrations.diffusers import export_pipeline, load_exported
from lazycompress.integrations.digits.model import digits_sampler, draw_noise
from lazycompress.lazy.convert import graph_of
from lazycompress.lazy.learn import Search
from lazycompress.lazy.model import LazyModule
from lazycompress.plan.fit import fit
from lazycompress.plan.plan import Plan

from ..pipelines import PIPELINES, make_dit, quiet
from .samples import STEPS, learn, sample


def sampler(model: nn.Module) -> Tensor:
    return digits_sampler(draw_noise(2, int(torch.randint(0, 1000, (1,)))), torch.arange(2), 8)(model)


@pytest.fixture(scope="module")
def lazy(short: nn.Module) -> LazyModule:
    made: LazyModule = lazycompress.apply(short, {"train": {"effort": 0.1}}, sampler=sampler, progress=False)
    return made


def run(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return sampler(model)


def test_what_is_saved_is_followed(lazy: LazyModule, short: nn.Module, tmp_path: Path) -> None:
    lazycompress.save(lazy, tmp_path / "plan")
    again = lazycompress.load(short, tmp_path / "plan")
    assert isinstance(again, LazyModule)
    assert torch.equal(run(again), run(lazy))
    assert not torch.equal(run(lazy), run(short))
    assert again.set_target(0.25) == pytest.approx(0.25)
    planner = lazy.engine.planner
    assert isinstance(planner, Search)
    fitted = copy.deepcopy(lazy)
    fitted.engine.plan = fit(planner.calibration, replace(lazy.plan, order=1, fitted=()))
    lazycompress.save(fitted, tmp_path / "fitted")
    back = lazycompress.load(short, tmp_path / "fitted").plan
    assert any(back.fitted)
    assert back == fitted.plan
    with pytest.raises(LazyCompressError, match="is not lazy"):
        lazycompress.save(short, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_the_learned_share_is_the_learned_plan_again(lazy: LazyModule, short: nn.Module, tmp_path: Path) -> None:
    """True runs have chosen it; what is priced best may be another one."""
    learned = replace(lazy.plan, order=0 if lazy.plan.order else 1, fitted=())  # what no price says
    assert isinstance(lazy.engine.planner, Search)
    made = copy.deepcopy(lazy)
    made.engine.plan, made.engine.planner = learned, replace(lazy.engine.planner, learned=learned)
    lazycompress.save(made, tmp_path / "plan")
    for one in (made, lazycompress.load(short, tmp_path / "plan")):
        one.set_target(0.25)
        one.set_target(0.5, timesteps=learned.timesteps)
        assert one.plan == learned
        one.set_target(0.75)
    lazycompress.save(made, tmp_path / "moved")
    again = lazycompress.load(short, tmp_path / "moved")
    again.set_target(0.5)
    assert again.plan != learned


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("target", [0.25, 0.75])
def test_a_graph_follows_the_same_plan(lazy: LazyModule, target: float, order: int) -> None:
    before, planner = lazy.plan, lazy.engine.planner
    assert isinstance(planner, Search)
    try:
        lazy.set_target(target)
        lazy.engine.plan = fit(planner.calibration, replace(lazy.plan, order=order, fitted=()))
        assert any(lazy.plan.fitted) == (order > 0)
        graph = graph_of(lazy)
        lazy.reset()
        assert torch.allclose(run(graph), run(lazy), atol=1e-5)
        assert graph.summary().skip_ratio == pytest.approx(lazy.summary().skip_ratio)
        assert graph.expected_macs_ratio() == pytest.approx(target)
    finally:
        lazy.engine.plan = before


def test_a_graph_is_saved_with_its_fitted_forecasts(lazy: LazyModule, short: nn.Module, tmp_path: Path) -> None:
    before, planner = lazy.plan, lazy.engine.planner
    assert isinstance(planner, Search)
    try:
        lazy.engine.plan = fit(planner.calibration, replace(lazy.plan, order=1, fitted=()))
        graph = graph_of(lazy)
    finally:
        lazy.engine.plan = before
    assert graph.gates.fits
    lazycompress.save(graph, tmp_path / "gates")
    again = lazycompress.load(short, tmp_path / "gates")
    assert torch.equal(run(again), run(graph))
    again.set_gates(again.gates.like(order=1, static=1))
    assert not again.gates.fits


def test_a_plan_that_names_timesteps_twice_becomes_gates_with_a_phase(lazy: LazyModule) -> None:
    times = (875.0, 750.0, 750.0, 500.0, 500.0, 250.0)
    before = lazy.plan
    try:
        lazy.engine.plan = Plan(times, (True, True, False, True, False, False), 1)
        gates = graph_of(lazy).gates
        decisions = gates.decisions(torch.tensor(times)).all(dim=1).tolist()
        assert decisions == [False, False, True, False, True, True]
    finally:
        lazy.engine.plan = before


@pytest.mark.slow(seconds=50)
def test_an_exported_pipeline_gives_the_lazy_images(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pipe, call = make_dit(), PIPELINES["dit"].call
    learn(pipe, call)
    learned = sample(pipe, call)
    export_pipeline(pipe, tmp_path / "out", "onnx")
    loaded = quiet(load_exported(tmp_path / "out"))
    assert (sample(loaded, call) - learned).abs().max() <= 1
    assert torch.equal(sample(pipe, call), learned)
    assert STEPS == 8
