"""Video transformers of diffusers, continued: joint attention, factorised attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import transformers as zoo
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import nn

from .diffusers_video import cogvideox_inputs
from .specimen import Site, Specimen, built, constant, countdown, falling, moving, per_block, prefix_mask, rising


def masked_text_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 2, 4, 4),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_attention_mask": prefix_mask(batch, 6, dtype=torch.bool),
    }


def mochi_inputs(batch: int, step: int) -> dict[str, Any]:
    return {**masked_text_inputs(batch, step), "timestep": rising(batch, step, 1000)}


def mochi_sites(_model: nn.Module) -> list[Site]:
    return [
        Site("attention", ("transformer_blocks.0.attn1",)),
        Site("attention", ("transformer_blocks.1.attn1",), pick=(0,)),
        *per_block("transformer_blocks", 2, mlp="ff"),
        *per_block("transformer_blocks", 1, mlp="ff_context"),
    ]


def latte_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 3, 8, 8),
        "timestep": countdown(batch, step),
        "encoder_hidden_states": constant(batch, 6, 24),
        "enable_temporal_attentions": True,
    }


def latte_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
        *per_block("temporal_transformer_blocks", 2, attention="attn1", mlp="ff"),
    ]


def allegro_inputs(batch: int, step: int) -> dict[str, Any]:
    crop, scales = ((0, 0), (2, 2)), (2.2, 2.0, 2.0)
    *frequencies, frames, rows, columns = get_3d_rotary_pos_embed_allegro(24, crop, (2, 2), 2, scales)
    grid = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).T.reshape(3, 1, -1).contiguous()
    return {
        "hidden_states": moving(batch, step, 4, 2, 4, 4),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_attention_mask": prefix_mask(batch, 6),
        "timestep": countdown(batch, step),
        "image_rotary_emb": (tuple(frequencies), tuple(grid)),
    }


def easyanimate_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 4, 2, 4, 4),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 6, 24),
    }


def easyanimate_sites(_model: nn.Module) -> list[Site]:
    return [
        Site("attention", ("transformer_blocks.0.attn1",)),
        Site("attention", ("transformer_blocks.1.attn1",), pick=(0,)),
        *per_block("transformer_blocks", 2, mlp="ff"),
        *per_block("transformer_blocks", 1, mlp="txt_ff"),
    ]


def consisid_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        **cogvideox_inputs(batch, step),
        "id_cond": constant(batch, 16, seed=4),
        "id_vit_hidden": [constant(batch, 5, 16, seed=5), constant(batch, 5, 16, seed=6)],
    }


def consisid_sites(_model: nn.Module) -> list[Site]:
    extractor = "local_facial_extractor.layers"
    return [
        *[Site("attention", (f"{extractor}.{index}.0",)) for index in range(2)],
        *[Site("mlp", (f"{extractor}.{index}.1",)) for index in range(2)],
        Site("attention", ("transformer_blocks.0.attn1",)),
        Site("attention", ("transformer_blocks.1.attn1",), pick=(0,)),
        *per_block("transformer_blocks", 2, mlp="ff"),
        Site("attention", ("perceiver_cross_attention.0",)),
    ]


def hunyuanvideo15_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 9, 2, 4, 4),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_attention_mask": prefix_mask(batch, 6),
        "encoder_hidden_states_2": constant(batch, 5, 20, seed=4),
        "encoder_attention_mask_2": prefix_mask(batch, 5),
        "image_embeds": torch.zeros(batch, 3, 16),
    }


def hunyuanvideo15_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("context_embedder.token_refiner.refiner_blocks", 2, attention="attn", mlp="ff"),
        Site("attention", ("transformer_blocks.0.attn",)),
        Site("attention", ("transformer_blocks.1.attn",), pick=(0,)),
        *per_block("transformer_blocks", 2, mlp="ff"),
        *per_block("transformer_blocks", 1, mlp="ff_context"),
    ]


def motif_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("transformer_blocks", 2, attention="attn", mlp=("ff", "ff_context")),
        *per_block("single_transformer_blocks", 3, parallel="proj_out"),
    ]


def kandinsky5_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 2, 4, 4, 4),
        "encoder_hidden_states": constant(batch, 6, 24),
        "timestep": falling(batch, step, 1000),
        "pooled_projections": constant(batch, 16, seed=4),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(6),
        "scale_factor": (1.0, 2.0, 2.0),
    }


def kandinsky5_sites(_model: nn.Module) -> list[Site]:
    return [
        *per_block("text_transformer_blocks", 2, attention="self_attention", mlp="feed_forward"),
        *per_block("visual_transformer_blocks", 2, attention=("self_attention", "cross_attention"), mlp="feed_forward"),
    ]


SPECIMENS: list[Specimen] = [
    Specimen(
        name="mochi",
        family="video",
        build=built(
            zoo.MochiTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=24,
            time_embed_dim=16,
            max_sequence_length=6,
        ),
        inputs=mochi_inputs,
        attention=2,
        mlp=3,
        sites=mochi_sites,
        note="Norm and gate after a branch are one module; the timestep rises; the last block drops the text stream.",
        export="static",
    ),
    Specimen(
        name="latte",
        family="video",
        build=built(
            zoo.LatteTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=24,
            video_length=3,
        ),
        inputs=latte_inputs,
        attention=6,
        mlp=4,
        sites=latte_sites,
        note="Spatial and temporal blocks in turn: the leading dimension is batch x frames, then batch x patches.",
    ),
    Specimen(
        name="allegro",
        family="video",
        build=built(
            zoo.AllegroTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            sample_height=4,
            sample_width=4,
            sample_frames=2,
            caption_channels=24,
        ),
        inputs=allegro_inputs,
        attention=4,
        mlp=2,
        sites=lambda _: per_block("transformer_blocks", 2, attention=("attn1", "attn2"), mlp="ff"),
    ),
    Specimen(
        name="easyanimate",
        family="video",
        build=built(
            zoo.EasyAnimateTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=4,
            sample_height=4,
            num_layers=2,
            mmdit_layers=2,
            time_embed_dim=16,
            text_embed_dim=24,
        ),
        inputs=easyanimate_inputs,
        attention=2,
        mlp=3,
        sites=easyanimate_sites,
        note="The last block's text stream is computed and never read.",
    ),
    Specimen(
        name="consisid",
        family="video",
        build=built(
            zoo.ConsisIDTransformer3DModel,
            num_attention_heads=3,
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
            is_train_face=True,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=16,
            LFE_vit_dim=16,
            LFE_depth=2,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=4,
            LFE_output_dim=32,
            LFE_ff_mult=2,
            LFE_num_scale=2,
        ),
        inputs=consisid_inputs,
        attention=5,
        mlp=4,
        sites=consisid_sites,
        note="CogVideoX blocks, a cross-attention to the face after every other block, and a face encoder whose two "
        "attention and two MLP branches depend on the reference face only.",
    ),
    Specimen(
        name="hunyuanvideo15",
        family="video",
        build=built(
            zoo.HunyuanVideo15Transformer3DModel,
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=2,
            text_embed_dim=24,
            text_embed_2_dim=20,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        inputs=hunyuanvideo15_inputs,
        attention=4,
        mlp=5,
        sites=hunyuanvideo15_sites,
        note="Two attention and two MLP branches are the text refiner's: they depend on text and timestep only. The "
        "last block's text stream is dead.",
        export="none",
    ),
    Specimen(
        name="motif_video",
        family="video",
        build=built(
            zoo.MotifVideoTransformer3DModel,
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=3,
            num_decoder_layers=1,
            text_embed_dim=24,
            rope_axes_dim=(4, 6, 6),
        ),
        inputs=masked_text_inputs,
        attention=2,
        mlp=4,
        parallel=3,
        sites=motif_sites,
        note="The last single block starts again from the embedded latents, with the stream so far as its context.",
    ),
    Specimen(
        name="kandinsky5",
        family="video",
        build=built(
            zoo.Kandinsky5Transformer3DModel,
            in_visual_dim=4,
            in_text_dim=24,
            in_text_dim2=16,
            time_dim=16,
            out_visual_dim=4,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=2,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        inputs=kandinsky5_inputs,
        attention=6,
        mlp=4,
        sites=kandinsky5_sites,
        note="Two attention and two MLP branches run on the text: they depend on text and timestep only.",
    ),
]
