"""What users add to a denoiser that is lazy, or will be: hooks, a control net, guidance, adapters, other weights, a cache."""

from __future__ import annotations

from typing import Any

import diffusers
import peft
import pytest
import torch

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.integrations.diffusers import set_policy

from ..pipelines import PIPELINES, lively, make_flux, make_pixart, make_sd3, quiet
from .samples import STEPS, learn, sample


def test_hooks_of_the_module_see_every_call() -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    learn(pipe, call)
    before, after = [], []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: before.append(m), with_kwargs=True)
    pipe.transformer.register_forward_hook(lambda m, a, output: after.append(output[0].shape))
    learned = sample(pipe, call)
    assert len(before) == len(after) == STEPS
    assert all(module is pipe.transformer for module in before)
    pipe.transformer.register_forward_hook(lambda m, a, output: (output[0] * 0.5,))
    assert not torch.equal(sample(pipe, call), learned)


def test_a_control_net_that_came_later_steers_and_skips() -> None:
    base, call = make_sd3(), {"prompt": ["a cat", "red dog"], "height": 16, "width": 16, "max_sequence_length": 16}
    learn(base, call)
    control = lively(
        diffusers.SD3ControlNetModel(
            sample_size=16, patch_size=2, in_channels=8, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=8, pos_embed_max_size=16,
        )
    )  # fmt: skip
    parts = {k: v for k, v in base.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = quiet(diffusers.StableDiffusion3ControlNetPipeline(**parts, controlnet=control))
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    steered = {**call, "control_image": picture}
    lazycompress.disable(pipe)
    dense = sample(pipe, steered)
    lazycompress.enable(pipe)
    for relearn in (False, True):
        if relearn:
            learn(pipe, steered)
        lazycompress.reset(pipe)
        one = sample(pipe, steered)
        assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)
        assert not torch.equal(one, sample(pipe, {**call, "control_image": 1 - picture}))
        set_policy(pipe, "compute")
        assert torch.equal(sample(pipe, steered), dense)
        set_policy(pipe, "learned")


def test_guidance_with_layers_left_out_and_with_perturbed_attention() -> None:
    call = PIPELINES["sd3"].call
    layers = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.8}
    dense = sample(make_sd3(), call, **layers)
    for learned_with in ({}, layers):
        pipe = make_sd3()
        learn(pipe, {**call, **learned_with})
        one = sample(pipe, call, **layers)
        assert lazycompress.summary(pipe).skip_ratio > 0.35
        assert torch.equal(sample(pipe, call, **layers), one)
        set_policy(pipe, "compute")
        assert torch.equal(sample(pipe, call, **layers), dense)

    with pytest.raises(
        LazyCompressError, match=r"batches of \[2, 4\] in one run.*learn without the calls of another size"
    ):
        lazycompress.apply(pipe, {}, call_kwargs={**call, **layers, "num_inference_steps": STEPS}, progress=False)
    assert torch.equal(sample(pipe, call, **layers), dense)

    call = PIPELINES["pixart"].call

    def perturbed(parts: dict[str, Any]) -> Any:
        names = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
        kept = {name: parts[name] for name in names}
        return quiet(diffusers.PixArtSigmaPAGPipeline(**kept, pag_applied_layers=["blocks.0"]))

    dense = sample(perturbed(make_pixart().components), call, pag_scale=3.0)
    pipe = make_pixart()
    learn(pipe, call)
    lazycompress.disable(pipe)
    plain = sample(pipe, call)
    lazycompress.enable(pipe)
    other = perturbed(pipe.components)
    one = sample(other, call, pag_scale=3.0)
    assert lazycompress.summary(other).skip_ratio == pytest.approx(0.5)
    assert torch.equal(sample(other, call, pag_scale=3.0), one)
    set_policy(pipe, "compute")
    assert torch.equal(sample(other, call, pag_scale=3.0), dense)
    assert torch.equal(sample(pipe, call), plain)


def test_an_adapter_that_came_later_acts() -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    dense = sample(pipe, call)
    learn(pipe, call)
    learned = sample(pipe, call)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    pipe.transformer.add_adapter(config, adapter_name="a")
    assert not torch.equal(sample(pipe, call), learned)
    set_policy(pipe, "compute")
    adapted = sample(pipe, call)
    lazycompress.disable(pipe)
    assert torch.equal(sample(pipe, call), adapted)
    lazycompress.enable(pipe)
    pipe.transformer.disable_adapters()
    assert torch.equal(sample(pipe, call), dense)
    pipe.transformer.enable_adapters()
    assert torch.equal(sample(pipe, call), adapted)
    pipe.transformer.delete_adapters("a")
    assert torch.equal(sample(pipe, call), dense)


def test_weights_stored_in_eight_bits_before_and_after() -> None:
    call = PIPELINES["sd3"].call

    def cast(pipe: Any) -> None:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    reference = make_sd3()
    cast(reference)
    dense = sample(reference, call)
    for first in (True, False):
        pipe = make_sd3()
        if first:
            cast(pipe)
        learn(pipe, call)
        if not first:
            cast(pipe)
        sample(pipe, call)
        assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)
        set_policy(pipe, "compute")
        assert torch.equal(sample(pipe, call), dense)


def test_a_cache_of_diffusers_and_this_one_do_not_mix(caplog: pytest.LogCaptureFixture) -> None:
    call = {"prompt": ["a cat", "red dog"], "height": 16, "width": 16, "max_sequence_length": 16}
    config = diffusers.FirstBlockCacheConfig(threshold=0.3)
    pipe = make_flux()
    dense = sample(pipe, call)
    pipe = make_flux()
    pipe.transformer.enable_cache(config)
    with pytest.raises(LazyCompressError, match=r"pipe\.transformer\.disable_cache\(\) first"):
        learn(pipe, call)
    cached = sample(pipe, call)
    pipe.transformer.disable_cache()
    assert torch.equal(sample(pipe, call), dense)
    pipe = make_flux()
    learn(pipe, call)
    learned = sample(pipe, call)
    assert not torch.equal(learned, cached)
    pipe.transformer.enable_cache(config)
    # As ever with diffusers, a cache that is enabled after a run has no context; that is its own error, and not ours.
    with pytest.raises(ValueError, match="No context is set"):
        sample(pipe, call)
    assert len(caplog.records) == 1
    pipe.transformer.disable_cache()
    assert torch.equal(sample(pipe, call), learned)
