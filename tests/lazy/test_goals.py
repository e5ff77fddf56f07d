"""Budgets in other words than a share: speed, seconds, closeness to the dense images."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress import RecipeError
from lazycompress.lazy.model import LazyModule
from lazycompress.plan.goals import Clocked

from .models import Denoiser

STEPS = 20


def sampler(model: Any) -> Tensor:
    x = torch.randn(8, 16, 6)
    condition = torch.ones(8, 5)
    for step in range(STEPS):
        x = x - model(x, torch.full((8,), 1000.0 * (1 - step / STEPS)), condition) / STEPS
    return x


class Unhurried(Denoiser):
    """Its calls take far longer than what a sampler does beside them, on any machine."""

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().forward(x, timestep, condition)


def learned(model: nn.Module | None = None, **goal: float) -> LazyModule:
    recipe = {"target": 0.5, **goal, "train": {"effort": 0.2}}
    made: LazyModule = lazycompress.apply(model or Denoiser(), recipe, sampler=sampler, progress=False)
    return made


def psnr_of(lazy: LazyModule) -> float:
    """On noise that learning did not draw."""
    found = []
    for seed in (31, 32, 33):
        torch.manual_seed(seed)
        dense = sampler(lazy.model)
        torch.manual_seed(seed)
        errors = (sampler(lazy) - dense).flatten(1).square().mean(dim=1)
        peak = dense.flatten(1).amax(dim=1) - dense.flatten(1).amin(dim=1)
        found.append(10 * (peak.square() / errors).log10())
    return float(torch.cat(found).median())


@torch.no_grad()
@pytest.mark.parametrize("wanted", [35.0, pytest.param(55.0, marks=pytest.mark.slow)])
def test_the_fewest_calls_that_are_close_enough(wanted: float) -> None:
    lazy = learned(psnr=wanted)
    assert lazy.training_report.psnr >= wanted
    assert psnr_of(lazy) > 0.95 * wanted
    assert lazy.engine.target == lazy.plan.share < 1
    cheaper = (sum(lazy.plan.computes) - 1) / STEPS
    assert learned(target=cheaper).training_report.psnr < wanted + 1  # a call less is not enough, or hardly so


@pytest.mark.slow(seconds=10)
def test_an_error_that_only_the_dense_run_keeps_computes_everything() -> None:
    lazy = learned(max_error=1e-30)
    assert lazy.plan.share == 1
    assert lazy.training_report.error == 0


@pytest.mark.parametrize(("seconds", "share"), [(10.0, 1.0), (6.0, 0.5), (20.0, 1.0), (2.0, 0.0)])
def test_time_beside_the_model_is_not_saved(seconds: float, share: float) -> None:
    assert Clocked(run=10.0, calls=8.0, images=4).share(seconds) == pytest.approx(share)


def test_speed_is_bought_with_calls() -> None:
    lazy = learned(Unhurried(), target=0.9, speedup=1.5)
    assert lazy.plan.share <= 1 / 1.5  # of all time, and some of it is beside the model
    assert learned(seconds=1e6).plan.share == 1


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"speedup": 1000.0}, r"speedup: 1000 cannot be reached: a dense run takes .* at best it is \d"),
        ({"seconds": 1e-9}, r"seconds: 1e-09 cannot be reached: .* s an image"),
        ({"speedup": 2.0, "psnr": 30.0}, "speedup and psnr both say the budget: keep one"),
        ({"psnr": 30.0, "units": "branches"}, "psnr is for whole calls, and units: branches needs a graph: say target"),
        ({"speedup": 1.0}, "speedup"),
        ({"psnr": float("nan")}, "psnr"),
    ],
)
def test_what_cannot_be_is_one_line(recipe: dict[str, Any], says: str) -> None:
    model: nn.Module = Denoiser()
    with pytest.raises(RecipeError, match=says) as raised:
        lazycompress.apply(model, recipe, sampler=sampler, progress=False)
    assert "\n" not in str(raised.value)


def test_learning_takes_time_in_proportion_to_its_images() -> None:
    """The sampler makes eight at once: sixteen take two runs where eight take one."""
    spent = []
    for images in (8, 16):
        recipe = {"target": 0.5, "train": {"effort": 0.4, "images": images}}
        made: LazyModule = lazycompress.apply(Denoiser(), recipe, sampler=sampler, progress=False)
        spent.append(made.training_report.calls)
        assert made.training_report.runs <= 6
    assert 1.5 < spent[1] / spent[0] <= 2.1
