"""Audio transformers of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import transformers as zoo
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from .specimen import Site, Specimen, built, constant, falling, level, moving, per_block, prefix_mask


def stable_audio_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 8, 12),
        "timestep": torch.tensor([level(step)]),
        "encoder_hidden_states": constant(batch, 6, 24),
        "global_hidden_states": constant(batch, 1, 16, seed=4),
        "rotary_embedding": get_1d_rotary_pos_embed(8, 13, use_real=True, repeat_interleave_real=False),
    }


def ace_step_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 16, 8),
        "timestep": falling(batch, step),
        "timestep_r": falling(batch, step),
        "encoder_hidden_states": constant(batch, 6, 24),
        "context_latents": constant(batch, 16, 16, seed=4),
    }


def longcat_audio_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 12, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_attention_mask": prefix_mask(batch, 6, dtype=torch.bool),
        "timestep": falling(batch, step),
        "attention_mask": torch.ones(batch, 12, dtype=torch.bool),
        "latent_cond": constant(batch, 12, 8, seed=4),
    }


def t5_film_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "encodings_and_masks": [
            (constant(batch, 6, 32), prefix_mask(batch, 6, dtype=torch.bool)),
            (constant(batch, 5, 32, seed=4), prefix_mask(batch, 5, dtype=torch.bool)),
        ],
        "decoder_input_tokens": moving(batch, step, 12, 8),
        "decoder_noise_time": falling(batch, step),
    }


def t5_film_sites(_model: nn.Module) -> list[Site]:
    return per_block("decoders", 2, attention=("layer.0.attention", "layer.1.attention"), mlp="layer.2.DenseReluDense")


SPECIMENS: list[Specimen] = [
    Specimen(
        name="stable_audio",
        family="audio",
        build=built(
            zoo.StableAudioDiTModel,
            sample_size=12,
            in_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=8,
            cross_attention_dim=24,
            time_proj_dim=16,
            global_states_input_dim=16,
            cross_attention_input_dim=24,
        ),
        inputs=stable_audio_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
        note="No modulation: the timestep is a token, and one timestep of shape (1,) serves the whole batch. Two 1x1 "
        "convolutions with residual, before and after the blocks, are neither attention nor MLP: not counted.",
    ),
    Specimen(
        name="ace_step",
        family="audio",
        build=built(
            zoo.AceStepTransformer1DModel,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            sliding_window=2,
            encoder_hidden_size=24,
        ),
        inputs=ace_step_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("layers", 2, attention=("self_attn", "cross_attn"), mlp="mlp"),
        note="Every other block's self-attention has a sliding window, given as a mask.",
    ),
    Specimen(
        name="longcat_audio",
        family="audio",
        build=built(
            zoo.LongCatAudioDiTTransformer,
            dit_dim=32,
            dit_depth=2,
            dit_heads=2,
            dit_text_dim=24,
            latent_dim=8,
        ),
        inputs=longcat_audio_inputs,
        attention=4,
        mlp=6,
        sites=lambda _: [
            *per_block("blocks", 2, attention=("self_attn", "cross_attn"), mlp="ffn"),
            *per_block("text_conv_layer", 4, mlp="pwconv2"),
        ],
        note="Four MLP branches are ConvNeXt blocks on the text and depend on the text only. A long skip adds the "
        "blocks' input to their output, around all other branches: not counted.",
    ),
    Specimen(
        name="t5_film",
        family="audio",
        build=built(
            zoo.T5FilmDecoder,
            input_dims=8,
            targets_length=12,
            d_model=32,
            num_layers=2,
            num_heads=2,
            d_kv=16,
            d_ff=64,
        ),
        inputs=t5_film_inputs,
        attention=4,
        mlp=2,
        sites=t5_film_sites,
        note="Modulated by FiLM, without gates.",
    ),
]
