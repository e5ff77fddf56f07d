"""Files for ExecuTorch against torch, for batches that decide as one. `make test-all` installs the extra that they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.export.check import verify
from lazycompress.runtime import LazyModel, wrap
from tests.export_models import Reference, alike, lively, loop, small_dit, small_inputs
from tests.pipelines import PIPELINES
from tests.zoo.specimen import randomise

pytest.importorskip("executorch")
from lazycompress.export.executorch import ExecuTorchRunner

pytestmark = pytest.mark.slow(seconds=30)

TIMES = torch.arange(980, -1, -20).float()


@pytest.fixture(scope="module")
def lazy() -> LazyModel:
    """A small DiT that skips whole calls of single images."""
    return wrap(small_dit(), (), small_inputs(1, 980), alike(TIMES))


@pytest.fixture(scope="module")
def folder(lazy: LazyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("executorch") / "out"
    return lazycompress.export(lazy, out, format="executorch", telemetry=True)


def same(lazy: LazyModel, runner: Any, seed: int, stop: int = len(TIMES)) -> int:
    """An image of both; how many calls were skipped."""
    reference, skipped = Reference(lazy, "lowered", "batch"), 0
    runner.usage.clear()
    inputs = small_inputs(1, 980, seed, label=seed)
    for step, (latents, time) in enumerate(loop(TIMES[:stop], inputs["hidden_states"], seed)):
        call = inputs | {"hidden_states": latents, "timestep": time.repeat(1).long()}
        expected, decisions = reference(**call)
        found = runner(**call).sample
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), step
        skipped += int(decisions.all())
    times, reused = runner.usage.heatmap()
    assert len(times) == stop
    assert int((reused > 0).all(dim=1).sum()) == skipped
    return skipped


def test_a_file_equals_torch_over_images_that_follow_and_one_that_stops(lazy: LazyModel, folder: Path) -> None:
    runner = ExecuTorchRunner(folder)
    assert 10 <= same(lazy, runner, 0) <= 40
    same(lazy, runner, 1, stop=11)
    same(lazy, runner, 2)


def test_images_that_take_turns_have_a_state_each(lazy: LazyModel, folder: Path) -> None:
    runner = ExecuTorchRunner(folder)
    other = runner.twin()
    calls = [small_inputs(1, int(time), seed=5) for time in TIMES[:8]]
    others = [small_inputs(1, int(time), seed=6, label=3) for time in TIMES[:8]]
    alone = [runner(**call).sample for call in calls]
    runner.reset()
    turns = [(runner(**call).sample, other(**apart).sample)[0] for call, apart in zip(calls, others, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, turns, strict=True))


def test_what_is_written_is_checked_later_too(folder: Path) -> None:
    report = verify(folder)
    assert report.ok
    assert report.flipped == 0


def test_a_call_of_other_sizes_or_dtypes_is_one_line(folder: Path) -> None:
    runner = ExecuTorchRunner(folder)
    with pytest.raises(LazyCompressError, match=r"hidden_states: the dimensions \[2, .* the file's \[1, 1, 8, 8\]"):
        runner(**small_inputs(2, 980))
    call = small_inputs(1, 980)
    with pytest.raises(LazyCompressError, match=r"timestep: the file takes torch\.int64, this is torch\.float32"):
        runner(**call | {"timestep": call["timestep"].float()})


def test_what_it_cannot_hold_is_said(lazy: LazyModel, tmp_path: Path) -> None:
    with pytest.raises(LazyCompressError, match="decide='batch'"):
        lazycompress.export(lazy, tmp_path / "out", format="executorch", decide="sample")
    with pytest.raises(LazyCompressError, match="float32 alone"):
        lazycompress.export(lazy, tmp_path / "out", format="executorch", weights="f16")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_broken_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes((folder / "model.pte").read_bytes()[:5000])
    (tmp_path / "lazycompress.json").write_bytes((folder / "lazycompress.json").read_bytes())
    with pytest.raises(LazyCompressError, match="does not load"):
        ExecuTorchRunner(tmp_path)


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.ones(1), "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3), "guidance": torch.full((1,), 3.5),
    }  # fmt: skip
    return randomise(model), inputs


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 8, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.full((2,), 1.0),
    }  # fmt: skip
    return randomise(model), inputs


@pytest.mark.parametrize("build", [flux, sd3])
@pytest.mark.parametrize("gates", [alike, lively])
def test_other_models_whole_calls_and_branches(build: Any, gates: Any, tmp_path: Path) -> None:
    """The export compares with torch by itself: four calls, decisions and all."""
    model, inputs = build()
    times = torch.linspace(1, 0.05, 20)
    lazy = wrap(model, (), inputs, alike(times) if gates is alike else lively(times, spread=0.0))
    out = lazycompress.export(lazy, tmp_path / "out", format="executorch", telemetry=True)
    assert verify(out).flipped == 0


def test_a_learned_pipeline_s_denoiser_goes_by_its_plan(tmp_path: Path) -> None:
    """What a user does: apply to a pipeline, export its denoiser, and check the file on the command line."""
    pipe = PIPELINES["sd3"].make()
    recipe = {"target": 0.5, "units": "calls"}
    call = {**PIPELINES["sd3"].call, "num_inference_steps": 8}
    lazycompress.apply(pipe, recipe, call_kwargs=call, progress=False)
    out = lazycompress.export(pipe.transformer, tmp_path / "out", format="executorch")
    command = [str(Path(sys.executable).parent / "lazycompress"), "verify", str(out)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "ok" in said
