"""The public functions: what they return, and the one line that bad input gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.integrations.digits.model import digits_sampler, draw_noise

INPUTS = {
    "hidden_states": torch.randn(2, 1, 8, 8),
    "timestep": torch.tensor([980, 980]),
    "class_labels": torch.tensor([1, 2]),
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, tokens: Tensor, timestep: Tensor) -> Tensor:
        return tokens + self.layers(tokens) * timestep[:, None, None]


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(3)
        )

    def forward(self, image: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            image = image + block(image)
        return image


def test_locate_finds_every_branch_of_the_bundled_model(digits: nn.Module) -> None:
    branches = lazycompress.locate(digits, INPUTS)
    assert [branch.kind for branch in branches] == ["attention", "mlp"] * 6
    assert len({branch.name for branch in branches}) == 12
    # 16 tokens of width 128: four projections and two products; two matmuls to four times the width.
    assert branches[0].macs == 16 * 128 * (4 * 128 + 2 * 16)
    assert branches[1].macs == 16 * 128 * (2 * 4 * 128)


def test_locate_takes_positional_inputs_too(digits: nn.Module) -> None:
    positional = (INPUTS["hidden_states"], INPUTS["timestep"], INPUTS["class_labels"])
    assert len(lazycompress.locate(digits, positional)) == 12


@pytest.mark.parametrize("units", ["calls", "branches"])
def test_apply_learns_in_the_sampler(short: nn.Module, units: str) -> None:
    def sampler(model: nn.Module) -> Tensor:
        noise = draw_noise(3, int(torch.randint(0, 1000, (1,))))
        return digits_sampler(noise, torch.arange(3), 6)(model)

    lazy = lazycompress.apply(
        short, {"target": 0.8, "units": units, "train": {"effort": 0.25}}, sampler=sampler, progress=False
    )
    with torch.no_grad():
        assert sampler(lazy).shape == (3, 1, 8, 8)
    assert lazy.summary().skip_ratio > 0
    assert lazy.summary().macs_ratio <= 0.81


@pytest.mark.parametrize("model", [Mlp(), ResNet()], ids=["mlp", "resnet"])
def test_a_model_that_is_no_dit_is_one_line_that_says_what_there_was(model: nn.Module) -> None:
    tokens = torch.randn(2, 4, 8, 8) if isinstance(model, ResNet) else torch.randn(2, 8, 16)
    with pytest.raises(LazyCompressError, match=r"no Diffusion Transformer here.*residual joins") as caught:
        lazycompress.locate(model, (tokens, torch.ones(2)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"hidden": torch.zeros(1, 1, 8, 8)}, "do not fit"),
        ({"hidden_states": torch.zeros(1, 1, 8, 8), "image": 1}, "do not fit"),
        ({"hidden_states": torch.zeros(8)}, "without a floating-point tensor of rank 3 or more"),
        ({}, "do not fit|without a floating-point tensor"),
    ],
)
def test_missing_inputs_are_one_line(digits: nn.Module, inputs: dict[str, object], expected: str) -> None:
    with pytest.raises(LazyCompressError, match=expected) as caught:
        lazycompress.locate(digits, inputs)
    assert "\n" not in str(caught.value)


def test_nothing_to_learn_on_says_what_to_pass(short: nn.Module) -> None:
    with pytest.raises(LazyCompressError, match="pass sampler="):
        lazycompress.apply(short, "lazy_dit.yaml", example_inputs=INPUTS)
    with pytest.raises(LazyCompressError, match="pass example_inputs= or sampler="):
        lazycompress.apply(short, {"train": {"enabled": False}})


def test_a_sampler_that_never_calls_the_model_is_one_line(short: nn.Module) -> None:
    with pytest.raises(LazyCompressError, match="without calling the model"):
        lazycompress.apply(short, sampler=lambda model: torch.zeros(1, 1, 8, 8))


def test_what_is_neither_a_model_nor_a_pipeline_is_one_line() -> None:
    with pytest.raises(
        LazyCompressError, match=r"apply takes an nn\.Module or a diffusers pipeline, there was SimpleNamespace"
    ):
        lazycompress.apply(SimpleNamespace(transformer=None))


def test_untrained_gates_compute_everything(short: nn.Module) -> None:
    lazy = lazycompress.apply(short, {"train": {"enabled": False}}, example_inputs=INPUTS)
    sample = digits_sampler(draw_noise(2), torch.arange(2), 5)
    with torch.no_grad():
        assert torch.equal(sample(lazy), sample(short))
    assert lazy.summary().skip_ratio == 0


def test_importing_the_package_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, lazycompress; print('torch' in sys.modules, callable(lazycompress.export))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
