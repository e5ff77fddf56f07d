"""The emoji pipeline's own parts, on tiny stand-ins: prompts, words as tokens, the loop that goes on, the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lazycompress
from lazycompress import ExportError
from lazycompress.integrations.emoji import prompts as words
from lazycompress.integrations.emoji.bundle import Prompts, load_bundled_judge, load_pipeline, prompts, save_pipeline
from lazycompress.integrations.emoji.evaluate import generate
from lazycompress.integrations.emoji.judge import Judge
from lazycompress.integrations.emoji.metrics import psnr, recall_at
from lazycompress.integrations.emoji.model import (
    AUTOENCODER_CONFIG,
    DENOISER_CONFIG,
    TextToVelocity,
    assemble,
    build_autoencoder,
    build_tokenizer,
    tokenize,
)
from lazycompress.integrations.emoji.stages import CheckpointError, Schedule, Stage, fit

VOCABULARY = ["red heart", "blue heart", "hear the bear", "earth", "heath 7", "woman mage medium dark skin"]
CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(VOCABULARY)
    parts = TextToVelocity(tokenizer, {**DENOISER_CONFIG, "num_layers": 2})
    with torch.no_grad():  # adaLN-Zero would hide the prompt
        for parameter in parts.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    autoencoder = build_autoencoder({**AUTOENCODER_CONFIG, "block_out_channels": (8, 8)})
    return assemble(autoencoder, tokenizer, parts)


class TestPrompts:
    def test_name_and_skin_tone_become_words(self) -> None:
        assert words.to_prompt("WOMAN: RED HAIR", ["1F3FE"]) == "woman red hair medium dark skin"

    def test_a_long_name_is_cut_and_the_tones_stay(self) -> None:
        prompt = words.to_prompt(" ".join("ABCDEFGHIJKL"), ["1F3FB", "1F3FC"])
        assert prompt == "a b c d e light skin medium light skin"

    def test_medium_dark_is_not_dark(self) -> None:
        tones = tuple(words.SKIN_TONES.values())
        assert words.split_attribute("mage medium dark skin", tones) == ("mage _", "medium dark skin")
        assert words.split_attribute("handshake dark skin light skin", tones) is None

    def test_every_held_out_word_and_thing_stays_in_training(self) -> None:
        all_prompts = [f"{colour} {thing}" for colour in words.COLOURS for thing in ("heart", "book", "ball", "hat")]
        held_out = words.choose_held_out(all_prompts)
        seen = [prompt for prompt in all_prompts if not words.is_held_out(prompt, held_out)]
        assert held_out
        assert len({prompt.split()[1] for prompt in held_out}) == len(held_out)
        assert {word for prompt in held_out for word in prompt.split()} <= {
            w for prompt in seen for w in prompt.split()
        }

    def test_a_held_out_thing_is_held_out_in_every_skin_tone_and_nothing_longer_is(self) -> None:
        held_out = ["man in wheelchair"]
        assert words.is_held_out("man in wheelchair medium dark skin", held_out)
        assert not words.is_held_out("man in wheelchair facing right dark skin", held_out)
        assert not words.is_held_out("woman in wheelchair", held_out)


class TestTokenizer:
    def test_every_word_is_one_token(self, pipeline: Any) -> None:
        for prompt in VOCABULARY:
            assert len(pipeline.tokenizer(prompt).input_ids) == len(prompt.split()) + 2

    def test_a_word_outside_is_spelled(self, pipeline: Any) -> None:
        assert len(pipeline.tokenizer("hearth").input_ids) > 3

    def test_the_pipelines_own_tokens_are_those_of_training(self, pipeline: Any) -> None:
        encoded = pipeline.tokenizer("red heart", padding="max_length", truncation=True).input_ids
        assert tokenize(pipeline.tokenizer, ["red heart"]).tolist() == [encoded]

    def test_openvino_tokens_are_the_same(self, pipeline: Any) -> None:
        openvino = pytest.importorskip("openvino")
        convert = pytest.importorskip("openvino_tokenizers").convert_tokenizer
        compiled = openvino.compile_model(convert(pipeline.tokenizer), "CPU")
        for prompt in (*VOCABULARY, "hearth"):
            assert compiled([prompt])["input_ids"][0].tolist() == pipeline.tokenizer(prompt).input_ids


class TestTraining:
    def stage(self, interrupted_at: int = -1) -> Stage:
        torch.manual_seed(0)
        drawn = 0

        def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
            nonlocal drawn
            drawn += 1
            if drawn == interrupted_at:
                raise KeyboardInterrupt
            value: torch.Tensor = model(torch.randn(4, 3, generator=generator)).square().mean()
            return value

        return Stage("toy", nn.Linear(3, 1), loss)

    def test_a_resumed_training_gives_the_weights_of_an_uninterrupted_one(self, tmp_path: Path) -> None:
        schedule = Schedule(6, 4, 1e-2, checkpoint_seconds=0.0)
        whole = fit(self.stage(), schedule, tmp_path / "whole", 0, torch.device("cpu"))
        with pytest.raises(KeyboardInterrupt):
            fit(self.stage(interrupted_at=4), schedule, tmp_path / "parts", 0, torch.device("cpu"))
        resumed = fit(self.stage(), schedule, tmp_path / "parts", 0, torch.device("cpu"))
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)

    def test_a_checkpoint_of_other_settings_is_refused(self, tmp_path: Path) -> None:
        fit(self.stage(), Schedule(2, 4, 1e-2), tmp_path, 0, torch.device("cpu"))
        with pytest.raises(CheckpointError, match="was made with"):
            fit(self.stage(), Schedule(2, 8, 1e-2), tmp_path, 0, torch.device("cpu"))


class TestPipeline:
    def test_prompt_and_guidance_change_the_picture(self, pipeline: Any) -> None:
        def draw(prompt: str, guidance: float) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            call = dict(CALL, guidance_scale=guidance, max_sequence_length=1, generator=generator)
            images: torch.Tensor = pipeline(prompt, **call).images
            return images

        assert draw("red heart", 4.0).shape == (1, 3, 32, 32)
        assert not torch.equal(draw("red heart", 4.0), draw("earth", 4.0))
        assert not torch.equal(draw("red heart", 4.0), draw("red heart", 1.0))

    def test_training_and_pipeline_give_the_denoiser_the_same_words(self, pipeline: Any) -> None:
        """With the few or many zero tokens of the silent third encoder."""
        parts = TextToVelocity(pipeline.tokenizer, pipeline.transformer.config)
        parts.transformer, parts.text_encoder = pipeline.transformer, pipeline.text_encoder
        parts.text_encoder_2 = pipeline.text_encoder_2
        latents, sigma = torch.randn(1, 4, 16, 16), torch.tensor([0.5])
        for blank in (1, 5):
            embeds, _, pooled, _ = pipeline.encode_prompt(
                "red heart", None, None, do_classifier_free_guidance=False, max_sequence_length=blank
            )
            expected = pipeline.transformer(latents, embeds, pooled, sigma * 1000).sample
            torch.testing.assert_close(
                parts(latents, sigma, tokenize(pipeline.tokenizer, ["red heart"]), blank), expected
            )

    def test_a_saved_bundle_loads_whole(self, pipeline: Any, tmp_path: Path) -> None:
        judge = Judge(len(pipeline.tokenizer), pipeline.tokenizer.pad_token_id)
        save_pipeline(pipeline, judge, Prompts(["red heart"], ["blue heart"]), tmp_path / "bundle")
        with pytest.raises(ExportError, match="is left alone"):
            save_pipeline(pipeline, judge, Prompts([], []), tmp_path / "bundle")
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
        loaded: Any = load_pipeline(tmp_path / "bundle")
        assert prompts(tmp_path / "bundle").held_out == ["blue heart"]
        assert load_bundled_judge(loaded.tokenizer, tmp_path / "bundle").words.weight.shape == judge.words.weight.shape
        call = dict(CALL, max_sequence_length=1)
        first, second = (
            pipe("red heart", **call, generator=torch.Generator().manual_seed(0)).images for pipe in (pipeline, loaded)
        )
        assert psnr(first, second).item() > 40  # stored in half precision


class TestBundled:
    def test_prompts_are_drawn_in_their_colours(self) -> None:
        pipe: Any = load_pipeline()
        call = dict(CALL, num_inference_steps=8, guidance_scale=4.0, max_sequence_length=1)
        images = pipe(["red heart", "yellow heart"], **call, generator=torch.Generator().manual_seed(0)).images
        red, green = images[:, 0].mean((1, 2)), images[:, 1].mean((1, 2))
        assert red[0] > green[0] + 0.2
        assert green[1] > green[0] + 0.2

    @pytest.mark.slow(seconds=120)
    def test_half_of_the_calls_are_closer_to_all_than_half_of_the_steps(self) -> None:
        pipe = load_pipeline()
        drawn = prompts().seen[::100]
        dense, fewer = (generate(pipe, drawn, steps=steps, seed=7) for steps in (28, 14))
        call = {"height": 32, "width": 32, "num_inference_steps": 28, "guidance_scale": 4.0, "max_sequence_length": 1}
        recipe = {"target": 0.5, "pipeline": {"prompts": prompts().seen[50::100], "batch": 16, "call": call}}
        lazycompress.apply(pipe, recipe, progress=False)
        lazy = generate(pipe, drawn, steps=28, seed=7)
        gained = psnr(lazy, dense).mean() - psnr(fewer, dense).mean()
        assert gained > 6  # 9 dB were seen


class TestMetrics:
    def test_recall_counts_the_pictures_that_find_their_prompt(self, pipeline: Any) -> None:
        class Oracle(Judge):
            def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
                return -(images[:, 0, :1, 0] - 2 * torch.arange(len(tokens)) + 1).abs()

        judge = Oracle(10, 2)
        images = torch.tensor([0.0, 1.0, 3.0]).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
        own = [VOCABULARY[0], VOCABULARY[1], VOCABULARY[2]]
        assert recall_at(1, judge, pipeline.tokenizer, images, own, VOCABULARY) == pytest.approx(2 / 3)
        assert recall_at(3, judge, pipeline.tokenizer, images, own, VOCABULARY) == 1.0

    def test_a_prompt_outside_the_candidates_is_refused(self, pipeline: Any) -> None:
        judge = Judge(len(pipeline.tokenizer), pipeline.tokenizer.pad_token_id)
        with pytest.raises(ValueError, match="not among the 6 candidates"):
            recall_at(5, judge, pipeline.tokenizer, torch.zeros(1, 3, 32, 32), ["moon"], VOCABULARY)
