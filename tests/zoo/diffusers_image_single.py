"""Image transformers of diffusers with one token stream, or with cross-attention to the text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import transformers as zoo
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import nn

from .specimen import Site, Specimen, built, constant, falling, labels, level, moving, per_block, prefix_mask, rising


def lumina_next_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "timestep": rising(batch, step),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_mask": prefix_mask(batch, 6),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384),
        "cross_attention_kwargs": {},
    }


def lumina2_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "timestep": rising(batch, step),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_attention_mask": prefix_mask(batch, 6, dtype=torch.bool),
    }


def refined_sites(attention: str, mlp: str) -> list[Site]:
    """Sites of a model with refiners for the latents and for the text before the joint layers."""
    stacks = ("noise_refiner", "context_refiner", "layers")
    return [site for stack in stacks for site in per_block(stack, 2, attention=attention, mlp=mlp)]


def zimage_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "x": list(moving(batch, step, 4, 1, 8, 8).unbind(0)),
        "t": rising(batch, step),
        "cap_feats": list(constant(batch, 6, 24).unbind(0)),
    }


def prx_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "timestep": falling(batch, step),
        "encoder_hidden_states": constant(batch, 6, 24),
        "attention_mask": prefix_mask(batch, 6, dtype=torch.bool),
    }


def krea2_inputs(batch: int, step: int) -> dict[str, Any]:
    positions = torch.zeros(6 + 16, 3)
    positions[6:, 1] = torch.arange(16) // 4
    positions[6:, 2] = torch.arange(16) % 4
    return {
        "hidden_states": moving(batch, step, 16, 8),
        "encoder_hidden_states": constant(batch, 6, 3, 24),
        "timestep": falling(batch, step),
        "position_ids": positions,
        "encoder_attention_mask": prefix_mask(batch, 6, dtype=torch.bool),
    }


def krea2_sites(_model: nn.Module) -> list[Site]:
    stacks = ("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks", "transformer_blocks")
    return [site for stack in stacks for site in per_block(stack, 2, attention="attn", mlp="ff")]


def ideogram4_inputs(batch: int, step: int) -> dict[str, Any]:
    text, image = 6, 16
    positions = torch.zeros(text + image, 3, dtype=torch.int64)
    positions[:text] = torch.arange(text)[:, None]
    positions[text:, 0] = text
    positions[text:, 1] = text + torch.arange(image) // 4
    positions[text:, 2] = text + torch.arange(image) % 4
    padded = torch.cat([1 - prefix_mask(batch, text).flip(1), torch.zeros(batch, image, dtype=torch.int64)], dim=1)
    kinds = torch.tensor([3] * text + [2] * image)
    latents = torch.cat([torch.zeros(batch, text, 8), moving(batch, step, image, 8)], dim=1)
    return {
        "hidden_states": latents,
        "timestep": rising(batch, step),
        "encoder_hidden_states": constant(batch, text + image, 24),
        "position_ids": positions.repeat(batch, 1, 1),
        "segment_ids": torch.where(padded.bool(), -1, 1),
        "indicator": torch.where(padded.bool(), 0, kinds),
    }


def ernie_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 8, 4, 4),
        "timestep": falling(batch, step, 1000),
        "text_bth": constant(batch, 6, 24),
        "text_lens": prefix_mask(batch, 6).sum(1),
    }


def omnigen_inputs(batch: int, step: int) -> dict[str, Any]:
    text, image = 5, 16
    length = text + 1 + image
    mask = torch.ones(length, length).tril()
    mask[text + 1 :, text + 1 :] = 1
    return {
        "hidden_states": moving(batch, step, 4, 8, 8),
        "timestep": rising(batch, step),
        "input_ids": labels(batch, 30, text),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.repeat(batch, 1, 1),
        "position_ids": torch.arange(length).repeat(batch, 1),
    }


def nucleusmoe_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 16, 8),
        "img_shapes": [(1, 4, 4)],
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_hidden_states_mask": prefix_mask(batch, 6, dtype=torch.bool),
        "timestep": falling(batch, step),
    }


def prior_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 16),
        "timestep": torch.tensor(round(1000 * level(step))),
        "proj_embedding": constant(batch, 16, seed=4),
        "encoder_hidden_states": constant(batch, 6, 16),
        "attention_mask": prefix_mask(batch, 6, dtype=torch.bool),
    }


def transformer2d_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 8, 4, 4),
        "encoder_hidden_states": constant(batch, 6, 24),
        "timestep": torch.tensor(round(100 * level(step))),
    }


SPECIMENS: list[Specimen] = [
    Specimen(
        name="lumina_next",
        family="image",
        build=built(
            zoo.LuminaNextDiT2DModel,
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=24,
        ),
        inputs=lumina_next_inputs,
        attention=2,
        mlp=2,
        sites=lambda _: per_block("layers", 2, attention="attn2.to_out.0", mlp="feed_forward"),
        note="Self- and cross-attention of a block are summed before one output projection and one join: one branch.",
        export="static",
    ),
    Specimen(
        name="lumina2",
        family="image",
        build=built(
            zoo.Lumina2Transformer2DModel,
            sample_size=8,
            in_channels=4,
            hidden_size=48,
            num_layers=2,
            num_refiner_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(32, 16, 16),
            cap_feat_dim=24,
        ),
        inputs=lumina2_inputs,
        attention=6,
        mlp=6,
        sites=lambda _: refined_sites("attn", "feed_forward"),
        note="Two attention and two MLP branches are the text refiner's: they depend on the text only.",
        export="none",
    ),
    Specimen(
        name="zimage",
        family="image",
        build=built(
            zoo.ZImageTransformer2DModel,
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=24,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 64, 64],
        ),
        inputs=zimage_inputs,
        attention=6,
        mlp=6,
        sites=lambda _: refined_sites("attention", "feed_forward"),
        note="Two attention and two MLP branches are the text refiner's: they depend on the text only. Samples come "
        "and go in lists, so the batch is part of the call's structure.",
        export="static",
    ),
    Specimen(
        name="prx",
        family="image",
        build=built(
            zoo.PRXTransformer2DModel,
            in_channels=4,
            context_in_dim=24,
            hidden_size=32,
            num_heads=2,
            depth=2,
            axes_dim=[8, 8],
        ),
        inputs=prx_inputs,
        attention=2,
        mlp=2,
        sites=lambda _: per_block("blocks", 2, attention="attention", mlp="down_proj"),
        note="Image queries see text and image keys; the text itself is never updated.",
    ),
    Specimen(
        name="krea2",
        family="image",
        build=built(
            zoo.Krea2Transformer2DModel,
            in_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=24,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            axes_dims_rope=(4, 6, 6),
        ),
        inputs=krea2_inputs,
        attention=6,
        mlp=6,
        sites=krea2_sites,
        note="Four attention and four MLP branches fuse text layers and depend on the text only; in half of them the "
        "leading dimension is batch times tokens.",
    ),
    Specimen(
        name="ideogram4",
        family="image",
        build=built(
            zoo.Ideogram4Transformer2DModel,
            in_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=24,
            mrope_section=(4, 2, 2),
        ),
        inputs=ideogram4_inputs,
        attention=2,
        mlp=2,
        sites=lambda _: per_block("layers", 2, attention="attention", mlp="feed_forward"),
        note="Each branch is normed once more before its gate; the timestep rises from noise to image.",
    ),
    Specimen(
        name="ernie_image",
        family="image",
        build=built(
            zoo.ErnieImageTransformer2DModel,
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=64,
            in_channels=8,
            out_channels=8,
            text_in_dim=24,
            rope_axes_dim=(4, 6, 6),
        ),
        inputs=ernie_inputs,
        attention=2,
        mlp=2,
        sites=lambda _: per_block("layers", 2, attention="self_attention", mlp="mlp"),
        note="The stream is (tokens, batch, channels): the batch is the second dimension between blocks.",
    ),
    Specimen(
        name="omnigen",
        family="image",
        build=built(
            zoo.OmniGenTransformer2DModel,
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            num_layers=2,
            pad_token_id=0,
            vocab_size=30,
            max_position_embeddings=64,
            original_max_position_embeddings=32,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=8,
            time_step_dim=16,
        ),
        inputs=omnigen_inputs,
        attention=2,
        mlp=2,
        sites=lambda _: per_block("layers", 2, attention="self_attn", mlp="mlp"),
        note="No modulation in the blocks: the timestep is a token of the sequence.",
        export="none",
    ),
    Specimen(
        name="nucleusmoe",
        family="image",
        build=built(
            zoo.NucleusMoEImageTransformer2DModel,
            in_channels=8,
            out_channels=2,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
            mlp_ratio=6.0,
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
        ),
        inputs=nucleusmoe_inputs,
        attention=2,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention="attn", mlp="img_mlp"),
        note="The second block's MLP is a mixture of experts that choose their tokens; its router reads the timestep.",
    ),
    Specimen(
        name="prior",
        family="image",
        build=built(
            zoo.PriorTransformer,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            embedding_dim=16,
            num_embeddings=6,
        ),
        inputs=prior_inputs,
        attention=2,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention="attn1", mlp="ff"),
        note="Denoises one vector: latents have rank 2, and one timestep without dimensions serves the whole batch.",
    ),
    Specimen(
        name="transformer2d",
        family="image",
        build=built(
            zoo.Transformer2DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=8,
            num_layers=2,
            norm_num_groups=4,
            cross_attention_dim=24,
            num_embeds_ada_norm=100,
            norm_type="ada_norm",
        ),
        inputs=transformer2d_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
        note="The whole model is one more residual, input plus output projection, around the branches: not counted. "
        "One timestep without dimensions serves the whole batch.",
    ),
]
