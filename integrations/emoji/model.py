"""The pipeline's parts, all small: a tokenizer of the data's words, two text encoders, a denoiser, an autoencoder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from .prompts import MAX_WORDS

WEIGHTS_DIR = Path(__file__).parent / "weights"
MAX_TOKENS = MAX_WORDS + 2
TEXT_WIDTHS = (128, 64)
"""Widths of the two text encoders; a word token of the denoiser is both, side by side."""

_MAX_POSITIONS = 16  # optimum-intel traces a text encoder with 16 tokens, whatever its tokenizer gives
_START, _END = "<|startoftext|>", "<|endoftext|>"

AUTOENCODER_CONFIG: Mapping[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 48),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.0,  # both measured once it is trained
    "scaling_factor": 1.0,
}

DENOISER_CONFIG: Mapping[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": sum(TEXT_WIDTHS),
    "caption_projection_dim": 192,
    "pooled_projection_dim": sum(TEXT_WIDTHS),
    "pos_embed_max_size": 16,
}

SCHEDULER_CONFIG: Mapping[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}


def build_tokenizer(prompts: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer to which every word of ``prompts`` is one token; other words are spelled in pieces.

    Byte-pair merges are learned until nothing is left to merge, so that the merges, applied in their order, give whole
    words again: a word list with merges made by hand does not do that, since the first merge that fits goes first.
    """
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = sorted({word for prompt in prompts for word in prompt.split()})
    letters = [chr(code) for code in (*range(ord("a"), ord("z") + 1), *range(ord("0"), ord("9") + 1))]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=0, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    learned.train_from_iterator([*words, *letters], trainer)
    bpe = json.loads(learned.to_str())["model"]
    tokens = [_START, _END, "<pad>", *sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)]
    merges: Any = [tuple(merge) for merge in bpe["merges"]]  # annotated as strings, handed on as pairs
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token="<pad>",
        model_max_length=MAX_TOKENS,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> nn.Module:
    """A new CLIP text encoder of two layers; the denoiser sees the first one's output, and the projection."""
    config = cast(Any, CLIPTextConfig)(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 32,
        num_hidden_layers=2,
        max_position_embeddings=_MAX_POSITIONS,
        projection_dim=width,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cast(nn.Module, CLIPTextModelWithProjection(config))


def build_silent_encoder() -> tuple[nn.Module, T5Tokenizer]:
    """A T5 encoder that answers zeros, whatever it reads, and its tokenizer.

    diffusers and optimum-intel load no folder whose third encoder is absent, unless they are told; in a pipeline that
    lacks it, diffusers puts zeros in its place.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", 0.0)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)
    config = cast(Any, T5Config)(
        vocab_size=len(tokenizer), d_model=sum(TEXT_WIDTHS), d_kv=8, d_ff=8, num_heads=1, num_layers=1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    encoder: Any = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return cast(nn.Module, encoder), tokenizer


def build_denoiser(config: Mapping[str, Any] = DENOISER_CONFIG) -> nn.Module:
    """A new transformer whose blocks start as the identity: adaLN-Zero (Peebles & Xie 2022, section 3.2)."""
    transformer: Any = cast(Any, SD3Transformer2DModel)(**config)
    outputs = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        outputs += [block.norm1.linear, block.norm1_context.linear]
    for linear in outputs:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return cast(nn.Module, transformer)


def build_autoencoder(config: Mapping[str, Any] = AUTOENCODER_CONFIG) -> nn.Module:
    """A new autoencoder: images ``[N, 3, 32, 32]`` in ``-1..1`` to and from latents ``[N, 4, 16, 16]``."""
    return cast(nn.Module, cast(Any, AutoencoderKL)(**config))


class TextToVelocity(nn.Module):
    """What is trained as one: both text encoders and the denoiser."""

    def __init__(self, tokenizer: CLIPTokenizer, config: Mapping[str, Any] = DENOISER_CONFIG) -> None:
        super().__init__()
        self.transformer = build_denoiser(config)
        self.text_encoder = build_text_encoder(tokenizer, TEXT_WIDTHS[0])
        self.text_encoder_2 = build_text_encoder(tokenizer, TEXT_WIDTHS[1])

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, blank_tokens: int = 1
    ) -> torch.Tensor:
        """The velocity ``noise - latents`` that flow matching learns.

        Args:
            latents: ``[N, 4, 16, 16]``, noised.
            sigma: float32 ``[N]``, the share of noise, ``0..1``.
            tokens: int64 ``[N, 12]``, read by both text encoders.
            blank_tokens: how many zero tokens the silent third encoder adds, the pipeline's ``max_sequence_length``.

        Returns:
            ``[N, 4, 16, 16]``.
        """
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        words = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        words = torch.cat([words, words.new_zeros(len(words), blank_tokens, words.shape[-1])], dim=1)
        velocity: torch.Tensor = self.transformer(
            hidden_states=latents,
            timestep=sigma * SCHEDULER_CONFIG["num_train_timesteps"],
            encoder_hidden_states=words,
            pooled_projections=torch.cat([first.text_embeds, second.text_embeds], dim=-1),
            return_dict=False,
        )[0]
        return velocity


def tokenize(tokenizer: CLIPTokenizer, prompts: Iterable[str]) -> torch.Tensor:
    """int64 ``[N, 12]``, padded and cut as the pipeline does."""
    encoded = tokenizer(list(prompts), padding="max_length", max_length=MAX_TOKENS, truncation=True)
    return torch.tensor(encoded["input_ids"])


def assemble(autoencoder: nn.Module, tokenizer: CLIPTokenizer, parts: TextToVelocity) -> StableDiffusion3Pipeline:
    """A pipeline of these parts, in evaluation mode; its third text encoder is silent."""
    silent, silent_tokenizer = build_silent_encoder()
    pipeline: Any = cast(Any, StableDiffusion3Pipeline)(
        transformer=parts.transformer.eval(),
        scheduler=cast(Any, FlowMatchEulerDiscreteScheduler)(**SCHEDULER_CONFIG),
        vae=autoencoder.eval(),
        text_encoder=parts.text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=parts.text_encoder_2.eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=silent.eval(),
        tokenizer_3=silent_tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return cast(StableDiffusion3Pipeline, pipeline)
