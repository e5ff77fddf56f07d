"""Calibration: forward only, what it finds of loops whose arithmetic is known, resuming, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor

from lazycompress.errors import InputError
from lazycompress.plan.reach import reach_of
from lazycompress.plan.record import Reading, calibrate

from .toy import SIZE, Toy, euler, read


class Counting(Toy):
    """Counts its calls, and sees whether any of them could be differentiated."""

    def __init__(self, pull: float = 0.0) -> None:
        super().__init__(pull)
        self.calls = 0
        self.graphs = 0

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        output = super().forward(x, t, label)
        self.graphs += output.requires_grad
        return output


@pytest.mark.parametrize("inference", [False, True])
def test_calibration_is_forward_only_and_stays_within_its_budget(inference: bool) -> None:
    model = Counting(pull=-1.0)
    assert all(p.requires_grad for p in model.parameters())
    with torch.inference_mode(inference):
        found = calibrate(model, euler(), read=read, images=4, progress=False, budget=15)
    assert model.graphs == 0
    assert model.calls == found.calls <= 15 * 20
    assert found.gram.shape == (4, 20, 20)


def test_runs_are_added_until_there_are_as_many_images_as_asked_for() -> None:
    found = calibrate(Toy(), euler(images=3), read=read, images=8, progress=False)
    assert found.gram.shape[0] == 9
    assert found.calls <= 15 * 20 * 3


def test_reach_and_gain_of_a_loop_whose_arithmetic_is_known() -> None:
    """Euler's step is x - v / steps, and a pull multiplies what is there by 1 - pull / steps at each later step."""
    found = calibrate(Toy(pull=2.0), euler(), read=read, images=16, progress=False)
    assert np.abs(found.reach) == pytest.approx(np.full(20, 1 / 20), rel=1e-6)
    assert found.gain[3:15] == pytest.approx((1 - 2.0 / 20) ** (19 - np.arange(3, 15)), rel=0.15)


def test_guidance_in_two_calls_has_a_stream_for_each_condition() -> None:
    def streams(args: tuple[Any, ...], kwargs: Any) -> Reading:
        return Reading(float(args[1][0]), int(not args[2].any()))

    found = calibrate(Toy(), euler(scale=4.0), read=streams, images=4, progress=False)
    assert found.streams == (0, 1) * 20
    sign = np.sign(found.reach[0])
    assert sign * found.reach[0::2] == pytest.approx(np.full(20, 4 / 20), rel=1e-6)
    assert sign * found.reach[1::2] == pytest.approx(np.full(20, -3 / 20), rel=1e-6)


