"""Wrapped files reshaped and run by OpenVINO's own programs: `benchmark_app` and openvino-genai."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as ops

import lazycompress
from lazycompress.plan.plan import Plan, dense, even

from ..pipelines import PIPELINES
from .models import CHANNELS, WIDTH, OpenVINO, openvino_model
from .test_semantics import TIMES, Image, prompt

PLAN = even(TIMES, 0.25, 1)
BENCHMARK = shutil.which("benchmark_app", path=str(Path(sys.executable).parent))


def slow_model() -> ov.Model:
    """The small denoiser, with a product of large matrices that hardly changes what it gives: calls that compute show in time."""
    model = openvino_model()
    result = model.get_results()[0]
    scale = ops.reduce_mean(model.get_parameters()[0], ops.constant(np.arange(4)), keep_dims=False)
    large = ops.constant(np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32))
    product = ops.matmul(ops.multiply(large, scale), large, False, False)
    small = ops.multiply(ops.reduce_max(product, ops.constant(np.arange(2))), ops.constant(np.float32(1e-9)))
    result.input(0).replace_source_output(ops.add(result.input_value(0), small).output(0))
    return model


@pytest.mark.slow(seconds=5)
@pytest.mark.skipif(BENCHMARK is None, reason="benchmark_app is not installed")
@pytest.mark.parametrize("batch", [1, 2])
def test_benchmark_app_reshapes_and_skips(batch: int, tmp_path: Path) -> None:
    """Fed with the calls of an image, it takes the time of those that compute."""
    model = slow_model()
    files = {
        word: lazycompress.wrap(model, plan, tmp_path / word) / "openvino_model.xml"
        for word, plan in (("all", dense(TIMES)), ("lazy", PLAN))
    }
    lazy, image = OpenVINO(files["lazy"]), Image(1, prompt(1, batch))
    given: dict[str, list[str]] = {}
    while not image.over:
        inputs = image.inputs()
        for name, value in inputs.items():
            path = (
                tmp_path / f"{name}_{len(TIMES) - len(image.times):02}.npy"
            )  # they are fed in the order of their names
            np.save(path, value)
            given.setdefault(name, []).append(str(path))
        image.step(lazy(**inputs))
    shapes = f"hidden_states[{batch},{CHANNELS},6,6],timestep[{batch}],encoder_hidden_states[{batch},3,{WIDTH}]"
    seconds = {}
    for word, file in files.items():
        options = {
            "-m": file, "-d": "CPU", "-shape": shapes, "-layout": "hidden_states[?CHW]", "-api": "sync", "-hint": "none",
            "-niter": 4 * len(TIMES), "-inference_only": False, "-report_type": "no_counters", "-report_folder": tmp_path,
        }  # fmt: skip
        paths = [f"{name}:{','.join(those)}" for name, those in given.items()]
        words = [str(word) for option in options.items() for word in option]
        command = [str(BENCHMARK), *words, "-json_stats", "-i", *paths]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        report = json.loads((tmp_path / "benchmark_report.json").read_text(encoding="utf-8"))
        seconds[word] = float(report["execution_results"]["avg latency"])
    print(f"mean seconds of a call, in thousandths: {seconds}")
    assert PLAN.share == 0.25
    assert 0.1 < seconds["lazy"] / seconds["all"] < 0.6


@pytest.fixture(scope="module")
def for_genai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 pipeline by optimum-intel, with its tokenizers converted."""
    pytest.importorskip("openvino_genai")
    convert = pytest.importorskip("openvino_tokenizers").convert_tokenizer
    optimum = pytest.importorskip("optimum.intel")
    folder = tmp_path_factory.mktemp("genai")
    PIPELINES["sd3"].make().save_pretrained(folder / "torch")
    pipe = optimum.OVDiffusionPipeline.from_pretrained(folder / "torch", export=True, compile=False, load_in_8bit=False)
    pipe.save_pretrained(folder / "dense")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        ov.save_model(convert(getattr(pipe, name)), folder / "dense" / name / "openvino_tokenizer.xml")
    return folder / "dense"


class Genai:
    """Text2ImagePipeline of static sizes."""

    def __init__(self, folder: Path, images: int) -> None:
        import openvino_genai

        self.pipe: Any = openvino_genai.Text2ImagePipeline(str(folder))
        self.pipe.reshape(images, 16, 16, 7.0)
        self.pipe.compile("CPU", INFERENCE_PRECISION_HINT="f32")
        self.images = images

    def __call__(self, prompt: str, steps: int) -> list[Any]:
        """The latents after each step, and the image."""
        found: list[Any] = []

        def note(step: int, count: int, latents: Any) -> bool:
            found.append(latents.data.copy())
            return False

        image = self.pipe.generate(
            prompt, width=16, height=16, num_inference_steps=steps, num_images_per_prompt=self.images,
            guidance_scale=7.0, rng_seed=1, callback=note,
        )  # fmt: skip
        return [*found, image.data.copy()]


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("images", [1, 2])
def test_genai_reshapes_and_skips(for_genai: Path, images: int, tmp_path: Path) -> None:
    scheduler = PIPELINES["sd3"].make().scheduler
    scheduler.set_timesteps(8)
    times = tuple(scheduler.timesteps.tolist())
    plan = Plan(times, (True, True, False, True, False, False, True, False), 0)
    full = Genai(for_genai, images)("a cat", len(times))
    lazycompress.wrap(for_genai, dense(times), tmp_path / "all")
    for one, other in zip(Genai(tmp_path / "all", images)("a cat", len(times)), full, strict=True):
        np.testing.assert_allclose(
            one, other, rtol=0, atol=1e-5 * np.abs(other).max() if other.dtype == np.float32 else 1
        )

    lazycompress.wrap(for_genai, plan, tmp_path / "lazy")
    pipe = Genai(tmp_path / "lazy", images)
    first, _, again = pipe("a cat", len(times)), pipe("red dog", len(times)), pipe("a cat", len(times))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    # Of order 0, a call that is skipped moves the latents by what the one before did, for each bit of noise that goes.
    gaps = torch.diff(scheduler.sigmas).tolist()
    moves = [(after - before) / gap for before, after, gap in zip(first, first[1 : len(times)], gaps[1:], strict=False)]
    repeats = [np.allclose(one, other, rtol=0, atol=1e-3) for one, other in pairwise(moves)]
    assert repeats == [not computes for computes in plan.computes[2:]]
