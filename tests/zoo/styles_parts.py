"""What the hand-written styles share: embeddings, patches, plain attention and MLP, and the frame around the blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specimen import Specimen, built, constant, countdown, falling, labels, moving, per_block

WIDTH = 32
HEADS = 4
CHANNELS = 4
SIDE = 8
CLASSES = 10
WORDS = 6
"""Length of the text that conditioned styles read."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale the features of tokens ``(batch, tokens, width)`` by vectors ``(batch, width)``."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """``(batch, tokens, heads * dim)`` to ``(batch, heads, tokens, dim)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_together(x: Tensor) -> Tensor:
    """``(batch, heads, tokens, dim)`` to ``(batch, tokens, heads * dim)``."""
    return x.transpose(1, 2).flatten(2)


class TimeEmbed(nn.Module):
    """Sinusoids of the timestep through a two-layer perceptron."""

    frequencies: Tensor

    def __init__(self, width: int, bands: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-torch.arange(bands) * (9.2 / bands)), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * bands, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies.float()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class Mlp(nn.Sequential):
    """Linear, tanh-approximated GELU, linear."""

    def __init__(self, width: int, ratio: int = 2) -> None:
        super().__init__(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


class FusedAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values, taken apart by reshape, permute and unbind."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class PreNormBlock(nn.Module):
    """``x + attn(norm(x))``, then ``x + mlp(norm(x))``; the condition comes with the tokens."""

    def __init__(
        self,
        width: int,
        heads: int,
        attn: Callable[[int, int], nn.Module] = FusedAttention,
        mlp: Callable[[int], nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = attn(width, heads), mlp(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AdaBlock(nn.Module):
    """The adaLN-Zero block of DiT (Peebles and Xie, arXiv 2212.09748), for any attention and MLP.

    Six vectors made from the condition shift, scale and gate the two branches.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        attn: Callable[[int, int], nn.Module] = FusedAttention,
        mlp: Callable[[int], nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = attn(width, heads), mlp(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class ImageFrame(nn.Module):
    """Everything of an image denoiser but its blocks: patches and positions in, modulated projection out."""

    def __init__(self, width: int = WIDTH, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.patches = nn.Conv2d(CHANNELS, width, patch, patch)
        self.positions = nn.Parameter(torch.zeros(1, (SIDE // patch) ** 2, width))
        self.time = TimeEmbed(width)
        self.classes: nn.Module = nn.Embedding(CLASSES, width)
        self.last_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.last_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.last = nn.Linear(width, patch * patch * CHANNELS)

    def enter(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Image, timestep and class to tokens and condition."""
        return self.patches(x).flatten(2).transpose(1, 2) + self.positions, self.time(t) + self.classes(y)

    def leave(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens and condition to the predicted image."""
        shift, scale = self.last_modulation(c).chunk(2, dim=1)
        return self.image(self.last(modulate(self.last_norm(x), shift, scale)))

    def image(self, x: Tensor) -> Tensor:
        """Tokens that hold the pixels of their patch to the image."""
        grid, size = SIDE // self.patch, self.patch
        pixels = x.reshape(x.shape[0], grid, grid, size, size, CHANNELS)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], CHANNELS, SIDE, SIDE)


class ImageDenoiser(ImageFrame):
    """A class-conditional image denoiser of like blocks ``block(width, heads)``, called with tokens and condition.

    Args:
        added: Add the condition to the tokens, for blocks that ignore the condition.
    """

    def __init__(
        self,
        block: Callable[[int, int], nn.Module],
        depth: int = 2,
        width: int = WIDTH,
        patch: int = 2,
        added: bool = False,
    ) -> None:
        super().__init__(width, patch)
        self.blocks = nn.ModuleList(block(width, HEADS) for _ in range(depth))
        self.added = added

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        if self.added:
            tokens = tokens + c.unsqueeze(1)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.leave(tokens, c)


def image_inputs(batch: int, step: int) -> dict[str, Any]:
    """Noisy image, timestep and class."""
    return {
        "x": moving(batch, step, CHANNELS, SIDE, SIDE),
        "t": countdown(batch, step),
        "y": labels(batch, CLASSES),
    }


def text_inputs(batch: int, step: int) -> dict[str, Any]:
    """Noisy image, noise level times a thousand, as flow-matching models often take it, and encoded text."""
    return {
        "x": moving(batch, step, CHANNELS, SIDE, SIDE),
        "t": falling(batch, step, 1000.0),
        "text": constant(batch, WORDS, 24),
    }


def image_style(
    name: str,
    block: Callable[[int, int], nn.Module],
    depth: int = 2,
    *,
    attention: str | tuple[str, ...] = "attn",
    mlp: str | tuple[str, ...] = "mlp",
    note: str = "",
    **config: Any,
) -> Specimen:
    """A specimen of an :class:`ImageDenoiser` whose blocks show their branches at the modules named."""
    counts = [depth * (1 if isinstance(sites, str) else len(sites)) for sites in (attention, mlp)]
    return Specimen(
        name=name,
        family="style",
        build=built(ImageDenoiser, block=block, depth=depth, **config),
        inputs=image_inputs,
        attention=counts[0],
        mlp=counts[1],
        sites=lambda model: per_block("blocks", depth, attention=attention, mlp=mlp),
        note=note,
    )


def plain_style(name: str, block: Callable[..., nn.Module], depth: int = 2, note: str = "", **parts: Any) -> Specimen:
    """A specimen whose blocks ignore the condition, which is added to the tokens instead."""
    return image_style(name, partial(block, **parts) if parts else block, depth, note=note, added=True)
