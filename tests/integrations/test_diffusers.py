"""Whole diffusers pipelines: lazy in place, the same images where nothing is reused, skipping where gates say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPAGPipeline, StableDiffusion3Img2ImgPipeline
from diffusers.hooks import apply_group_offloading

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.integrations.diffusers import (
    LazyDenoiser,
    export_pipeline,
    exported_summary,
    lazy_denoisers,
    load_exported,
    load_lazy,
    set_policy,
)
from tests.pipelines import PIPELINES, make_dit, make_pixart, make_sd3, make_wan, quiet

STEPS = 6


def some_slow(*quick: str) -> list[object]:
    """Every pipeline, marked slow where it is not named: another architecture for each question is enough at first."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow(seconds=15)) for name in PIPELINES]


def sample(pipe: Any, call: dict[str, Any], steps: int = STEPS, seed: int = 0, **more: Any) -> np.ndarray:
    torch.manual_seed(seed)
    images: np.ndarray = pipe(**call, num_inference_steps=steps, output_type="np", **more)[0]
    return images


def make_lazy(name: str, train: bool = False, **recipe: Any) -> tuple[Any, np.ndarray]:
    """The lazy pipeline, and the dense one's images."""
    specimen = PIPELINES[name]
    pipe = specimen.make()
    dense = sample(pipe, specimen.call)
    plan = {"target": 0.6, "units": "branches", "train": {"enabled": train, "effort": 0.25}, **recipe}
    found = lazycompress.apply(pipe, plan, call_kwargs={**specimen.call, "num_inference_steps": STEPS}, progress=False)
    assert found is pipe
    return pipe, dense


@pytest.mark.parametrize("name", some_slow("dit", "sd3", "flux"))
def test_compute_equals_dense_and_reuse_skips(name: str) -> None:
    pipe, dense = make_lazy(name)
    specimen = PIPELINES[name]
    lazy = pipe.transformer
    assert isinstance(lazy, LazyDenoiser)
    runs: list[int] = []
    for branch in lazy.program(lazy.example).lowered.graph_module.children():
        if hasattr(branch, "core"):
            branch.core.register_forward_pre_hook(lambda *_: runs.append(1))

    set_policy(pipe, "compute")
    assert np.array_equal(sample(pipe, specimen.call), dense)
    every = STEPS * specimen.calls_per_step * len(lazy.branches)
    assert len(runs) == every
    assert lazycompress.summary(pipe).skip_ratio == 0.0

    set_policy(pipe, "reuse")
    runs.clear()
    lazycompress.reset(pipe)
    once = sample(pipe, specimen.call)
    assert len(runs) == every // STEPS
    assert lazycompress.summary(pipe)["transformer"].skip_ratio == pytest.approx(1 - 1 / STEPS)
    assert not np.allclose(once, dense, atol=1e-3)

    # Another prompt in between, and the first again: as if each were alone.
    other = sample(pipe, specimen.other)
    assert np.array_equal(sample(pipe, specimen.call), once)
    lazycompress.reset(pipe)
    assert np.array_equal(sample(pipe, specimen.other), other)

    lazycompress.disable(pipe)
    assert pipe.transformer is lazy.model
    assert np.array_equal(sample(pipe, specimen.call), dense)


@pytest.mark.parametrize("name", some_slow("pixart", "sana"))
def test_learned_gates_skip_and_stay_closer_than_reuse_everywhere(name: str) -> None:
    pipe, dense = make_lazy(name, train=True)
    specimen = PIPELINES[name]
    learned = sample(pipe, specimen.call)
    summary = lazycompress.summary(pipe)
    assert summary["transformer"].macs_ratio <= 0.62
    assert summary.skip_ratio > 0.2
    text = str(summary)
    assert "transformer" in text
    assert all(branch.name in text for branch in pipe.transformer.branches)
    set_policy(pipe, "reuse")
    assert np.square(learned - dense).mean() < np.square(sample(pipe, specimen.call) - dense).mean()


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_batch_of_prompts_equals_single_ones(name: str) -> None:
    pipe, _ = make_lazy(name, train=True)
    call = PIPELINES[name].call
    noise = torch.randn(2, 4 if name == "flux" else 16, generator=torch.Generator().manual_seed(5))

    def latents(which: slice) -> torch.Tensor:
        shape = (2, 16, 16) if name == "flux" else (2, 16, 2, 2, 2)
        made = torch.randn(shape, generator=torch.Generator().manual_seed(int(noise[0, 0] > 9)))
        return made[which]

    def run(which: slice) -> np.ndarray:
        lazycompress.reset(pipe)
        lists = {key: value[which] if isinstance(value, list) else value for key, value in call.items()}
        return sample(pipe, lists, latents=latents(which))

    together = run(slice(None))
    singles = np.concatenate([run(slice(i, i + 1)) for i in range(2)])
    assert np.abs(together - singles).max() < 1e-4


