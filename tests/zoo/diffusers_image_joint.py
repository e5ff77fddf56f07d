"""Image transformers of diffusers with joint attention over text and image streams."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import transformers as zoo
from torch import nn

from .diffusers_image import flux_sites, grid_ids
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

FLUX = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def flux_inputs(batch: int, step: int, scale: float = 1.0) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 16, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "timestep": falling(batch, step, scale),
        "img_ids": grid_ids(4, 4),
        "txt_ids": torch.zeros(6, 3),
    }


def chroma_inputs(batch: int, step: int) -> dict[str, Any]:
    mask = torch.cat([prefix_mask(batch, 6, dtype=torch.bool), torch.ones(batch, 16, dtype=torch.bool)], dim=1)
    return {**flux_inputs(batch, step), "attention_mask": mask}


def bria_fibo_inputs(batch: int, step: int) -> dict[str, Any]:
    layers = [constant(batch, 6, 20, seed=10 + index) for index in range(4)]
    return {**flux_inputs(batch, step, 1000), "text_encoder_layers": layers}


def cogview_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "timestep": countdown(batch, step),
        "original_size": torch.tensor([[64.0, 64.0]]).repeat(batch, 1),
        "target_size": torch.tensor([[64.0, 64.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }


def cogview3_sites(_model: nn.Module) -> list[Site]:
    return [
        Site("attention", ("transformer_blocks.0.attn1",)),
        Site("attention", ("transformer_blocks.1.attn1",), pick=(0,)),
        *per_block("transformer_blocks", 2, mlp="ff"),
    ]


def cogview4_sites(_model: nn.Module) -> list[Site]:
    return [
        Site("attention", ("transformer_blocks.0.attn1",)),
        Site("attention", ("transformer_blocks.1.attn1",), pick=(0,)),
        *per_block("transformer_blocks", 2, mlp="ff"),
        Site("mlp", ("transformer_blocks.0.ff",), call=1),
    ]


def glm_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "encoder_hidden_states": constant(batch, 6, 24),
        "prior_token_id": labels(batch, 20, 16),
        "prior_token_drop": torch.zeros(batch, 16, dtype=torch.bool),
        "timestep": falling(batch, step, 1000) - 1,
        "target_size": torch.tensor([[64.0, 64.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }


def hidream_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "timesteps": falling(batch, step, 1000),
        "encoder_hidden_states_t5": constant(batch, 5, 24),
        "encoder_hidden_states_llama3": constant(batch, 4, 3, 20, seed=4).transpose(0, 1),
        "pooled_embeds": constant(batch, 16, seed=5),
    }


def hidream_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("double_stream_blocks", 2, attention="block.attn1", mlp=("block.ff_i", "block.ff_t")),
        *per_block("single_stream_blocks", 2, attention="block.attn1", mlp="block.ff_i"),
    ]


HIDREAM = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": [24, 20],
    "text_emb_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "max_resolution": (8, 8),
    "llama_layers": [0, 1, 2, 3],
}


def hunyuanimage_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 8, 4, 4),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_attention_mask": prefix_mask(batch, 6),
    }


def hunyuanimage_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("context_embedder.token_refiner.refiner_blocks", 2, attention="attn", mlp="ff"),
        *per_block("transformer_blocks", 2, attention="attn", mlp=("ff", "ff_context")),
        *per_block("single_transformer_blocks", 2, parallel="proj_out"),
    ]


def joyimage_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 2, 4, 1, 4, 4),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 6, 24),
    }


def joyimage_sites(_model: nn.Module) -> list[Site]:
    return [
        Site("attention", ("double_blocks.0.attn",)),
        Site("attention", ("double_blocks.1.attn",), pick=(0,)),
        *per_block("double_blocks", 2, mlp="img_mlp"),
        *per_block("double_blocks", 1, mlp="txt_mlp"),
    ]


SPECIMENS: list[Specimen] = [
    Specimen(
        name="chroma",
        family="image",
        build=built(
            zoo.ChromaTransformer2DModel,
            **FLUX,
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=2,
        ),
        inputs=chroma_inputs,
        attention=2,
        mlp=6,
        parallel=2,
        sites=lambda model: [*flux_sites(model), *per_block("distilled_guidance_layer.layers", 2, mlp="linear_2")],
        note="Two MLP branches are those of the network that makes all modulations: they depend on the timestep only.",
        export="static",
    ),
    Specimen(
        name="bria",
        family="image",
        build=built(zoo.BriaTransformer2DModel, **FLUX),
        inputs=lambda batch, step: flux_inputs(batch, step, 1000),
        attention=2,
        mlp=4,
        parallel=2,
        sites=flux_sites,
    ),
    Specimen(
        name="bria_fibo",
        family="image",
        build=built(zoo.BriaFiboTransformer2DModel, **FLUX, text_encoder_dim=20),
        inputs=bria_fibo_inputs,
        attention=2,
        mlp=4,
        parallel=2,
        sites=flux_sites,
        note="Half of the text channels are overwritten before every block with a layer of the text encoder.",
    ),
    Specimen(
        name="longcat_image",
        family="image",
        build=built(zoo.LongCatImageTransformer2DModel, **FLUX),
        inputs=flux_inputs,
        attention=2,
        mlp=4,
        parallel=2,
        sites=flux_sites,
    ),
    Specimen(
        name="ovis_image",
        family="image",
        build=built(zoo.OvisImageTransformer2DModel, **FLUX, out_channels=8),
        inputs=flux_inputs,
        attention=2,
        mlp=4,
        parallel=2,
        sites=flux_sites,
    ),
    Specimen(
        name="cogview3plus",
        family="image",
        build=built(
            zoo.CogView3PlusTransformer2DModel,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=24,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        inputs=cogview_inputs,
        attention=2,
        mlp=2,
        sites=cogview3_sites,
        note="One MLP on text and image tokens together; the last block's text half is never read.",
    ),
    Specimen(
        name="cogview4",
        family="image",
        build=built(
            zoo.CogView4Transformer2DModel,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=24,
            time_embed_dim=16,
            condition_dim=8,
            rope_axes_dim=(8, 8),
        ),
        inputs=cogview_inputs,
        attention=2,
        mlp=3,
        sites=cogview4_sites,
        note="Image and text MLPs are two calls of one module with the same weights; the last text one is dead.",
    ),
    Specimen(
        name="glm_image",
        family="image",
        build=built(
            zoo.GlmImageTransformer2DModel,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=24,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=20,
        ),
        inputs=glm_inputs,
        attention=2,
        mlp=3,
        sites=cogview4_sites,
        note="Blocks as in cogview4: one MLP module called for image and for text; the last text call is dead.",
    ),
    Specimen(
        name="hidream",
        family="image",
        build=built(zoo.HiDreamImageTransformer2DModel, **HIDREAM, num_routed_experts=4, num_activated_experts=2),
        inputs=hidream_inputs,
        attention=4,
        mlp=6,
        sites=hidream_sites,
        note="The image MLPs are mixtures of experts: routing, several experts and a shared one are one branch.",
        export="none",
    ),
    Specimen(
        name="hidream_dense",
        family="image",
        build=built(zoo.HiDreamImageTransformer2DModel, **HIDREAM, num_routed_experts=0),
        inputs=hidream_inputs,
        attention=4,
        mlp=6,
        sites=hidream_sites,
        note="The same without experts. Text tokens of each block are appended to the stream and cut off after it.",
        export="static",
    ),
    Specimen(
        name="hunyuanimage",
        family="image",
        build=built(
            zoo.HunyuanImageTransformer2DModel,
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=2,
            text_embed_dim=24,
            rope_axes_dim=(8, 8),
        ),
        inputs=hunyuanimage_inputs,
        attention=4,
        mlp=6,
        parallel=2,
        sites=hunyuanimage_sites,
        note="Two attention and two MLP branches are the text refiner's: they depend on text and timestep only.",
    ),
    Specimen(
        name="joyimage_edit",
        family="image",
        build=built(
            zoo.JoyImageEditTransformer3DModel,
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=24,
            num_layers=2,
            rope_dim_list=[4, 6, 6],
        ),
        inputs=joyimage_inputs,
        attention=2,
        mlp=3,
        sites=joyimage_sites,
        note="Latents are (batch, items, channels, frames, height, width); the last block's text stream is dead.",
    ),
]
