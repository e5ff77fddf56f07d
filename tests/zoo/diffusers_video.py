"""Video transformers of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import transformers as zoo
from torch import nn

from .specimen import Site, Specimen, built, constant, countdown, falling, moving, per_block, prefix_mask


def rotary(tokens: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``(tokens, 2 * pairs)`` as pipelines with precomputed rotary embeddings give them."""
    angles = torch.outer(torch.arange(tokens).float(), 10.0 ** -torch.arange(pairs)).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def cogvideox_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 2, 4, 4, 4),
        "encoder_hidden_states": constant(batch, 6, 24),
        "timestep": countdown(batch, step),
        "image_rotary_emb": rotary(2 * 2 * 2, 8),
    }


def cogvideox_sites(_model: nn.Module) -> list[Site]:
    return [
        Site("attention", ("transformer_blocks.0.attn1",)),
        Site("attention", ("transformer_blocks.1.attn1",), pick=(0,)),
        *per_block("transformer_blocks", 2, mlp="ff"),
    ]


def wan_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 2, 4, 4),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 6, 24),
    }


def ltx_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 2 * 4 * 4, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "timestep": falling(batch, step, 1000),
        "encoder_attention_mask": prefix_mask(batch, 6),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def hunyuanvideo_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 2, 4, 4),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_attention_mask": prefix_mask(batch, 6),
        "pooled_projections": constant(batch, 16, seed=4),
        "guidance": torch.full((batch,), 6000.0),
    }


def hunyuanvideo_i2v_inputs(batch: int, step: int) -> dict[str, Any]:
    inputs = hunyuanvideo_inputs(batch, step)
    del inputs["guidance"]
    return inputs


def hunyuanvideo_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("context_embedder.token_refiner.refiner_blocks", 2, attention="attn", mlp="ff"),
        *per_block("transformer_blocks", 2, attention="attn", mlp=("ff", "ff_context")),
        *per_block("single_transformer_blocks", 2, parallel="proj_out"),
    ]


def wan_i2v_inputs(batch: int, step: int) -> dict[str, Any]:
    # The last 512 tokens are text to the model, whatever there is.
    prompt = {
        "encoder_hidden_states": constant(batch, 512, 24),
        "encoder_hidden_states_image": constant(batch, 5, 20, seed=4),
    }
    return {**wan_inputs(batch, step), **prompt}


def wan_ti2v_inputs(batch: int, step: int) -> dict[str, Any]:
    noisy = torch.tensor([0.0, 1.0]).repeat_interleave(2 * 2)
    return {**wan_inputs(batch, step), "timestep": falling(batch, step, 1000)[:, None] * noisy}


def vace_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        **wan_inputs(batch, step),
        "control_hidden_states": constant(batch, 6, 2, 4, 4, seed=4),
        "control_hidden_states_scale": torch.ones(2),
    }


def anyflow_inputs(batch: int, step: int) -> dict[str, Any]:
    timestep = falling(batch, step, 1000)[:, None].repeat(1, 2)
    return {
        "hidden_states": moving(batch, step, 2, 4, 4, 4),
        "timestep": timestep,
        "r_timestep": timestep - 50,
        "encoder_hidden_states": constant(batch, 6, 24),
    }


def helios_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 2, 8, 8),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 6, 24),
        "indices_hidden_states": torch.arange(8, 10).repeat(batch, 1),
        "indices_latents_history_short": torch.arange(6, 8).repeat(batch, 1),
        "indices_latents_history_mid": torch.arange(4, 6).repeat(batch, 1),
        "indices_latents_history_long": torch.arange(4).repeat(batch, 1),
        "latents_history_short": constant(batch, 4, 2, 8, 8, seed=4),
        "latents_history_mid": constant(batch, 4, 2, 8, 8, seed=5),
        "latents_history_long": constant(batch, 4, 4, 8, 8, seed=6),
    }


def cosmos_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 2, 4, 4),
        "timestep": falling(batch, step),
        "encoder_hidden_states": constant(batch, 6, 24),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 32, 32),
    }


def cosmos2_inputs(batch: int, step: int) -> dict[str, Any]:
    given = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1)
    timestep = falling(batch, step).view(batch, 1, 1, 1, 1)
    return {
        "hidden_states": moving(batch, step, 4, 2, 4, 4),
        "timestep": given * 0.001 + (1 - given) * timestep,
        "encoder_hidden_states": constant(batch, 6, 24),
        "fps": 16,
        "condition_mask": given.expand(batch, 1, 2, 4, 4).clone(),
        "padding_mask": torch.zeros(1, 1, 32, 32),
    }


def sana_video_inputs(batch: int, step: int) -> dict[str, Any]:
    return {**wan_inputs(batch, step), "encoder_attention_mask": prefix_mask(batch, 6)}


HUNYUANVIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 24,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}

COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 18,
    "num_layers": 2,
    "text_embed_dim": 24,
    "adaln_lora_dim": 8,
    "max_size": (4, 8, 8),
}

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}


def wan_sites(_model: nn.Module) -> list[Site]:
    return per_block("blocks", 2, attention=("attn1", "attn2"), mlp="ffn")


