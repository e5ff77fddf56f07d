"""Torch flat, torch lowered, ONNX Runtime and OpenVINO decide alike and give the same, for different architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lazycompress
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.graph.call import take_apart
from lazycompress.graph.insert import find_timestep
from lazycompress.runtime import LazyModel, wrap
from tests.export_models import Reference, alike, lively, loop, tensors_only
from tests.zoo import diffusers_image, diffusers_video
from tests.zoo.specimen import Specimen

STEPS = 50

#: Adaptive norms only; joint attention of two streams; rotary positions and cross-attention.
SPECIMENS = {
    s.name: s for s in [*diffusers_image.SPECIMENS, *diffusers_video.SPECIMENS] if s.name in ("dit", "sd3", "wan")
}


def timesteps(specimen: Specimen, model: nn.Module) -> tuple[str, torch.Tensor]:
    """The timestep's name, and 50 of them over the range that the specimen's own steps have."""
    calls = [take_apart(model, (), specimen.inputs(1, step)) for step in (0, 19)]
    position = find_timestep(calls[0].leaves, calls[0].tensors)
    first, last = (float(call.tensors[position].float().max()) for call in calls)
    times = torch.linspace(first, last, STEPS).to(calls[0].tensors[position].dtype)
    return calls[0].leaves[position].name, times


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, gates), marks=pytest.mark.slow(seconds=50))  # `test_state.py` has small files
        for name in SPECIMENS
        for gates in (lively, alike)
    ],
)
def wrapped(request: pytest.FixtureRequest) -> tuple[LazyModel, dict[str, Any], str, torch.Tensor]:
    specimen = SPECIMENS[request.param[0]]
    model = specimen.build()
    name, times = timesteps(specimen, model)
    inputs = specimen.inputs(3, 0)
    return wrap(model, (), inputs, request.param[1](times.float())), inputs, name, times


@pytest.mark.parametrize("format", ["openvino", pytest.param("onnx", marks=pytest.mark.slow)])
def test_fifty_steps_decide_alike_in_every_form(
    wrapped: tuple[LazyModel, dict[str, Any], str, torch.Tensor],
    format: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lazy, inputs, name, times = wrapped
    folder = lazycompress.export(lazy, tmp_path / "out", format=format, telemetry=True)
    assert "lazycompress exports" not in caplog.text, (
        "the best form of a file is written, with the sizes of the capture"
    )
    runner: Any = (OpenVINORunner if format == "openvino" else OnnxRunner)(folder)
    together = lazy.gates.together
    flat, lowered = Reference(lazy, "flat"), Reference(lazy, "whole" if together else "lowered")
    start = inputs["hidden_states"]
    reused = []
    for sample, time in loop(times, start):
        step = {**inputs, "hidden_states": sample, name: time.expand(inputs[name].shape)}
        expected, decisions = flat(**step)
        from_lowered, decisions_lowered = lowered(**step)
        runner.usage.clear()
        from_file = runner(**tensors_only(step))[0]
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(from_lowered, expected, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(from_file, expected, rtol=0, atol=1e-4 * scale)
        assert torch.equal(decisions, decisions_lowered)
        assert torch.equal(sum(runner.usage.reused.values()), decisions.sum(dim=1))
        reused.append(decisions)
    share = torch.stack(reused)
    assert 0.2 < share.mean() < 0.8
    mixed = (share.mean(dim=2) > 0) & (share.mean(dim=2) < 1)
    assert together or mixed.any(), "samples of one batch decide differently"
