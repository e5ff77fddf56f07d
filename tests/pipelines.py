"""Tiny random diffusers pipelines, made here from configurations: no files, no hub.

Their weights are scaled up until the branches matter, so that a wrong reuse shows in the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

WORDS = ["a", "cat", "dog", "red", "blue", "photo", "of", "on", "the", "grass"]


@dataclass(frozen=True)
class Specimen:
    """One pipeline: how to make it, a call that samples, and how often a step calls the denoiser."""

    make: Callable[[], Any]
    call: dict[str, Any]
    other: dict[str, Any] = field(default_factory=dict)
    calls_per_step: int = 1


def clip_tokenizer() -> Any:
    """Byte-level BPE over whole words and single letters."""
    letters = [chr(c) for c in range(97, 123)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = parts[0] + parts[1]
            if pair not in tokens:
                tokens.append(pair)
                merges.append((parts[0], parts[1]))
            parts = [pair, *parts[2:]]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def t5_tokenizer() -> Any:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{word}", -2.0) for word in WORDS)]
    vocab += [(chr(c), -6.0) for c in range(97, 123)] + [("▁", -4.0)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)


def gemma_tokenizer() -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(chr(c) for c in range(97, 123))]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=16)


def clip_text(tokenizer: Any, projection: bool = True) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=77, projection_dim=32, hidden_act="gelu", bos_token_id=0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5_text(tokenizer: Any, family: str = "T5", width: int = 32) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"{family}EncoderModel")(config)
    return model


def image_vae(channels: int = 4, **extra: Any) -> nn.Module:
    model: nn.Module = diffusers.AutoencoderKL(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        latent_channels=channels, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **extra,
    )  # fmt: skip
    return model


def lively(model: nn.Module) -> Any:
    """Random weights large enough for every branch to change the output, norms and biases included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1.4 / parameter[0].numel() ** 0.5))
            else:
                parameter.add_(noise * 0.1)
    return model.eval()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow_scheduler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def make_dit() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_elementwise_affine=False, attention_bias=True,
    )  # fmt: skip
    return quiet(diffusers.DiTPipeline(lively(transformer), image_vae().eval(), diffusers.DDIMScheduler()))


def make_sd3() -> Any:
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=8, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64, out_channels=8,
        pos_embed_max_size=16,
    )  # fmt: skip
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=lively(transformer), scheduler=flow_scheduler(shift=3.0),
            vae=image_vae(8, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False).eval(),
            text_encoder=clip_text(clip).eval(), tokenizer=clip, text_encoder_2=clip_text(clip).eval(), tokenizer_2=clip,
            text_encoder_3=t5_text(t5, width=64).eval(), tokenizer_3=t5,
        )
    )  # fmt: skip


def make_flux() -> Any:
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return quiet(
        diffusers.FluxPipeline(
            scheduler=flow_scheduler(),
            vae=image_vae(4, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False).eval(),
            text_encoder=clip_text(clip, projection=False).eval(), tokenizer=clip, text_encoder_2=t5_text(t5).eval(),
            tokenizer_2=t5, transformer=lively(transformer),
        )
    )  # fmt: skip


def make_pixart() -> Any:
    torch.manual_seed(0)
    t5 = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip
    return quiet(
        diffusers.PixArtSigmaPipeline(
            tokenizer=t5, text_encoder=t5_text(t5).eval(), vae=image_vae().eval(), transformer=lively(transformer),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    )  # fmt: skip


def make_sana() -> Any:
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=32,
    )  # fmt: skip
    text = transformers.Gemma2Model(
        transformers.Gemma2Config(
            head_dim=16, hidden_size=8, initializer_range=0.02, intermediate_size=64, max_position_embeddings=8192,
            num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=2, vocab_size=len(tokenizer),
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    return quiet(
        diffusers.SanaPipeline(
            tokenizer=tokenizer, text_encoder=text.eval(), vae=vae.eval(), transformer=lively(transformer),
            scheduler=flow_scheduler(shift=7.0),
        )
    )  # fmt: skip


def make_wan() -> Any:
    torch.manual_seed(0)
    t5 = t5_tokenizer()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=64, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return quiet(
        diffusers.WanPipeline(
            tokenizer=t5, text_encoder=t5_text(t5, "UMT5").eval(), vae=vae.eval(), transformer=lively(transformer),
            scheduler=flow_scheduler(shift=7.0),
        )
    )  # fmt: skip


def make_ltx() -> Any:
    torch.manual_seed(0)
    t5 = t5_tokenizer()
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=32,
    )  # fmt: skip
    widths, no = (8, 8, 8, 8), (False,) * 4
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=widths, decoder_block_out_channels=widths,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(*no, False),
        upsample_residual=no, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1, patch_size_t=1,
        encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return quiet(
        diffusers.LTXPipeline(
            scheduler=flow_scheduler(), vae=vae.eval(), text_encoder=t5_text(t5).eval(), tokenizer=t5,
            transformer=lively(transformer),
        )
    )  # fmt: skip


_SMALL = {"height": 16, "width": 16, "max_sequence_length": 16}
_LTX = {"height": 32, "width": 32, "max_sequence_length": 16}
_PLAIN = {"use_resolution_binning": False, "clean_caption": False}
_SANA = {"height": 32, "width": 32, "complex_human_instruction": None}

PIPELINES: dict[str, Specimen] = {
    "dit": Specimen(make_dit, {"class_labels": [3, 7]}, {"class_labels": [5, 1]}),
    "sd3": Specimen(
        make_sd3, {"prompt": ["a cat", "red dog"], **_SMALL}, {"prompt": ["the grass", "blue photo"], **_SMALL}
    ),
    "flux": Specimen(
        make_flux,
        {"prompt": ["a cat", "red dog"], "negative_prompt": ["blue", "grass"], "true_cfg_scale": 3.0, **_SMALL},
        {"prompt": ["dog", "on grass"], "negative_prompt": ["blue", "cat"], "true_cfg_scale": 3.0, **_SMALL},
        calls_per_step=2,
    ),
    "pixart": Specimen(
        make_pixart, {"prompt": ["a cat", "red dog"], **_SMALL, **_PLAIN},
        {"prompt": ["the grass", "blue photo"], **_SMALL, **_PLAIN},
    ),
    "sana": Specimen(
        make_sana, {"prompt": ["a cat", "red dog"], **_SMALL, **_PLAIN, **_SANA},
        {"prompt": ["the grass", "blue photo"], **_SMALL, **_PLAIN, **_SANA},
    ),
    "ltx": Specimen(
        make_ltx, {"prompt": ["a cat", "red dog"], "num_frames": 9, **_LTX}, {"prompt": ["dog", "grass"], "num_frames": 9, **_LTX}
    ),
    "wan": Specimen(
        make_wan, {"prompt": ["a cat", "red dog"], "negative_prompt": "blue", "num_frames": 5, **_SMALL},
        {"prompt": ["dog", "grass"], "negative_prompt": "blue", "num_frames": 5, **_SMALL}, calls_per_step=2,
    ),
}  # fmt: skip