SPECIMENS: list[Specimen] = [
    Specimen(
        name="cogvideox",
        family="video",
        build=built(
            zoo.CogVideoXTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=24,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
            max_text_seq_length=6,
            use_rotary_positional_embeddings=True,
        ),
        inputs=cogvideox_inputs,
        attention=2,
        mlp=2,
        sites=cogvideox_sites,
        note="One MLP runs on text and video tokens together and is one branch with two streams; so is the attention. "
        "The last block's text half is never read.",
    ),
    Specimen(
        name="wan",
        family="video",
        build=built(zoo.WanTransformer3DModel, **WAN, rope_max_seq_len=32),
        inputs=wan_inputs,
        attention=4,
        mlp=2,
        sites=wan_sites,
    ),
    Specimen(
        name="wan_i2v",
        family="video",
        build=built(zoo.WanTransformer3DModel, **WAN, rope_max_seq_len=32, image_dim=20, added_kv_proj_dim=32),
        inputs=wan_i2v_inputs,
        attention=4,
        mlp=2,
        sites=wan_sites,
        note="Cross-attention to text and to image tokens is summed before one output projection: one branch.",
    ),
    Specimen(
        name="wan_ti2v",
        family="video",
        build=built(zoo.WanTransformer3DModel, **WAN, rope_max_seq_len=32),
        inputs=wan_ti2v_inputs,
        attention=4,
        mlp=2,
        sites=wan_sites,
        note="Timesteps are (batch, tokens), zero on the tokens of the given first frame: gates differ by token.",
    ),
    Specimen(
        name="ltx",
        family="video",
        build=built(
            zoo.LTXVideoTransformer3DModel,
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=24,
        ),
        inputs=ltx_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
    ),
    Specimen(
        name="hunyuanvideo",
        family="video",
        build=built(zoo.HunyuanVideoTransformer3DModel, **HUNYUANVIDEO),
        inputs=hunyuanvideo_inputs,
        attention=4,
        mlp=6,
        parallel=2,
        sites=hunyuanvideo_sites,
        note="Two attention and two MLP branches are the text refiner's: they depend on text and timestep only.",
    ),
    Specimen(
        name="hunyuanvideo_i2v",
        family="video",
        build=built(
            zoo.HunyuanVideoTransformer3DModel,
            **HUNYUANVIDEO,
            guidance_embeds=False,
            image_condition_type="token_replace",
        ),
        inputs=hunyuanvideo_i2v_inputs,
        attention=4,
        mlp=6,
        parallel=2,
        sites=hunyuanvideo_sites,
        note="Tokens of the given first frame have gates of their own (timestep 0): the stream is split, each part "
        "joins its part of the branch's output, and they are concatenated again. Still one branch.",
    ),
    Specimen(
        name="skyreels_v2",
        family="video",
        build=built(zoo.SkyReelsV2Transformer3DModel, **WAN, rope_max_seq_len=32),
        inputs=wan_inputs,
        attention=4,
        mlp=2,
        sites=wan_sites,
    ),
    Specimen(
        name="chronoedit",
        family="video",
        build=built(zoo.ChronoEditTransformer3DModel, **WAN, rope_max_seq_len=32),
        inputs=wan_inputs,
        attention=4,
        mlp=2,
        sites=wan_sites,
    ),
    Specimen(
        name="wan_vace",
        family="video",
        build=built(zoo.WanVACETransformer3DModel, **WAN, rope_max_seq_len=32, vace_layers=[0, 1], vace_in_channels=6),
        inputs=vace_inputs,
        attention=8,
        mlp=4,
        sites=lambda model: [
            *wan_sites(model),
            *per_block("vace_blocks", 2, attention=("attn1", "attn2"), mlp="ffn"),
        ],
        note="Half of the branches are those of the control blocks, a second stream that starts from the latents too. "
        "Its projections into the main stream are no residual branches of that stream.",
    ),
    Specimen(
        name="anyflow",
        family="video",
        build=built(zoo.AnyFlowTransformer3DModel, **WAN, rope_max_seq_len=32),
        inputs=anyflow_inputs,
        attention=4,
        mlp=2,
        sites=wan_sites,
        note="A timestep to start from and one to go to, each for every frame.",
    ),
    Specimen(
        name="helios",
        family="video",
        build=built(zoo.HeliosTransformer3DModel, **WAN, rope_dim=(4, 6, 6)),
        inputs=helios_inputs,
        attention=4,
        mlp=2,
        sites=wan_sites,
        note="Cross-attention joins only the new frames' part of the stream: split, add, concatenate again.",
    ),
    Specimen(
        name="cosmos",
        family="video",
        build=built(zoo.CosmosTransformer3DModel, **COSMOS),
        inputs=cosmos_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
        note="Every block adds a learned position embedding to the stream before its first branch.",
        export="static",
    ),
    Specimen(
        name="cosmos2",
        family="video",
        build=built(zoo.CosmosTransformer3DModel, **{**COSMOS, "in_channels": 5}, extra_pos_embed_type=None),
        inputs=cosmos2_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
        note="Timesteps are (batch, 1, frames, 1, 1), a lower one on the given first frame: gates differ by token.",
    ),
    Specimen(
        name="sana_video",
        family="video",
        build=built(
            zoo.SanaVideoTransformer3DModel,
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=4,
        ),
        inputs=sana_video_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
        note="The MLP ends in a residual convolution over time of its own, inside the branch: not counted.",
    ),
]