@pytest.mark.parametrize("apart", [True, False])
def test_guidance_in_one_call_is_one_prediction_for_each_image(apart: bool) -> None:
    """All conditional samples first, or each image's samples beside each other."""
    order = (lambda a, b: torch.cat([a, b])) if apart else (lambda a, b: torch.stack([a, b], 1).flatten(0, 1))

    def sampler(model: Any) -> Tensor:
        x, label = torch.randn(4, SIZE, dtype=torch.float64), torch.randn(4, SIZE, dtype=torch.float64)
        for k in range(20):
            t = torch.full((8,), 1 - k / 20, dtype=torch.float64)
            output = model(order(x, x), t, order(label, torch.zeros_like(label)))
            c, u = output.chunk(2) if apart else output.unflatten(0, (4, 2)).unbind(1)
            x = x - (u + 4.0 * (c - u)) / 20
        return x

    together = calibrate(Toy(), sampler, read=read, images=4, progress=False)
    assert np.abs(together.reach) == pytest.approx(np.full(20, 1 / 20), rel=1e-6)
    plain = calibrate(Toy(), euler(images=4), read=read, images=4, progress=False)
    assert together.gram == pytest.approx(16 * plain.gram, rel=1e-5)  # without a pull, the other output is zero


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_reach_of_a_scheduler_is_that_of_its_loop(scheduler_class: Any) -> None:
    scheduler = scheduler_class(beta_schedule="linear")
    scheduler.set_timesteps(12)

    def sampler(model: Any) -> Tensor:
        scheduler.set_timesteps(12)
        x = torch.randn(4, 1, 4, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        return x

    found = calibrate(lambda x, t: 0.1 * x, sampler, read=lambda args, kwargs: float(args[1]), images=4, progress=False)
    other = reach_of(scheduler)(found.timesteps)
    assert np.abs(found.reach) == pytest.approx(np.abs(other), rel=0.05, abs=0.01 * np.abs(other).max())


def test_outputs_may_be_tuples_objects_and_arrays() -> None:
    plain = calibrate(Toy(), euler(), read=read, images=4, progress=False)
    model = Toy()

    def arrays(model_of: Any) -> Tensor:
        return euler()(lambda *args: torch.from_numpy(model_of(*args)["out"][0]))

    found = calibrate(
        lambda *args: {"out": (model(*args).numpy(), "second")}, arrays, read=read, images=4, progress=False
    )
    assert found.gram == pytest.approx(plain.gram)
    assert found.gain == pytest.approx(plain.gain, rel=1e-3)


def test_outputs_that_are_not_finite_stop_it_in_one_line() -> None:
    def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return x / 0 if float(t[0]) < 0.71 else x

    with pytest.raises(InputError, match=r"not finite at call 7 \(timestep 0\.7\)"):
        calibrate(model, euler(), read=read, images=4, progress=False)


def test_samplers_with_noise_of_their_own_are_told_so() -> None:
    generator = torch.Generator()

    def sampler(model: Any) -> Tensor:
        return torch.randn(4, SIZE, generator=generator) + model(torch.zeros(4, SIZE), torch.ones(4), None)

    with pytest.raises(InputError, match="global generator"):
        calibrate(lambda x, t, label: x + 1, sampler, read=read, images=4, progress=False)


@pytest.mark.parametrize(("images", "budget"), [(0, 15.0), (4, 1.0), (4, float("nan"))])
def test_budgets_that_are_none_are_refused(images: int, budget: float) -> None:
    with pytest.raises(InputError, match="budget of 2 runs"):
        calibrate(Toy(), euler(), read=read, images=images, budget=budget, progress=False)


def test_a_sampler_that_calls_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="without calling the model"):
        calibrate(Toy(), lambda model: torch.zeros(2, 3), read=read, progress=False)


def test_a_calibration_that_was_cut_off_goes_on_and_repeats_one_run_at_most(tmp_path: Path) -> None:
    whole = calibrate(Toy(-1.0), euler(images=2), read=read, images=4, progress=False)
    model = Counting(-1.0)

    def cut_off(args: tuple[Any, ...], kwargs: Any) -> float:
        if model.calls == whole.calls // 2:
            raise KeyboardInterrupt
        return read(args, kwargs)

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, euler(images=2), read=cut_off, images=4, progress=False, checkpoint=tmp_path / "kept")
    again = calibrate(model, euler(images=2), read=read, images=4, progress=False, checkpoint=tmp_path / "kept")
    assert again.gain == pytest.approx(whole.gain)
    assert again.gram == pytest.approx(whole.gram)
    assert model.calls <= whole.calls + 2 * 20


def test_a_checkpoint_of_another_calibration_is_refused(tmp_path: Path) -> None:
    calibrate(Toy(), euler(), read=read, images=4, progress=False, checkpoint=tmp_path)
    with pytest.raises(InputError, match="keeps another calibration: seed was 0, now it is 1"):
        calibrate(Toy(), euler(), read=read, images=4, seed=1, progress=False, checkpoint=tmp_path)


def test_torchs_generator_is_left_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    calibrate(Toy(), euler(), read=read, images=4, progress=False)
    assert torch.equal(torch.rand(3), expected)
