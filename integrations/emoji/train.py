"""Trains the emoji pipeline: ``python -m lazycompress.integrations.emoji.train --stage STAGE --out DIR``.

In this order: ``autoencoder`` (minutes), ``denoiser`` with the text encoders (hours on two CPU cores), ``classifier``
(minutes; it only judges). Kill a stage at any time; the same command goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from .data import Pictures, load_pictures, split, to_bytes, to_unit
from .grid import save_grid
from .judge import Judge, judge_loss
from .metrics import recall_at
from .model import TextToVelocity, assemble, build_autoencoder, build_tokenizer, tokenize
from .stages import Schedule, Stage, fit, load_averaged

PROMPT_DROPOUT = 0.1
DEFAULT_BLANK_TOKENS = 256
"""What the pipeline asks of its silent third encoder where nobody says ``max_sequence_length=1``."""
BLANK_EVERY = 32
KL_WEIGHT = 1e-4
LOOK_PROMPTS = (
    "red heart", "red apple", "fire", "watermelon", "palm tree", "grinning face", "black cat", "sun with face",
    "large green circle", "rainbow", "blue book", "pizza", "thumbs up sign dark skin", "woman mage light skin",
    "japan flag", "blue heart",
)  # fmt: skip


def draw_rows(pictures: Pictures, n: int, generator: torch.Generator) -> torch.Tensor:
    """int64 ``[n]``, drawn with the pictures' weights."""
    return torch.multinomial(pictures.weights, n, replacement=True, generator=generator)


