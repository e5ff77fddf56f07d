"""Pipelines whose denoisers run as lazy graphs, held the ways that people hold pipelines."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.integrations.diffusers import LazyDenoiser, set_policy
from tests.conftest import make_lively_gates
from tests.lazy.samples import STEPS, sample
from tests.pipelines import PIPELINES, lively, make_sd3, quiet

CALL = PIPELINES["sd3"].call


def make_graph(pipe: Any) -> LazyDenoiser:
    """The pipeline's transformer as a lazy graph whose gates decide by sample and step; nothing is learned."""
    recipe = {"units": "branches", "train": {"enabled": False}}
    lazycompress.apply(pipe, recipe, call_kwargs={**CALL, "num_inference_steps": STEPS}, progress=False)
    lazy = pipe.transformer
    assert isinstance(lazy, LazyDenoiser)
    lazy.set_gates(make_lively_gates(lazy.branches))
    return lazy


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = make_sd3()
    make_graph(made)
    return made


def of_its_parts(pipe: Any) -> Any:
    """Another pipeline of the same parts, but for a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return quiet(type(pipe)(**{**pipe.components, "scheduler": scheduler}))


def test_a_pipeline_of_its_parts_runs_and_is_saved_under_the_dense_class(pipe: Any, tmp_path: Path) -> None:
    one = sample(pipe, CALL)
    second = of_its_parts(pipe)
    assert torch.equal(sample(second, CALL), one)
    second.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == [
        "diffusers",
        "SD3Transformer2DModel",
    ]
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(again.transformer) is diffusers.SD3Transformer2DModel
    lazycompress.load(again, tmp_path)
    torch.testing.assert_close(sample(again, CALL), one, rtol=1e-3, atol=1e-3)


def test_threads_with_pipelines_of_one_graph_and_one_prompt(pipe: Any) -> None:
    found: dict[int, Tensor] = {}
    encoded = pipe.encode_prompt(CALL["prompt"], None, None, max_sequence_length=CALL["max_sequence_length"])
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, encoded, strict=True))
    call = {key: value for key, value in CALL.items() if not key.startswith("prompt")} | embeds

    def work(seed: int, own: Any, gate: threading.Barrier) -> None:
        def wait(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            gate.wait(20)
            return tensors

        noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        found[seed] = own(
            **call, latents=noise, num_inference_steps=STEPS, output_type="latent", callback_on_step_end=wait
        )[0]

    lazycompress.reset(pipe)
    for seed in range(2):
        work(seed, pipe, threading.Barrier(1))
    alone, reused = dict(found), lazycompress.summary(pipe).skip_ratio
    assert reused > 0.1
    lazycompress.reset(pipe)
    found.clear()
    gate = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(seed, of_its_parts(pipe), gate)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], alone[seed]) for seed in range(2))
    assert lazycompress.summary(pipe).skip_ratio == pytest.approx(reused)


def test_what_is_set_on_the_graph_is_set_on_the_model() -> None:
    """Casting of layers leaves out what the model's own class says."""
    casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    dense = make_sd3()
    dense.transformer.enable_layerwise_casting(**casting)
    expected = sample(dense, CALL)
    pipe = make_sd3()
    make_graph(pipe)
    pipe.transformer.enable_layerwise_casting(**casting)
    assert torch.equal(sample(pipe, CALL), expected)
    assert lazycompress.summary(pipe)["transformer"].dense == lazycompress.summary(pipe)["transformer"].calls > 0


def test_a_compiled_model_is_made_lazy_saved_and_given_back(tmp_path: Path) -> None:
    torch._dynamo.reset()
    pipe = make_sd3()
    dense = sample(pipe, CALL)
    pipe.transformer = compiled = torch.compile(pipe.transformer, backend="eager")
    lazy = make_graph(pipe)
    one = sample(pipe, CALL)
    assert lazycompress.summary(pipe).skip_ratio > 0.1
    lazycompress.save(pipe, tmp_path / "gates")
    other = make_sd3()
    lazycompress.load(other, tmp_path / "gates")
    assert torch.equal(sample(other, CALL), one)
    set_policy(pipe, "compute")
    assert torch.equal(sample(pipe, CALL), dense)
    lazycompress.disable(pipe)
    assert pipe.transformer is compiled
    lazycompress.enable(pipe)
    assert pipe.transformer is lazy


def test_quantized_weights_are_followed_and_exporting_them_is_one_line(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    dense = make_sd3()
    quantize_(dense.transformer, Int8WeightOnlyConfig())
    expected = sample(dense, CALL)
    pipe = make_sd3()
    make_graph(pipe)
    quantize_(pipe.transformer.model, Int8WeightOnlyConfig())
    set_policy(pipe, "compute")
    assert torch.equal(sample(pipe, CALL), expected)
    with pytest.raises(
        LazyCompressError, match=r"is a Int8Tensor, which no file has: export the model as it was before"
    ):
        lazycompress.export(pipe.transformer, tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow(seconds=15)
def test_a_control_net_steers_and_branches_skip() -> None:
    """What it adds moves from step to step, and begins no image."""
    base = make_sd3()
    control = lively(
        diffusers.SD3ControlNetModel(
            sample_size=16, patch_size=2, in_channels=8, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=8, pos_embed_max_size=16,
        )
    )  # fmt: skip
    parts = {k: v for k, v in base.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = quiet(diffusers.StableDiffusion3ControlNetPipeline(**parts, controlnet=control))
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    call = {**CALL, "control_image": picture}
    dense = sample(pipe, call)
    recipe = {"units": "branches", "target": 0.5, "train": {"effort": 0.1}}
    lazycompress.apply(pipe, recipe, call_kwargs={**call, "num_inference_steps": STEPS}, progress=False)
    lazy = pipe.transformer
    assert isinstance(lazy, LazyDenoiser)
    assert "block_controlnet_hidden_states" in lazy.moving
    one = sample(pipe, call)
    assert lazycompress.summary(pipe)["transformer"].skip_ratio > 0.3
    assert not torch.equal(sample(pipe, {**call, "control_image": 1 - picture}), one)
    set_policy(pipe, "compute")
    assert torch.equal(sample(pipe, call), dense)
