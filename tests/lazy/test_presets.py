"""What was learned once makes plans without the model: on the command line, and for `apply`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lazycompress
from lazycompress import InputError, RecipeError
from lazycompress.cli import main
from lazycompress.lazy.attach import handle_of
from lazycompress.lazy.model import LazyModule
from lazycompress.plan.calibration import Calibration
from lazycompress.plan.draw import drawn, priced
from lazycompress.plan.plan import Plan
from lazycompress.plan.search import predict
from lazycompress.wrap.plans import read_plan

from ..pipelines import PIPELINES, make_sd3
from .models import Denoiser
from .samples import STEPS, learn, sample

TIMES = [1000.0 * (1 - k / 20) for k in range(20)]


def sampler(model: Any) -> Tensor:
    x = torch.randn(4, 16, 6)
    for time in TIMES:
        x = x - model(x, torch.full((4,), time), torch.ones(4, 5)) / 20
    return x


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {"target": 0.5, "train": {"effort": 0.1}, "guards": {"last_steps": 2}}
    lazy = lazycompress.apply(Denoiser(), recipe, sampler=sampler, progress=False)
    return lazycompress.save(lazy, tmp_path_factory.mktemp("preset") / "gates")


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["plan", "--calibration", *arguments])
    return capsys.readouterr().out


def test_a_plan_is_drawn_without_the_model(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, str(saved))
    assert text.startswith("10 of 20 calls computed (50.0%), forecasts of order")
    bar = text.splitlines()[1]
    assert (bar.count("█"), bar.count("·")) == (10, 10)
    assert bar.split()[0] == "1000"
    assert bar.endswith("██ 50")  # the guards that it was learned under
    fewer = plan(capsys, str(saved), "--steps", "9", "--target", "0.34")
    assert fewer.startswith("3 of 9 calls computed (33.3%)")
    spread = json.loads(plan(capsys, str(saved), "--steps", "20", "--json"))["timesteps"]
    assert spread == pytest.approx(TIMES)
    half = json.loads(plan(capsys, str(saved), "--steps", "3", "--json"))["timesteps"]
    assert half == pytest.approx([1000.0, 525.0, 50.0])
    assert "3 of 4 calls" in plan(capsys, str(saved), "--timesteps", "900,600,300,0", "--target", "0.8")


def test_a_plan_as_json_is_one_that_files_are_wrapped_with(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = plan(capsys, str(saved), "--target", "0.25", "--json")
    found = json.loads(text)
    assert (sum(found["computes"]), found["share"]) == (5, 0.25)
    assert found["timesteps"] == pytest.approx(TIMES)
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    read = read_plan(tmp_path / "plan.json")
    assert read.computes == tuple(found["computes"])
    assert [bool(weights) for weights in read.fitted] == [not computes for computes in read.computes]
    assert min(found["relative"], found["even"]) > 0


def test_the_calibration_alone_is_enough(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(capsys, str(saved / "calibration"), "--target", "0.4").startswith("8 of 20 calls")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing"], "missing holds no plan and no calibration"),
        (["gates", "--target", "1.5"], "target is a share of the calls"),
        (["gates", "--timesteps", "1,nan"], "all of them finite numbers"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    saved: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        plan(capsys, str(saved.parent / arguments[0]), *arguments[1:])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_apply_starts_at_once(saved: Path) -> None:
    model = Denoiser()
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    lazy = lazycompress.apply(model, {"target": 0.25, "forecast": 1}, calibration=saved)
    assert not calls
    hook.remove()
    assert isinstance(lazy, LazyModule)
    assert (lazy.plan.share, lazy.recipe.forecast, lazy.engine.target) == (0.25, 1, 0.25)
    assert lazy.plan.order in (0, 1)
    assert lazy.plan.computes[-2:] != (True, True)  # this recipe has no such guards
    with torch.no_grad():
        sampler(lazy)
    assert lazy.summary().skip_ratio == pytest.approx(0.75)


def test_apply_refuses_a_calibration_that_is_of_no_use(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"calibration: .* need runs of the model"):
        lazycompress.apply(Denoiser(), {"psnr": 40}, calibration=saved)
    with pytest.raises(RecipeError, match="calibration: "):
        lazycompress.apply(Denoiser(), {"units": "branches"}, calibration=saved)
    with pytest.raises(InputError, match="holds no plan and no calibration"):
        lazycompress.apply(Denoiser(), calibration=tmp_path)
    other = Denoiser()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(lazycompress.ExportError, match="other weights"):
        lazycompress.apply(other, calibration=saved)
    assert handle_of(other) is None


def test_a_pipeline_is_saved_loaded_and_started_from_a_folder(tmp_path: Path) -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    with pytest.raises(InputError, match="is not lazy"):
        lazycompress.save(pipe, tmp_path / "gates")
    recipe = {"target": 0.5, "train": {"effort": 0.1}}
    lazycompress.apply(pipe, recipe, call_kwargs={**call, "num_inference_steps": STEPS}, progress=False)
    learned = sample(pipe, call)
    lazycompress.save(pipe, tmp_path / "gates")
    lazycompress.save(pipe, tmp_path / "gates")  # in a loop
    pipe.save_pretrained(tmp_path / "whole")
    for folder in ("gates", "whole"):
        again = make_sd3()
        assert lazycompress.load(again, tmp_path / folder) is again
        assert torch.equal(sample(again, call), learned)
        started = make_sd3()
        lazycompress.apply(started, {"target": 0.34}, calibration=tmp_path / folder)
        sample(started, call)
        assert lazycompress.summary(started).skip_ratio == pytest.approx(1 - int(0.34 * STEPS) / STEPS)


def test_what_cannot_be_loaded_leaves_a_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    learn(pipe, call)
    lazycompress.save(pipe, tmp_path / "gates")
    learned, dense = sample(pipe, call), make_sd3()
    with torch.no_grad():
        next(dense.transformer.parameters()).add_(1)
    for target in (dense, pipe):
        with pytest.raises(lazycompress.ExportError):
            lazycompress.load(dense, tmp_path / "gates")
        with pytest.raises(InputError, match="holds no"):
            lazycompress.load(target, tmp_path)
    assert handle_of(dense.transformer) is None
    assert torch.equal(sample(pipe, call), learned)


def test_passes_of_guidance_are_drawn_each() -> None:
    times = (3.0, 3.0, 2.0, 2.0)
    one = Calibration(times, (0, 1, 0, 1), np.eye(4)[None], np.ones(4), np.ones(4), np.full(1, 4.0))
    made = priced(one, Plan(times, (True, True, True, False), 1, (0, 1, 0, 1)))
    assert made.relative == pytest.approx(float(predict(one, made.plan).mean()) / 4)
    lines = drawn(made).splitlines()
    assert lines[1:5] == ["pass 1 of each step", "         3 ██ 2", "pass 2 of each step", "         3 █· 2"]
