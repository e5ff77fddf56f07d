"""Image transformers of diffusers: those that came first, or that many others descend from."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import transformers as zoo
from torch import nn

from .specimen import (
    Site,
    Specimen,
    built,
    constant,
    countdown,
    falling,
    labels,
    moving,
    per_block,
    prefix_mask,
)


def grid_ids(height: int, width: int, axes: int = 3) -> torch.Tensor:
    """Position ids ``(height * width, axes)`` as Flux-like pipelines give them: zeros, row, column."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.reshape(height * width, axes)


def dit_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "timestep": countdown(batch, step),
        "class_labels": labels(batch, 10),
    }


def text_to_image_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "timestep": countdown(batch, step),
        "encoder_attention_mask": prefix_mask(batch, 6),
    }


def sd3_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "pooled_projections": constant(batch, 16, seed=4),
        "timestep": falling(batch, step, 1000),
    }


def sd3_sites(_model: nn.Module) -> list[Site]:
    return [
        Site("attention", ("transformer_blocks.0.attn",)),
        Site("attention", ("transformer_blocks.1.attn",)),
        Site("attention", ("transformer_blocks.2.attn",), pick=(0,)),
        *per_block("transformer_blocks", 3, mlp="ff"),
        *per_block("transformer_blocks", 2, mlp="ff_context"),
    ]


def flux_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 16, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "pooled_projections": constant(batch, 16, seed=4),
        "timestep": falling(batch, step),
        "img_ids": grid_ids(4, 4),
        "txt_ids": torch.zeros(6, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def flux2_inputs(batch: int, step: int) -> dict[str, Any]:
    text_ids = torch.zeros(6, 4)
    text_ids[:, 3] = torch.arange(6)
    return {
        "hidden_states": moving(batch, step, 16, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "timestep": falling(batch, step),
        "img_ids": grid_ids(4, 4, axes=4),
        "txt_ids": text_ids,
        "guidance": torch.full((batch,), 4.0),
    }


def flux_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("transformer_blocks", 2, attention="attn", mlp=("ff", "ff_context")),
        *per_block("single_transformer_blocks", 2, parallel="proj_out"),
    ]


def flux2_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("transformer_blocks", 2, attention="attn", mlp=("ff", "ff_context")),
        *per_block("single_transformer_blocks", 2, parallel="attn"),
    ]


def qwenimage_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 16, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_hidden_states_mask": prefix_mask(batch, 6),
        "timestep": falling(batch, step),
        "img_shapes": [[(1, 4, 4)]],
    }


def qwenimage_sites(_model: nn.Module) -> list[Site]:
    return [
        Site("attention", ("transformer_blocks.0.attn",)),
        Site("attention", ("transformer_blocks.1.attn",), pick=(0,)),
        *per_block("transformer_blocks", 2, mlp="img_mlp"),
        *per_block("transformer_blocks", 1, mlp="txt_mlp"),
    ]


def auraflow_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "timestep": falling(batch, step),
    }


def auraflow_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("joint_transformer_blocks", 2, attention="attn", mlp=("ff", "ff_context")),
        *per_block("single_transformer_blocks", 2, attention="attn", mlp="ff"),
    ]


def hunyuandit_inputs(batch: int, step: int) -> dict[str, Any]:
    angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.3, 0.1, 0.03])).repeat_interleave(2, dim=1)
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 5, 16),
        "text_embedding_mask": prefix_mask(batch, 5),
        "encoder_hidden_states_t5": constant(batch, 6, 24, seed=4),
        "text_embedding_mask_t5": prefix_mask(batch, 6),
        "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]]).repeat(batch, 1),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}

SPECIMENS: list[Specimen] = [
    Specimen(
        name="dit",
        family="image",
        build=built(
            zoo.DiTTransformer2DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        inputs=dit_inputs,
        attention=3,
        mlp=3,
        sites=lambda _: per_block("transformer_blocks", 3, attention="attn1", mlp="ff"),
    ),
    Specimen(
        name="pixart",
        family="image",
        build=built(
            zoo.PixArtTransformer2DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
        ),
        inputs=text_to_image_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
        note="Cross-attention has no norm of its own and no gate.",
    ),
    Specimen(
        name="sd3",
        family="image",
        build=built(zoo.SD3Transformer2DModel, **SD3),
        inputs=sd3_inputs,
        attention=3,
        mlp=5,
        sites=sd3_sites,
        note="The last block drops the context stream: its attention has one stream and there is no ff_context.",
    ),
    Specimen(
        name="sd35_medium",
        family="image",
        build=built(zoo.SD3Transformer2DModel, **SD3, dual_attention_layers=(0, 1)),
        inputs=sd3_inputs,
        attention=5,
        mlp=5,
        sites=lambda model: [*sd3_sites(model), *per_block("transformer_blocks", 2, attention="attn2")],
        note="Blocks 0 and 1 add a second self-attention that reads the block's input, not the first attention's sum.",
    ),
    Specimen(
        name="flux",
        family="image",
        build=built(
            zoo.FluxTransformer2DModel,
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        inputs=flux_inputs,
        attention=2,
        mlp=4,
        parallel=2,
        sites=flux_sites,
    ),
    Specimen(
        name="flux2",
        family="image",
        build=built(
            zoo.Flux2Transformer2DModel,
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        inputs=flux2_inputs,
        attention=2,
        mlp=4,
        parallel=2,
        sites=flux2_sites,
        note="All blocks share one modulation; single blocks project attention and MLP with one linear in and one out.",
    ),
    Specimen(
        name="sana",
        family="image",
        build=built(
            zoo.SanaTransformer2DModel,
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
        ),
        inputs=text_to_image_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
        note="Self-attention is linear: ReLU instead of softmax, two matmuls. The MLP is three image convolutions.",
    ),
    Specimen(
        name="qwenimage",
        family="image",
        build=built(
            zoo.QwenImageTransformer2DModel,
            in_channels=8,
            out_channels=2,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
        ),
        inputs=qwenimage_inputs,
        attention=2,
        mlp=3,
        sites=qwenimage_sites,
        note="The last block's text stream is computed and never read: its txt_mlp and half of its attention are dead.",
    ),
    Specimen(
        name="auraflow",
        family="image",
        build=built(
            zoo.AuraFlowTransformer2DModel,
            sample_size=8,
            in_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        inputs=auraflow_inputs,
        attention=4,
        mlp=6,
        sites=auraflow_sites,
        note="Nested: x + ff(norm(x + attn(x))). Only the MLP reads the attention's sum, so reusing the MLP makes the "
        "attention before it needless.",
    ),
    Specimen(
        name="hunyuandit",
        family="image",
        build=built(
            zoo.HunyuanDiT2DModel,
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            num_layers=4,
            cross_attention_dim=16,
            cross_attention_dim_t5=24,
            pooled_projection_dim=16,
            text_len=5,
            text_len_t5=6,
        ),
        inputs=hunyuandit_inputs,
        attention=8,
        mlp=4,
        sites=lambda _: per_block("blocks", 4, attention=("attn1", "attn2"), mlp="ff"),
        note="Long skips (concatenate, norm, linear) replace the stream in the second half and are not branches.",
    ),
]
