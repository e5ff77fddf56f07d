"""The trained pipeline in every runtime: one learned plan, real pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

pytest.importorskip("optimum.intel")

from optimum.intel import OVDiffusionPipeline

import lazycompress
from lazycompress import ExportError, InputError
from lazycompress.export.check import verify
from lazycompress.integrations.diffusers import load_exported, load_lazy
from lazycompress.integrations.emoji.bundle import load_pipeline, prompts
from lazycompress.integrations.emoji.evaluate import generate
from lazycompress.integrations.emoji.metrics import psnr
from lazycompress.integrations.emoji.model import WEIGHTS_DIR
from lazycompress.lazy.attach import handle_of

STEPS = 16
CALL = {"height": 32, "width": 32, "num_inference_steps": STEPS, "guidance_scale": 4.0, "max_sequence_length": 1}
RECIPE = {"target": 0.5, "train": {"effort": 0.4}}
LEARN_ON, DRAWN = prompts().seen[50::400], prompts().seen[::400]

pytestmark = pytest.mark.slow(seconds=60)


def draw(pipe: Any, steps: int = STEPS) -> Tensor:
    return generate(pipe, DRAWN, steps=steps, seed=7)


def in_openvino(folder: Path) -> Any:
    pipe = OVDiffusionPipeline.from_pretrained(folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    made: Any = load_pipeline()
    lazycompress.apply(made, RECIPE, call_kwargs={**CALL, "prompt": LEARN_ON}, progress=False)
    return made


@pytest.fixture(scope="module")
def pictures(pipe: Any) -> dict[str, Tensor]:
    lazycompress.disable(pipe)
    found = {"dense": draw(pipe), "fewer": draw(pipe, STEPS // 2)}
    lazycompress.enable(pipe)
    return found | {"lazy": draw(pipe)}


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    OVDiffusionPipeline.from_pretrained(WEIGHTS_DIR, export=True, compile=False).save_pretrained(folder)
    return folder


def closeness(found: Tensor, expected: Tensor) -> float:
    return float(psnr(found, expected).min())


def test_the_plan_is_better_than_fewer_steps(pictures: dict[str, Tensor]) -> None:
    lazy, fewer = (psnr(pictures[name], pictures["dense"]).mean() for name in ("lazy", "fewer"))
    assert lazy > fewer + 3


def test_what_is_saved_draws_the_same(pipe: Any, pictures: dict[str, Tensor], tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "it")
    again = load_lazy(DiffusionPipeline.from_pretrained(tmp_path / "it"), tmp_path / "it")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), pictures["lazy"])


def test_the_exported_folder_draws_the_same_in_openvino(pipe: Any, pictures: dict[str, Tensor], tmp_path: Path) -> None:
    folder = lazycompress.export(pipe, tmp_path / "out", format="openvino")
    assert verify(folder / "transformer").ok
    assert closeness(draw(in_openvino(folder)), pictures["lazy"]) > 50


def test_the_exported_folder_draws_the_same_in_onnx_runtime(
    pipe: Any, pictures: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = lazycompress.export(pipe, tmp_path / "out", format="onnx")
    exported = load_exported(folder)
    exported.set_progress_bar_config(disable=True)
    assert closeness(draw(exported), pictures["lazy"]) > 50


def test_a_wrapped_folder_draws_the_same(
    pipe: Any, pictures: dict[str, Tensor], dense_folder: Path, tmp_path: Path
) -> None:
    lazy = handle_of(pipe.transformer)
    assert lazy is not None
    lazycompress.wrap(dense_folder, lazy.plan, tmp_path / "out")
    assert closeness(draw(in_openvino(tmp_path / "out")), pictures["lazy"]) > 50


def test_the_command_line_learns_and_exports(pictures: dict[str, Tensor], tmp_path: Path) -> None:
    recipe = {**RECIPE, "pipeline": {"prompts": LEARN_ON, "call": CALL}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "lazy-openvino"]
    arguments = ["--model", str(WEIGHTS_DIR), "--recipe", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # Learned by itself: the same seed, the same plan.
    assert closeness(draw(in_openvino(tmp_path / "out")), pictures["lazy"]) > 50


def test_a_pipeline_of_optimum_becomes_lazy_itself(
    pictures: dict[str, Tensor], dense_folder: Path, tmp_path: Path
) -> None:
    pipe = in_openvino(dense_folder)
    dense = draw(pipe)
    call = {**CALL, "prompt": LEARN_ON}
    with pytest.raises(InputError, match="runs in a file, in which no branches are looked for"):
        lazycompress.apply(pipe, {**RECIPE, "units": "branches"}, call_kwargs=call)
    assert lazycompress.apply(pipe, RECIPE, call_kwargs=call, progress=False) is pipe
    lazy = draw(pipe)
    assert psnr(lazy, dense).mean() > psnr(pictures["fewer"], dense).mean() + 3
    assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)
    assert lazycompress.set_target(pipe, 0.25) is pipe
    assert handle_of(pipe.transformer).plan.share == 0.25  # type: ignore[union-attr]
    lazycompress.set_target(pipe, 0.5)
    with pytest.raises(InputError, match=r"runs in a file and is not written alone: lazycompress\.export"):
        lazycompress.save(pipe.transformer, tmp_path / "no")
    with pytest.raises(InputError, match=r"runs in a file: lazycompress\.wrap writes one"):
        load_lazy(pipe, tmp_path)

    lazy = draw(pipe)
    with pytest.raises(ExportError, match="runs in openvino, and stays there"):
        lazycompress.export(pipe, tmp_path / "no", format="onnx")
    assert not (tmp_path / "no").exists()
    folder = lazycompress.export(pipe, tmp_path / "out")
    assert closeness(draw(in_openvino(folder)), lazy) > 50

    lazycompress.disable(pipe)
    assert torch.equal(draw(pipe), dense)
    lazycompress.enable(pipe)
    assert torch.equal(draw(pipe), lazy)
