"""A limit on the error of a stage: what keeps it, what is left out for it, and what is said where nothing does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.compose.quantize import compress_weights, quantize
from lazycompress.integrations.digits.model import digits_sampler, draw_noise
from lazycompress.recipe import IgnoredScope, Quantize
from lazycompress.runtime import LazyModel
from tests.compose_files import openvino_matmuls
from tests.conftest import two_blocks

from .stages import BODIES, INT4, LAYERS, make, sampler


@pytest.mark.slow(seconds=15)
def test_an_error_above_the_limit_stops_and_leaves_the_model_alone() -> None:
    lazy = make()
    expected = r"quantize\.max_error: .* is \d\.\d+e-\d+, allowed are 1\.00e-09.*fall_back"
    with pytest.raises(LazyCompressError, match=expected) as caught:
        quantize(lazy, sampler, Quantize(subset_size=12, max_error=1e-9))
    assert "\n" not in str(caught.value)
    assert lazy.stages == []
    plain = make()
    run = digits_sampler(draw_noise(2, 3), torch.arange(2), 6)
    with torch.no_grad():
        assert torch.equal(run(lazy), run(plain))


@pytest.mark.slow(seconds=27)
def test_falling_back_leaves_out_the_layers_that_hurt_most() -> None:
    """One layer is made hard to quantize: a huge weight takes the whole range of its channel's activations."""
    model: Any = two_blocks()
    with torch.no_grad():
        layer = model.transformer_blocks[1].ff.net[0].proj
        layer.weight[:, 0] *= 100.0
        layer.weight[:, 1:] += 0.02 * torch.randn(layer.weight[:, 1:].shape, generator=torch.Generator().manual_seed(0))

    def computing() -> LazyModel:
        """No decision hangs on a rounded value: the error is that of the arithmetic."""
        lazy = make(model)
        lazy.set_gates(lazy.gates.like(order=0, static=1))
        return lazy

    free = quantize(computing(), sampler, Quantize(subset_size=12, max_error=1e9))
    assert free.error is not None
    lazy = computing()
    report = quantize(lazy, sampler, Quantize(subset_size=12, max_error=free.error / 2, on_error="fall_back"))
    assert report.error is not None
    assert report.error <= free.error / 2
    assert "transformer_blocks.1.ff.net.0.proj" in report.spared
    assert report.left == sum(".attn" in name or ".ff." in name for name in report.spared)
    assert report.changed == LAYERS - report.left
    assert "left out as they hurt most: " in str(report)


@pytest.mark.slow(seconds=60)
def test_layers_outside_of_branches_are_left_out_by_measurement_too(tmp_path: Path) -> None:
    """The rows of the last projection have ranges far apart after this: 8 bits for each row's range are too few."""
    model: Any = two_blocks()
    with torch.no_grad():
        model.proj_out_2.weight[:, 0] *= 300.0

    def computing() -> LazyModel:
        lazy = make(model)
        lazy.set_gates(lazy.gates.like(order=0, static=1))
        return lazy

    free = quantize(computing(), sampler, Quantize(subset_size=12, max_error=1e9))
    assert free.error is not None
    options = Quantize(subset_size=12, max_error=free.error / 2, on_error="fall_back")
    lazy = computing()
    report = quantize(lazy, sampler, options)
    assert "proj_out_2" in report.spared
    found = openvino_matmuls(lazycompress.export(lazy, tmp_path / "out"))
    # Which others hurt too differs between processors; convolutions are no matmuls.
    layers = dict(model.named_modules())
    outside = [name for name in report.spared if ".attn" not in name and ".ff." not in name]
    assert len(outside) == len(report.spared) - report.left
    left = sum(isinstance(layers[name], nn.Linear) for name in outside)
    assert found["outside", "f32", False] == left, "static gates multiply nothing"


@pytest.mark.slow(seconds=60)
def test_weights_that_hurt_stay_in_8_bits(tmp_path: Path) -> None:
    free = compress_weights(make(), sampler, INT4.model_copy(update={"max_error": 1e9}))
    assert free.error is not None
    options = INT4.model_copy(update={"max_error": free.error / 2, "on_error": "fall_back"})
    lazy = make()
    report = compress_weights(lazy, sampler, options)
    assert report.error is not None
    assert report.error <= free.error / 2
    assert (report.changed, report.left) == (LAYERS, 0)
    found = openvino_matmuls(lazycompress.export(lazy, tmp_path / "out"))
    spared = sum(".attn" in name or ".ff." in name for name in report.spared) * BODIES
    assert {key[1]: count for key, count in found.items() if key[0] == "body"} == {
        "i4": LAYERS * BODIES - spared,
        "u8": spared,
    }


@pytest.mark.slow(seconds=35)
def test_a_limit_that_nothing_keeps_is_one_line() -> None:
    with pytest.raises(LazyCompressError, match=r"with the \d+ of \d+ layers left out.*allowed are 1\.00e-12"):
        quantize(make(), sampler, Quantize(subset_size=4, max_error=1e-12, on_error="fall_back"))


@pytest.mark.slow(seconds=15)
def test_an_ignored_scope_takes_names_of_modules() -> None:
    scope = IgnoredScope(names=["transformer_blocks.0.attn1.to_q"], patterns=[r"transformer_blocks\.1\.ff.*"])
    assert quantize(make(), sampler, Quantize(subset_size=4, ignored_scope=scope)).left == 3