def _slopes(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def autoencoder_stage(pictures: Pictures, batch: int, device: torch.device, out: Path, dtype: torch.dtype) -> Stage:
    """Reconstruction of pixels and of their differences to neighbours (edges), with a little pull to a normal."""
    torch.manual_seed(0)
    model = build_autoencoder()

    def loss(model: Any, generator: torch.Generator) -> torch.Tensor:
        images = to_unit(pictures.images[draw_rows(pictures, batch, generator)]).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            posterior = model.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            restored = model.decode(posterior.mean + posterior.std * noise).sample.float()
        edges = sum(F.l1_loss(a, b) for a, b in zip(_slopes(restored), _slopes(images), strict=True))
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        pixels = F.mse_loss(restored, images) + 0.2 * F.l1_loss(restored, images)
        total: torch.Tensor = pixels + 0.2 * edges + KL_WEIGHT * kl
        return total

    @torch.no_grad()
    def look(model: Any, update: int) -> None:
        images = to_unit(pictures.images[:: len(pictures.images) // 256])
        restored = model.decode(model.encode(images.to(device)).latent_dist.mean).sample.cpu()
        error = (to_bytes(restored).float() - to_bytes(images).float()).square().mean((1, 2, 3)) / 255**2
        print(f"\nautoencoder, {update} updates: PSNR {-10 * error.log10().mean():.2f} dB", flush=True)
        pairs = torch.stack([images[:32], restored[:32]], 1).flatten(0, 1)
        save_grid(to_bytes(pairs), out / "samples" / f"autoencoder-{update:06d}.png")

    return Stage("autoencoder", model, loss, look=look)


@torch.no_grad()
def encode_pictures(autoencoder: Any, pictures: Pictures) -> torch.Tensor:
    """Latents of all pictures with mean 0 and deviation 1; the autoencoder's configuration gets shift and scale."""
    parts = [autoencoder.encode(to_unit(part)).latent_dist.mean for part in torch.split(pictures.images, 128)]
    latents = torch.cat(parts)
    autoencoder.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    normal: torch.Tensor = (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    return normal


def denoiser_stage(
    pictures: Pictures,
    latents: torch.Tensor,
    tokenizer: CLIPTokenizer,
    autoencoder: nn.Module,
    batch: int,
    device: torch.device,
    out: Path,
    dtype: torch.dtype,
) -> Stage:
    """Flow matching with logit-normal sigmas (Esser et al. 2024, arXiv 2403.03206, section 3.1), a tenth unprompted."""
    torch.manual_seed(0)
    tokens = tokenize(tokenizer, [*pictures.prompts, ""])
    unprompted = len(pictures.prompts)
    # Measured on a CPU at 76 tokens: the backward pass of torch's fused attention takes half of an update in bfloat16.
    attention = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        rows = draw_rows(pictures, batch, generator)
        dropped = torch.rand(batch, generator=generator) < PROMPT_DROPOUT
        sigma = torch.randn(batch, generator=generator).sigmoid()
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator)
        blank = DEFAULT_BLANK_TOKENS if torch.randint(BLANK_EVERY, (), generator=generator) == 0 else 1
        clean, share = latents[rows], sigma.view(-1, 1, 1, 1)
        noisy, velocity = clean.lerp(noise, share), noise - clean
        words = tokens[rows.masked_fill(dropped, unprompted)]
        with sdpa_kernel(attention), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = model(noisy.to(device), sigma.to(device), words.to(device), blank)
        return F.mse_loss(predicted.float(), velocity.to(device))

    def look(model: nn.Module, update: int) -> None:
        pipeline: Any = assemble(autoencoder.to(device), tokenizer, cast(TextToVelocity, model))
        images = pipeline(
            list(LOOK_PROMPTS),
            height=32,
            width=32,
            num_inference_steps=14,
            guidance_scale=4.0,
            max_sequence_length=1,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        save_grid(to_bytes(images.cpu() * 2 - 1), out / "samples" / f"denoiser-{update:06d}.png")

    return Stage("denoiser", TextToVelocity(tokenizer), loss, look=look)


def classifier_stage(pictures: Pictures, tokenizer: CLIPTokenizer, batch: int, device: torch.device) -> Stage:
    """The judge: every picture, moved and noised a little, finds its own prompt among all."""
    torch.manual_seed(0)
    candidates = sorted(set(pictures.prompts))
    place = {prompt: index for index, prompt in enumerate(candidates)}
    targets = torch.tensor([place[prompt] for prompt in pictures.prompts])
    tokens = tokenize(tokenizer, candidates).to(device)
    model = Judge(len(tokenizer), cast(int, tokenizer.pad_token_id))

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(targets), (batch,), generator=generator)
        return judge_loss(model, to_unit(pictures.images[rows]), targets[rows], tokens, generator)

    @torch.no_grad()
    def look(model: nn.Module, update: int) -> None:
        images = to_unit(pictures.images[::8]) / 2 + 0.5
        found = recall_at(5, cast(Judge, model).cpu(), tokenizer, images, pictures.prompts[::8], candidates)
        model.to(device)
        print(f"\nclassifier, {update} updates: recall at 5 of real pictures {found:.3f}", flush=True)

    return Stage("classifier", model, loss, look=look)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lazycompress.integrations.emoji.train", description=__doc__)
    parser.add_argument("--stage", choices=["autoencoder", "denoiser", "classifier"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="data, checkpoints and samples go here")
    parser.add_argument("--updates", type=int, help="optimiser steps in all; may be changed on resuming")
    parser.add_argument("--batch", type=int, default=64, help="pictures per update")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the products")
    options = parser.parse_args(arguments)
    out, device, dtype = options.out, torch.device(options.device), getattr(torch, options.dtype)
    train, _ = split(load_pictures(out / "data"))

    if options.stage == "autoencoder":
        schedule = Schedule(options.updates or 3000, options.batch, options.lr or 2e-3, ema_decay=0.99, look_seconds=90)
        fit(autoencoder_stage(train, options.batch, device, out, dtype), schedule, out, options.seed, device)
    elif options.stage == "denoiser":
        autoencoder, _ = load_averaged("autoencoder", build_autoencoder(), out)
        latents = encode_pictures(autoencoder, train)
        stage = denoiser_stage(
            train, latents, build_tokenizer(train.prompts), autoencoder, options.batch, device, out, dtype
        )
        schedule = Schedule(options.updates or 100_000, options.batch, options.lr or 1e-3, ema_decay=0.9995)
        fit(stage, schedule, out, options.seed, device)
    else:
        pictures = load_pictures(out / "data")
        stage = classifier_stage(pictures, build_tokenizer(train.prompts), options.batch, device)
        schedule = Schedule(options.updates or 3000, options.batch, options.lr or 1e-3, ema_decay=0.99, look_seconds=60)
        fit(stage, schedule, out, options.seed, device)


if __name__ == "__main__":
    main()
