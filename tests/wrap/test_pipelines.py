"""Pipelines that optimum-intel exported and compressed, wrapped as folders, run by `OVDiffusionPipeline` as it is."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("optimum.intel")

import nncf
import openvino as ov
from optimum.intel import OVDiffusionPipeline

import lazycompress
from lazycompress.plan.plan import dense, even

from ..pipelines import PIPELINES

pytestmark = pytest.mark.slow

STEPS = 8
CONFIG = {"INFERENCE_PRECISION_HINT": "f32"}
MODEL = Path("transformer") / "openvino_model.xml"


class Recorded:
    """A request that notes what it was called with and what it gave."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.calls: list[tuple[dict[str, Any], Any]] = []

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = self.request(inputs, *args, **kwargs)
        self.calls.append(({n: np.array(v) for n, v in inputs.items()}, next(iter(found.values())).copy()))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.request, name)


def load(folder: Path, sizes: dict[str, int] | None = None) -> tuple[Any, Recorded]:
    pipe = OVDiffusionPipeline.from_pretrained(folder, ov_config=CONFIG, compile=False)
    pipe.set_progress_bar_config(disable=True)
    if sizes:
        pipe.reshape(**sizes)
    pipe.compile()
    pipe.transformer.request = Recorded(pipe.transformer.request)
    return pipe, pipe.transformer.request


def sample(pipe: Any, call: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return np.asarray(pipe(**call, num_inference_steps=STEPS, output_type="latent", **options)[0])


def of_batch(call: dict[str, Any], batch: int) -> dict[str, Any]:
    return {key: value[:batch] if isinstance(value, list) else value for key, value in call.items()}


class Stopped(Exception):
    """Raised within a run, by hand."""


def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 3:
        raise Stopped
    return tensors


@pytest.fixture(scope="module", params=["sd3", "flux", "sana", "ltx"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    PIPELINES[request.param].make().save_pretrained(folder / "torch")
    pipe = OVDiffusionPipeline.from_pretrained(folder / "torch", export=True, compile=False, load_in_8bit=False)
    pipe.save_pretrained(folder / "dense")
    return PIPELINES[request.param], folder / "dense"


@pytest.mark.parametrize("weights", ["f32", "int8", "int4"])
def test_a_wrapped_pipeline(exported: tuple[Any, Path], weights: str, tmp_path: Path) -> None:
    specimen, source = exported
    if weights != "f32":
        shutil.copytree(source, tmp_path / "dense")
        model = ov.Core().read_model(source / MODEL)
        modes = nncf.CompressWeightsMode
        options = (
            {"mode": modes.INT4_SYM, "group_size": 8, "all_layers": True}
            if weights == "int4"
            else {"mode": modes.INT8_ASYM}
        )
        ov.save_model(nncf.compress_weights(model, **options), tmp_path / "dense" / MODEL, compress_to_fp16=False)
        source = tmp_path / "dense"
    pipe, calls = load(source)
    expected = sample(pipe, specimen.call)
    times = [float(inputs["timestep"].reshape(-1)[0]) for inputs, _ in calls.calls]
    times = times[:: len(times) // STEPS]
    full = ov.Core().compile_model(source / MODEL, "CPU", CONFIG)

    began = time.process_time()
    lazycompress.wrap(source, dense(times), tmp_path / "all")
    seconds = time.process_time() - began
    print(f"wrapped in {seconds:.2f} s")
    assert seconds < 10
    np.testing.assert_array_equal(sample(load(tmp_path / "all")[0], specimen.call), expected)

    plan = even(times, 0.5, 1)
    lazycompress.wrap(source, plan, tmp_path / "half")
    pipe, calls = load(tmp_path / "half")
    first, _, again = sample(pipe, specimen.call), sample(pipe, specimen.other), sample(pipe, specimen.call)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - expected).max() > 0
    computed = [np.array_equal(next(iter(full(inputs).values())), output) for inputs, output in calls.calls]
    assert computed == [c for c in plan.computes for _ in range(specimen.calls_per_step)] * 3


@pytest.mark.parametrize("batch", [1, 2])
def test_a_wrapped_pipeline_reshaped(exported: tuple[Any, Path], batch: int, tmp_path: Path) -> None:
    specimen, source = exported
    call = of_batch(specimen.call, batch)
    call = {key: value for key, value in call.items() if key not in ("negative_prompt", "true_cfg_scale")}
    pipe, calls = load(source)
    sample(pipe, call)
    plan = even([float(inputs["timestep"].reshape(-1)[0]) for inputs, _ in calls.calls], 0.5, 1)
    lazycompress.wrap(source, plan, tmp_path / "lazy")
    expected = sample(load(tmp_path / "lazy")[0], call)
    sizes = {"batch_size": batch, "height": call["height"], "width": call["width"], "num_images_per_prompt": 1}
    if "num_frames" in call:
        sizes["num_frames"] = call["num_frames"]
    pipe, calls = load(tmp_path / "lazy", sizes)
    for _ in range(2):
        np.testing.assert_allclose(sample(pipe, call), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    full, _ = load(source, sizes)
    results = [next(iter(full.transformer.request(inputs).values())) for inputs, _ in calls.calls]
    computed = [close(output, result) for (_, output), result in zip(calls.calls, results, strict=True)]
    assert computed == list(plan.computes) * 2

    lazycompress.wrap(source, dense(plan.timesteps), tmp_path / "all")
    assert close(sample(load(tmp_path / "all", sizes)[0], call), sample(full, call))


def close(one: Any, other: Any) -> bool:
    """Equal but for rounding: kernels are chosen by the graph around them."""
    return bool(np.abs(one - other).max() <= 1e-5 * np.abs(other).max())


def test_a_wrapped_pipeline_that_is_stopped_and_changes_its_batch(exported: tuple[Any, Path], tmp_path: Path) -> None:
    """Each run gives what it gives alone, bit for bit, and skips as planned."""
    specimen, source = exported
    pipe, calls = load(source)
    sample(pipe, specimen.call)
    times = [float(inputs["timestep"].reshape(-1)[0]) for inputs, _ in calls.calls]
    plan = even(times[:: specimen.calls_per_step], 0.5, 1)
    lazycompress.wrap(source, plan, tmp_path / "lazy")
    full = ov.Core().compile_model(source / MODEL, "CPU", CONFIG)
    alone = {batch: sample(load(tmp_path / "lazy")[0], of_batch(specimen.call, batch)) for batch in (1, 2)}
    pipe, calls = load(tmp_path / "lazy")
    for batch, before in ((2, specimen.call), (2, specimen.other), (1, specimen.call), (2, specimen.call)):
        with pytest.raises(Stopped):
            sample(pipe, of_batch(before, batch), callback_on_step_end=stop)
        calls.calls.clear()
        np.testing.assert_array_equal(sample(pipe, of_batch(specimen.call, batch)), alone[batch])
        computed = [np.array_equal(next(iter(full(inputs).values())), output) for inputs, output in calls.calls]
        assert computed == [c for c in plan.computes for _ in range(specimen.calls_per_step)]
