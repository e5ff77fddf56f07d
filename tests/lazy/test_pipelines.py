"""Pipelines whose own denoisers run lazily: nothing is captured, nothing is replaced, and everything else still acts."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.integrations.diffusers import lazy_denoisers, load_lazy, set_policy
from lazycompress.lazy.attach import Handle

from ..pipelines import PIPELINES, lively, make_dit, make_flux, make_pixart, make_sd3, make_wan, quiet
from .samples import STEPS, learn, sample


@contextmanager
def nothing_captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("captured")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", refuse)
        yield


@pytest.mark.parametrize("name", PIPELINES)
def test_the_module_stays_and_skips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    specimen = PIPELINES[name]
    pipe = specimen.make()
    module, kind, forward = pipe.transformer, type(pipe.transformer), pipe.transformer.forward
    dense = sample(pipe, specimen.call)
    with nothing_captured(monkeypatch):
        handle = learn(pipe, specimen.call)
    assert pipe.transformer is module
    assert type(module) is kind
    assert module.forward == forward
    learned = sample(pipe, specimen.call)
    assert not torch.equal(learned, dense)
    assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)
    assert handle.summary().calls == STEPS * specimen.calls_per_step
    other = sample(pipe, specimen.other)
    assert torch.equal(sample(pipe, specimen.call), learned)
    lazycompress.reset(pipe)
    assert torch.equal(sample(pipe, specimen.other), other)
    for steps in (5, 20):
        lazycompress.reset(pipe)
        sample(pipe, specimen.call, steps)
        assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5, abs=0.1)
    set_policy(pipe, "compute")
    assert torch.equal(sample(pipe, specimen.call), dense)
    set_policy(pipe, "reuse")
    lazycompress.reset(pipe)
    sample(pipe, specimen.call)
    assert lazycompress.summary(pipe).skip_ratio == pytest.approx(1 - 1 / STEPS)
    lazycompress.disable(pipe)
    assert torch.equal(sample(pipe, specimen.call), dense)
    assert handle.summary().calls == STEPS * specimen.calls_per_step


def test_pipelines_that_share_a_denoiser_agree() -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    second_call = {"prompt": call["prompt"], "image": picture, "strength": 0.75, "max_sequence_length": 16}
    dense = sample(quiet(diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe)), second_call)
    learn(pipe, call)
    learned = sample(pipe, call)
    from_pipe = quiet(diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe))
    by_parts = quiet(diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components))
    for second in (from_pipe, by_parts):
        lazycompress.reset(second)
        changed = sample(second, second_call)
        assert not torch.equal(changed, dense)
        assert lazycompress.summary(second).skip_ratio == pytest.approx(0.5, abs=0.1)
        assert lazycompress.summary(pipe).skip_ratio == lazycompress.summary(second).skip_ratio
        lazycompress.disable(second)
        assert torch.equal(sample(second, second_call), dense)
        lazycompress.enable(pipe)
        assert torch.equal(sample(second, second_call), changed)
        assert torch.equal(sample(pipe, call), learned)
    learn(from_pipe, second_call)
    assert torch.equal(sample(from_pipe, second_call), changed) or lazycompress.summary(pipe).skip_ratio > 0


def test_a_saved_pipeline_is_dense_for_diffusers_and_lazy_for_us(tmp_path: Path) -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    dense = sample(pipe, call)
    recipe = {"target": 0.5, "train": {"effort": 0.1}}
    lazycompress.apply(pipe, recipe, call_kwargs={**call, "num_inference_steps": STEPS}, progress=False)
    learned = sample(pipe, call)
    assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(again.transformer) is type(pipe.transformer)
    assert torch.equal(sample(again, call), dense)
    load_lazy(again, tmp_path)
    assert torch.equal(sample(again, call), learned)
    lazycompress.set_target(again, 0.25)
    lazycompress.reset(again)
    sample(again, call)
    assert lazycompress.summary(again).skip_ratio == pytest.approx(0.75)
    plan = tmp_path / "transformer" / "lazy" / "plan.json"
    for text in ("", "[]", plan.read_text()[:-30], plan.read_text().replace('"order": ', '"order": 7')):
        plan.write_text(text)
        with pytest.raises(LazyCompressError, match=r"plan\.json(: | is not JSON)") as caught:
            load_lazy(again, tmp_path)
        assert "\n" not in str(caught.value)


def test_runs_too_short_for_the_target_compute_what_they_have_to() -> None:
    """Guidance in two calls: the first of each computes, and of one step that is all."""
    pipe, call = make_flux(), PIPELINES["flux"].call
    short = make_flux()
    recipe = {"target": 0.5, "train": {"effort": 0.1}, "guards": {"warmup_steps": 2, "last_steps": 2}}
    lazycompress.apply(pipe, recipe, call_kwargs={**call, "num_inference_steps": STEPS}, progress=False)
    for steps, skipped in ((1, 0.0), (2, 0.0), (3, 1 / 3), (12, 0.5)):
        lazycompress.reset(pipe)
        learned = sample(pipe, call, steps)
        assert lazycompress.summary(pipe).skip_ratio == pytest.approx(skipped)
        assert torch.equal(learned, sample(short, call, steps)) == (not skipped)
    with pytest.raises(
        LazyCompressError, match=r"set_target: 4 of 4 calls compute always, which is 100%: 0.5 cannot be met"
    ):
        lazycompress.set_target(pipe, 0.5, timesteps=[1.0, 0.5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_is_no_hindrance(dtype: torch.dtype) -> None:
    """Programs set one to load in half precision."""
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    if dtype is torch.bfloat16:
        pipe.to(dtype)
    torch.set_default_dtype(dtype)
    try:
        dense = sample(pipe, call)
        recipe = {"target": 0.5, "train": {"effort": 0.1}}
        lazycompress.apply(pipe, recipe, call_kwargs={**call, "num_inference_steps": STEPS}, progress=False)
        learned = sample(pipe, call)
        assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)
        assert bool(torch.isfinite(learned).all())
        set_policy(pipe, "compute")
        assert torch.equal(sample(pipe, call), dense)
    finally:
        torch.set_default_dtype(torch.float32)


def test_copies_have_images_of_their_own() -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    learn(pipe, call)
    learned = sample(pipe, call)
    stream = io.BytesIO()
    torch.save(pipe.transformer, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer)), torch.load(stream, weights_only=False),
        copy.deepcopy(pipe).transformer,
    ]  # fmt: skip
    for other in copies:
        second = make_sd3()
        second.register_modules(transformer=other)
        assert torch.equal(sample(second, call), learned)
        handle = lazy_denoisers(second)["transformer"]
        assert isinstance(handle, Handle)
        assert handle.module is other
        assert handle.summary().calls == STEPS
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        set_policy(second, "compute")
        assert not torch.equal(sample(second, call), learned)
    assert lazycompress.summary(pipe)["transformer"].calls == STEPS
    assert torch.equal(sample(pipe, call), learned)


def test_two_denoisers_take_over_at_their_boundary() -> None:
    pipe, call = make_wan(), PIPELINES["wan"].call
    torch.manual_seed(1)
    pipe.register_modules(transformer_2=lively(make_wan().transformer))
    pipe.register_to_config(boundary_ratio=0.9)
    dense = sample(pipe, call)
    learn(pipe, call)
    assert list(lazy_denoisers(pipe)) == ["transformer", "transformer_2"]
    one = sample(pipe, call)
    for name in ("transformer", "transformer_2"):
        summary = lazycompress.summary(pipe)[name]
        assert summary.calls in range(4, 2 * STEPS)
        assert summary.skip_ratio > 0.2
    assert torch.equal(sample(pipe, call), one)
    set_policy(pipe, "compute")
    assert torch.equal(sample(pipe, call), dense)


@pytest.mark.parametrize(
    "scheduler",
    [
        "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "PNDMScheduler",
        "UniPCMultistepScheduler", "DEISMultistepScheduler", "KDPM2AncestralDiscreteScheduler",
    ],
)  # fmt: skip
def test_other_schedulers_skip_and_leave_nothing_behind(scheduler: str) -> None:
    pipe, call = make_pixart(), PIPELINES["pixart"].call
    learn(pipe, call)
    pipe.scheduler = getattr(diffusers, scheduler)()
    first = sample(pipe, call)
    summary = lazycompress.summary(pipe)["transformer"]
    assert summary.skip_ratio == pytest.approx(0.5, abs=0.1)
    assert summary.images == 4
    assert torch.equal(sample(pipe, call), first)


def test_images_that_are_interrupted_or_not_finite_leave_nothing_behind() -> None:
    pipe, call = make_flux(), PIPELINES["flux"].call
    learn(pipe, call)
    picture_to_picture = quiet(
        diffusers.FluxImg2ImgPipeline(**{k: v for k, v in pipe.components.items() if k != "image_encoder"})
    )
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    small = {k: v for k, v in call.items() if "negative" not in k and "true_cfg" not in k}

    def second() -> Tensor:
        return sample(picture_to_picture, {**small, "image": picture}, 20, strength=0.2)

    first, fresh = sample(pipe, call), second()

    def stop(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 3
        return values

    def overflow(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        bad = torch.tensor([1.0, float("inf") if step == 2 else 1.0])
        return {**values, "latents": values["latents"] * bad[:, None, None]}

    for callback in (stop, overflow):
        sample(pipe, call, callback_on_step_end=callback)
        assert torch.equal(second(), fresh)
        sample(pipe, call, callback_on_step_end=callback)
        assert torch.equal(sample(pipe, call), first)


def test_threads_with_a_denoiser_in_common() -> None:
    pipe, call = make_flux(), PIPELINES["flux"].call
    learn(pipe, call)
    embedded = {key: value for key, value in call.items() if "prompt" not in key}
    for name, prompt in (("", call["prompt"]), ("negative_", call["negative_prompt"])):
        tokens, pooled, _ = pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=16)
        embedded |= {f"{name}prompt_embeds": tokens.detach(), f"{name}pooled_prompt_embeds": pooled.detach()}
    pipes = [
        quiet(type(pipe)(**{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}))
        for _ in range(2)
    ]

    def run(k: int, **more: Any) -> Tensor:
        noise = torch.Generator().manual_seed(k)
        return pipes[k](**embedded, num_inference_steps=STEPS, output_type="latent", generator=noise, **more)[0]

    alone = [run(k) for k in range(2)]
    lazycompress.reset(pipe)
    found: dict[int, Tensor] = {}
    gate = threading.Barrier(2)

    def wait(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        gate.wait(30)
        return values

    def work(k: int) -> None:
        found[k] = run(k, callback_on_step_end=wait)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], alone[k]) for k in range(2))
    assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)


def test_half_precision_rounds_timesteps_and_changes_no_share() -> None:
    pipe, call = make_flux(), {"prompt": ["a cat", "red dog"], "height": 16, "width": 16, "max_sequence_length": 16}
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    learn(pipe, call)
    pipe.to(torch.bfloat16)
    found = sample(pipe, call, 100)
    assert found.isfinite().all()
    assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)
    assert lazycompress.summary(pipe)["transformer"].images == 2


def test_inference_mode_and_default_dtypes() -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    learn(pipe, call)
    learned = sample(pipe, call)
    with torch.inference_mode():
        assert torch.equal(sample(pipe, call), learned)
        learn(pipe, call)
    assert torch.equal(sample(pipe, call), learned)
    torch.set_default_dtype(torch.float64)
    try:
        found = sample(pipe, call)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.isfinite().all()
    assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)
    lazycompress.disable(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = sample(pipe, call)
        lazycompress.enable(pipe)
        set_policy(pipe, "compute")
        assert torch.equal(sample(pipe, call), dense)


def test_bad_input_leaves_the_pipeline_as_it_was() -> None:
    pipe, call = make_dit(), {**PIPELINES["dit"].call, "num_inference_steps": 3}
    module = pipe.transformer
    before = set(vars(module))
    with pytest.raises(LazyCompressError, match="refuses the call"):
        lazycompress.apply(pipe, {})
    with pytest.raises(LazyCompressError, match="units: calls goes without a graph, which prune needs"):
        lazycompress.apply(pipe, {"units": "calls", "prune": {}}, call_kwargs=call)
    assert set(vars(module)) == before
    learn(pipe, PIPELINES["dit"].call)
    learned = sample(pipe, PIPELINES["dit"].call)
    with pytest.raises(LazyCompressError, match="refuses the call"):
        lazycompress.apply(pipe, {})
    assert torch.equal(sample(pipe, PIPELINES["dit"].call), learned)