@pytest.mark.slow(seconds=30)
def test_two_denoisers_are_both_made_lazy() -> None:
    call = {**PIPELINES["wan"].call, "num_inference_steps": STEPS}
    pipe = make_wan()
    torch.manual_seed(1)
    pipe.register_modules(transformer_2=make_wan().transformer)
    pipe.register_to_config(boundary_ratio=0.7)
    dense = sample(pipe, PIPELINES["wan"].call)
    lazycompress.apply(pipe, {"units": "branches", "train": {"enabled": False}}, call_kwargs=call, progress=False)
    set_policy(pipe, "compute")
    assert np.array_equal(sample(pipe, PIPELINES["wan"].call), dense)
    assert list(lazy_denoisers(pipe)) == ["transformer", "transformer_2"]
    set_policy(pipe, "reuse")
    sample(pipe, PIPELINES["wan"].call)
    assert all(part.skip_ratio > 0.2 for part in lazycompress.summary(pipe).denoisers.values())


def test_the_recipe_says_what_to_sample() -> None:
    recipe = {
        "units": "branches",
        "target": 0.7,
        "train": {"effort": 0.25},
        "pipeline": {"class_labels": [1, 2, 3], "batch": 2, "call": {"num_inference_steps": 5, "guidance_scale": 1.0}},
    }
    pipe = lazycompress.apply(make_dit(), recipe, progress=False)
    assert len(pipe.transformer.gates.grid) == 5
    assert pipe.transformer.example.batch == 2


def test_steps_callbacks_and_generators_are_the_callers() -> None:
    pipe, _ = make_lazy("sd3", train=True)
    seen: list[int] = []

    def note(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return values

    call = PIPELINES["sd3"].call
    for steps in (4, 11):
        seen.clear()
        lazycompress.reset(pipe)
        sample(pipe, call, steps, callback_on_step_end=note, generator=torch.Generator().manual_seed(3))
        assert seen == list(range(steps))
        assert lazycompress.summary(pipe)["transformer"].calls == steps
        assert lazycompress.summary(pipe).skip_ratio > 0.1


@pytest.mark.slow
def test_it_moves_and_keeps_its_gates_exact() -> None:
    pipe, _ = make_lazy("sd3", train=True)
    lazy = pipe.transformer
    before = {name: value.clone() for name, value in lazy.gates.state_dict().items()}
    learned = sample(pipe, PIPELINES["sd3"].call)
    pipe.to(torch.bfloat16)
    assert pipe.transformer.dtype is torch.bfloat16
    assert all(torch.equal(before[name], value) for name, value in lazy.gates.state_dict().items())
    lazycompress.reset(pipe)
    half = sample(pipe, PIPELINES["sd3"].call)
    assert lazycompress.summary(pipe).skip_ratio > 0.2
    assert np.abs(half - learned).mean() < 0.1
    pipe.to("cpu", torch.float32)
    assert np.isfinite(sample(pipe, PIPELINES["sd3"].call)).all()
    assert pipe.transformer.config.num_layers == 3
    assert pipe.device.type == "cpu"


def test_a_saved_pipeline_is_dense_for_diffusers_and_lazy_for_us(tmp_path: Path) -> None:
    pipe, dense = make_lazy("dit", train=True)
    call = PIPELINES["dit"].call
    learned = sample(pipe, call)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer).__name__ == "DiTTransformer2DModel"
    assert np.array_equal(sample(again, call), dense)
    load_lazy(again, tmp_path)
    assert np.array_equal(sample(again, call), learned)
    lazycompress.disable(again)
    assert np.array_equal(sample(again, call), dense)
    lazycompress.enable(again)
    assert np.array_equal(sample(again, call), learned)


