"""Video transformers of diffusers that are told more than a text: sound, earlier frames, a pose and a face."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import transformers as zoo

from .diffusers_video import WAN, hunyuanvideo_sites, wan_sites
from .diffusers_video_more import masked_text_inputs
from .specimen import Site, Specimen, built, constant, falling, moving, per_block, prefix_mask


def framepack_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        **masked_text_inputs(batch, step),
        "encoder_attention_mask": torch.ones(batch, 6, dtype=torch.bool),
        "hidden_states": moving(batch, step, 4, 2, 8, 8),
        "pooled_projections": constant(batch, 16, seed=4),
        "image_embeds": constant(batch, 3, 20, seed=5),
        "indices_latents": torch.arange(8, 10),
        "guidance": torch.full((batch,), 6000.0),
        "latents_clean": constant(batch, 4, 2, 8, 8, seed=6),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": constant(batch, 4, 2, 8, 8, seed=7),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": constant(batch, 4, 4, 8, 8, seed=8),
        "indices_latents_history_4x": torch.arange(1, 5),
    }


def wan_animate_inputs(batch: int, step: int) -> dict[str, Any]:
    return {
        "hidden_states": moving(batch, step, 12, 3, 4, 4),
        "timestep": falling(batch, step, 1000),
        "encoder_hidden_states": constant(batch, 6, 24),
        "encoder_hidden_states_image": constant(batch, 5, 20, seed=4),
        "pose_hidden_states": constant(batch, 4, 2, 4, 4, seed=5),
        "face_pixel_values": constant(batch, 3, 5, 16, 16, seed=6),
        "motion_encode_batch_size": 64,
    }


def ltx2_inputs(batch: int, step: int) -> dict[str, Any]:
    timestep = falling(batch, step, 1000)
    return {
        "hidden_states": moving(batch, step, 2 * 2 * 2, 8),
        "audio_hidden_states": moving(batch, step, 6, 8, seed=7),
        "encoder_hidden_states": constant(batch, 6, 24),
        "audio_encoder_hidden_states": constant(batch, 6, 24, seed=4),
        "timestep": timestep,
        "sigma": timestep,
        "encoder_attention_mask": prefix_mask(batch, 6),
        "audio_encoder_attention_mask": prefix_mask(batch, 6),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "fps": 24.0,
        "audio_num_frames": 6,
        "isolate_modalities": False,
    }


LTX2_ATTENTION = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")


SPECIMENS: list[Specimen] = [
    Specimen(
        name="ltx2",
        family="video",
        build=built(
            zoo.LTX2VideoTransformer3DModel,
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=24,
        ),
        inputs=ltx2_inputs,
        attention=12,
        mlp=4,
        sites=lambda _: per_block("transformer_blocks", 2, attention=LTX2_ATTENTION, mlp=("ff", "audio_ff")),
        note="Video and audio streams of different widths, each with self-, text and cross-modal attention and an MLP. "
        "Both directions of cross-modal attention read the streams as they were before either is added.",
    ),
    Specimen(
        name="framepack",
        family="video",
        build=built(
            zoo.HunyuanVideoFramepackTransformer3DModel,
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=2,
            text_embed_dim=24,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
            has_image_proj=True,
            image_proj_dim=20,
            has_clean_x_embedder=True,
        ),
        inputs=framepack_inputs,
        attention=4,
        mlp=6,
        parallel=2,
        sites=hunyuanvideo_sites,
        note="HunyuanVideo's blocks behind tokens of earlier frames; the text refiner's four branches as there. One sample "
        "alone drops padded text, samples in a batch mask it, so that gates see other text: prompts here fill the length.",
        export="none",
    ),
    Specimen(
        name="wan_animate",
        family="video",
        build=built(
            zoo.WanAnimateTransformer3DModel,
            **{**WAN, "in_channels": 12},
            latent_channels=4,
            image_dim=20,
            added_kv_proj_dim=32,
            rope_max_seq_len=32,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=1,
        ),
        inputs=wan_animate_inputs,
        attention=6,
        mlp=2,
        sites=lambda model: [*wan_sites(model), *[Site("attention", (f"face_adapter.{index}",)) for index in range(2)]],
        note="A cross-attention to the driving face joins the stream after each block. The face's convolutional "
        "encoder adds two convolved paths to each other: no residual branch.",
    ),
]