def test_offloading_moves_it_in_and_out() -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe, dense = make_lazy("dit", train=True)
    call = PIPELINES["dit"].call
    learned = sample(pipe, call)
    # What `pipe.enable_model_cpu_offload` does with each part; it refuses machines without an accelerator.
    _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    set_policy(pipe, "compute")
    assert np.array_equal(sample(pipe, call), dense)
    hook.offload()
    set_policy(pipe, "learned")
    lazycompress.reset(pipe)
    offloaded = sample(pipe, call)
    hook.offload()
    assert lazycompress.summary(pipe)["transformer"].calls == STEPS
    hook.remove()
    # The hook says before every call where the model is to be. It is there, and its caches stay.
    assert np.array_equal(offloaded, learned)
    assert not np.array_equal(offloaded, dense)
    assert lazycompress.summary(pipe).skip_ratio > 0.2


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("dit", "openvino"),
        pytest.param("dit", "onnx", marks=pytest.mark.slow(seconds=30)),
        pytest.param("pixart", "openvino", marks=pytest.mark.slow(seconds=40)),
        pytest.param("sd3", "onnx", marks=pytest.mark.slow(seconds=40)),
    ],
)
def test_an_exported_pipeline_gives_the_lazy_images(name: str, format: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino" if format == "openvino" else "onnxruntime")
    pipe, dense = make_lazy(name, train=True)
    specimen = PIPELINES[name]
    export_pipeline(pipe, tmp_path / "out", format, telemetry=True)
    assert not list((tmp_path / "out").glob("transformer/diffusion_pytorch_model*"))
    lazycompress.reset(pipe)
    expected = [sample(pipe, specimen.call), sample(pipe, specimen.other)]
    skipped = lazycompress.summary(pipe).skip_ratio
    loaded = load_exported(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    found = [sample(loaded, call) for call in (specimen.call, specimen.other, specimen.call)]
    for ours, theirs in zip(found, [*expected, expected[0]], strict=True):
        assert np.abs(ours - theirs).max() < 1 / 255
    assert np.array_equal(found[0], found[2])
    assert skipped > 0.2
    assert not np.array_equal(expected[0], dense)
    assert exported_summary(loaded).skip_ratio == pytest.approx(skipped, abs=0.02)
    with pytest.raises(LazyCompressError, match="overwrite=True"):
        export_pipeline(pipe, tmp_path / "out", format)


@pytest.mark.slow(seconds=40)
def test_calls_in_turns_have_a_state_each_in_a_file(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pipe, _ = make_lazy("wan", train=True)
    specimen = PIPELINES["wan"]
    export_pipeline(pipe, tmp_path / "out", "openvino", telemetry=True)
    lazycompress.reset(pipe)
    expected = sample(pipe, specimen.call)
    skipped = lazycompress.summary(pipe).skip_ratio
    loaded = load_exported(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    assert np.abs(sample(loaded, specimen.call) - expected).max() < 1 / 255
    assert exported_summary(loaded).skip_ratio == pytest.approx(skipped, abs=0.02)


class NoDenoiser(DiffusionPipeline):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae)

    def __call__(self) -> None:
        return None


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    pipe = make_dit()
    plan = {"train": {"enabled": False}}
    for act, expected in (
        (lambda: lazycompress.apply(object(), plan), "diffusers pipeline, there was object"),
        (lambda: lazycompress.apply(NoDenoiser(pipe.vae), plan), "none of vae takes a timestep"),
        (lambda: lazycompress.apply(pipe, plan), "refuses the call.*class_labels"),
        (lambda: lazycompress.apply(pipe, plan, call_kwargs={"prompt": "cat"}), "takes no 'prompt'"),
        (lambda: lazycompress.summary(pipe), "is not lazy"),
        (lambda: lazycompress.enable(pipe), "is not lazy"),
        (lambda: load_lazy(pipe, tmp_path), "holds no gates"),
        (lambda: export_pipeline(pipe, tmp_path / "x"), "is not lazy"),
        (lambda: load_exported(tmp_path), "no export of lazycompress"),
    ):
        with pytest.raises(LazyCompressError, match=expected) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert type(pipe.transformer).__name__ == "DiTTransformer2DModel"
    assert not hasattr(pipe.vae, "__wrapped__")
    assert "decode" not in vars(pipe.vae)


def test_a_run_is_an_image_whatever_was_before_it() -> None:
    """The second one begins below the last timestep of the first: by timesteps alone it would go on with it."""
    pipe, _ = make_lazy("sd3")
    set_policy(pipe, "reuse")
    call = PIPELINES["sd3"].call

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return values

    other = quiet(StableDiffusion3Img2ImgPipeline(**pipe.components))
    picture = {"image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), "strength": 0.5}
    fresh = sample(other, {**call, **picture})
    lazycompress.reset(pipe)
    sample(pipe, call, callback_on_step_end=stop)
    assert np.array_equal(sample(other, {**call, **picture}), fresh)


def test_guidance_that_sets_processors_leaves_them_as_they_were() -> None:
    parts = make_pixart().components
    names = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
    pipe = quiet(PixArtSigmaPAGPipeline(**{name: parts[name] for name in names}, pag_applied_layers=["blocks.0"]))
    call = PIPELINES["pixart"].call
    before = pipe.transformer.attn_processors
    images = {scale: sample(pipe, call, pag_scale=scale) for scale in (0.0, 3.0)}
    plan = {"units": "branches", "train": {"enabled": False}}
    lazycompress.apply(pipe, plan, call_kwargs={**call, "num_inference_steps": STEPS, "pag_scale": 3.0}, progress=False)
    assert pipe.transformer.model.attn_processors == before
    set_policy(pipe, "compute")
    for scale in (3.0, 0.0, 3.0):
        assert np.array_equal(sample(pipe, call, pag_scale=scale), images[scale])


@pytest.mark.slow(seconds=12)
def test_learning_branches_leaves_processors_as_they_were() -> None:
    parts = make_pixart().components
    names = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
    pipe = quiet(PixArtSigmaPAGPipeline(**{name: parts[name] for name in names}, pag_applied_layers=["blocks.0"]))
    call = PIPELINES["pixart"].call
    before = pipe.transformer.attn_processors
    images = {scale: sample(pipe, call, pag_scale=scale) for scale in (0.0, 3.0)}
    plan = {"units": "branches", "target": 0.5, "train": {"effort": 0.1}}
    lazycompress.apply(pipe, plan, call_kwargs={**call, "num_inference_steps": STEPS, "pag_scale": 3.0}, progress=False)
    assert pipe.transformer.model.attn_processors == before
    set_policy(pipe, "compute")
    for scale in (3.0, 0.0, 3.0):
        assert np.array_equal(sample(pipe, call, pag_scale=scale), images[scale])


@pytest.mark.parametrize(
    "how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_a_capture_that_fails_leaves_offloaded_weights_where_they_were(how: dict[str, Any]) -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    place = torch.device("cpu")
    apply_group_offloading(pipe.transformer, onload_device=place, offload_device=place, **how)
    dense = sample(pipe, call)
    with pytest.raises(LazyCompressError, match="cannot capture"):
        lazycompress.apply(pipe, {"units": "branches"}, call_kwargs={**call, "num_inference_steps": 2}, progress=False)
    assert np.array_equal(sample(pipe, call), dense)


def test_gradients_that_are_switched_off_are_no_hindrance() -> None:
    pipe = make_dit()
    recipe = {"target": 0.6, "units": "branches", "train": {"effort": 0.1}}
    with torch.no_grad():
        lazycompress.apply(
            pipe, recipe, call_kwargs={**PIPELINES["dit"].call, "num_inference_steps": 4}, progress=False
        )
    assert pipe.transformer.training_report is not None


def test_a_failure_leaves_the_pipeline_as_it_was() -> None:
    pipe = make_dit()
    dense = pipe.transformer
    with pytest.raises(LazyCompressError):
        lazycompress.apply(
            pipe, {"guards": {"exclude": ["nothing"]}}, call_kwargs={"class_labels": [1], "num_inference_steps": 3},
            progress=False,
        )  # fmt: skip
    assert pipe.transformer is dense
    assert pipe.config["transformer"] == ("diffusers", "DiTTransformer2DModel")
