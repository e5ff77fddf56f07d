"""Styles from language models, and text or conditions as tokens: rotary positions, U-ViT, cross-attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specimen import Specimen, built, per_block, prefix_mask, rising
from .styles_parts import (
    HEADS,
    WIDTH,
    WORDS,
    FusedAttention,
    ImageFrame,
    Mlp,
    heads_apart,
    heads_together,
    image_inputs,
    image_style,
    text_inputs,
)

TEXT = 24


class HandRMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467) written out: float32 inside, rsqrt, cast back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


def angles(dim: int, grid: int = 4) -> Tensor:
    """Rotary angles ``(grid * grid, dim / 2)``: half of the pairs follow the row, half the column."""
    rates = 100.0 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return torch.cat([row.flatten()[:, None] * rates, column.flatten()[:, None] * rates], dim=1)


def turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864) by turning the first half of the features against the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def turn_complex(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions with neighbouring features as one complex number."""
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns).flatten(-2).to(x.dtype)


class RotaryAttention(nn.Module):
    """Attention of Large-DiT (Lumina-T2X, Gao et al., arXiv 2405.05945): QK-norm, then rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.query_norm, self.key_norm = HandRMSNorm(width // heads), HandRMSNorm(width // heads)
        turns = angles(width // heads)
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (heads_apart(part(x), self.heads) for part in (self.query, self.key, self.value))
        query = turn_halves(self.query_norm(query), self.cos, self.sin)
        key = turn_halves(self.key_norm(key), self.cos, self.sin)
        return self.out(heads_together(F.scaled_dot_product_attention(query, key, value)))


class SwiGlu(nn.Module):
    """LLaMA's MLP (Touvron et al., arXiv 2302.13971)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.switch, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.switch(x)) * self.up(x))


class LargeDitBlock(nn.Module):
    """LLaMA's block with adaLN, its gates bounded by tanh (arXiv 2405.05945)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = HandRMSNorm(width), HandRMSNorm(width)
        self.attn, self.mlp = RotaryAttention(width, heads), SwiGlu(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale1, gate1, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(4, dim=-1)
        x = x + gate1.tanh() * self.attn(self.norm1(x) * (1 + scale1))
        return x + gate2.tanh() * self.mlp(self.norm2(x) * (1 + scale2))


class NextAttention(nn.Module):
    """Next-DiT's attention (Lumina-Next, Zhuo et al., arXiv 2406.18583).

    Fewer heads for keys than for queries, complex rotary positions, and the text read by the same queries: the two
    results are added, the second behind a tanh gate, before one output projection.
    """

    turns: Tensor

    def __init__(self, width: int, heads: int, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, dim = heads, kv_heads, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * kv_heads * dim, bias=False)
        self.text_key_value = nn.Linear(TEXT, 2 * kv_heads * dim, bias=False)
        self.query_norm, self.key_norm = HandRMSNorm(dim), HandRMSNorm(dim)
        self.text_gate = nn.Parameter(torch.zeros(heads, 1, 1))
        self.out = nn.Linear(width, width, bias=False)
        self.register_buffer("turns", torch.polar(torch.ones(16, dim // 2), angles(dim)), persistent=False)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Projected keys and values, each head repeated for its group of queries."""
        key, value = (heads_apart(part, self.kv_heads) for part in x.chunk(2, dim=-1))
        groups = self.heads // self.kv_heads
        return self.key_norm(key).repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        query = self.query_norm(heads_apart(self.query(x), self.heads))
        key, value = self.keys_values(self.key_value(x))
        turned = turn_complex(query, self.turns)
        mixed = F.scaled_dot_product_attention(turned, turn_complex(key, self.turns), value)
        key, value = self.keys_values(self.text_key_value(text))
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.bool()[:, None, None, :])
        return self.out(heads_together(mixed + self.text_gate.tanh() * read))


class NextDitBlock(nn.Module):
    """Sandwich norms around both branches, scales before and tanh gates after (arXiv 2406.18583)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(HandRMSNorm(width) for _ in range(4))
        self.attn, self.mlp = NextAttention(width, heads), SwiGlu(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width))

    def forward(self, x: Tensor, c: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        scale1, gate1, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(4, dim=-1)
        mixed = self.attn(self.norms[0](x) * (1 + scale1), text, mask)
        x = x + gate1.tanh() * self.norms[1](mixed)
        return x + gate2.tanh() * self.norms[3](self.mlp(self.norms[2](x) * (1 + scale2)))


class CrossAttention(nn.Module):
    """Image tokens ask, text tokens answer; padding is masked out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(TEXT, width), nn.Linear(TEXT, width)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        query = heads_apart(self.query(x), self.heads)
        key, value = heads_apart(self.key(text), self.heads), heads_apart(self.value(text), self.heads)
        return self.out(heads_together(F.scaled_dot_product_attention(query, key, value, attn_mask=bias)))


class TextBlock(nn.Module):
    """PixArt's block (Chen et al., arXiv 2310.00426): self, cross to text, MLP.

    One modulation is made for the whole model, and each block adds a table of its own to it. Cross-attention has
    neither norm nor gate.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn, self.cross, self.mlp = FusedAttention(width, heads), CrossAttention(width, heads), Mlp(width)
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, c: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (c.unflatten(1, (6, -1)) + self.table).chunk(6, dim=1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.cross(x, text, bias)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TextDenoiser(ImageFrame):
    """A text-conditional denoiser; the mean of the text joins the timestep in the condition.

    Args:
        shared: Make one modulation for all blocks and give attention a float mask, as PixArt does.
    """

    def __init__(self, block: type[nn.Module], shared: bool) -> None:
        super().__init__()
        self.classes = nn.Linear(TEXT, WIDTH)
        self.blocks = nn.ModuleList(block(WIDTH, HEADS) for _ in range(2))
        self.shared = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH)) if shared else None

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        words = mask.unsqueeze(-1).to(text.dtype)
        tokens, c = self.enter(x, t, (text * words).sum(1) / words.sum(1))
        modulation, bias = c, mask
        if self.shared is not None:
            modulation, bias = self.shared(c), (1 - mask.to(text.dtype))[:, None, None, :] * -10000.0
        for block in self.blocks:
            tokens = block(tokens, modulation, text, bias)
        return self.leave(tokens, c)


class SkipBlock(nn.Module):
    """U-ViT's block: a pre-norm block which in the second half first takes in a stream kept from the first half."""

    def __init__(self, width: int, heads: int, skip: bool) -> None:
        super().__init__()
        self.join = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = FusedAttention(width, heads), Mlp(width)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        if self.join is not None and kept is not None:
            x = self.join(torch.cat([x, kept], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(ImageFrame):
    """U-ViT (Bao et al., arXiv 2209.12152): time and class are tokens, long skips join the halves, no adaLN."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SkipBlock(WIDTH, HEADS, skip=index > 2) for index in range(5))
        self.plain_norm = nn.LayerNorm(WIDTH)
        self.smooth = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        tokens = torch.cat([self.time(t).unsqueeze(1), self.classes(y).unsqueeze(1), tokens], dim=1)
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, kept.pop() if index > 2 else None)
            if index < 2:
                kept.append(tokens)
        return self.smooth(self.image(self.last(self.plain_norm(tokens)[:, 2:])))


class TokenBlock(nn.Module):
    """A pre-norm block with a learnt register of tokens before the image's, taken off again after the branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.zeros(1, 2, width))
        self.norm1, self.norm2 = HandRMSNorm(width), HandRMSNorm(width)
        self.attn, self.mlp = FusedAttention(width, heads), SwiGlu(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        context = torch.cat([self.registers.expand(x.shape[0], -1, -1), c.unsqueeze(1), self.norm1(x)], dim=1)
        x = x + self.attn(context)[:, 3:]
        return x + self.mlp(self.norm2(x))


def masked_text_inputs(batch: int, step: int) -> dict[str, Any]:
    """Image, encoded text, the mask of its padding, and a time that rises from 0 to 1, as Lumina's does."""
    return text_inputs(batch, step) | {"t": rising(batch, step), "mask": prefix_mask(batch, WORDS, shortest=2)}


SPECIMENS: list[Specimen] = [
    image_style("large-dit", LargeDitBlock),
    Specimen(
        name="next-dit",
        family="style",
        build=built(TextDenoiser, block=NextDitBlock, shared=False),
        inputs=masked_text_inputs,
        attention=2,
        mlp=2,
        sites=lambda model: per_block("blocks", 2, attention="attn", mlp="mlp"),
        note="self- and cross-attention share queries and output projection: one branch",
    ),
    Specimen(
        name="cross-attention",
        family="style",
        build=built(TextDenoiser, block=TextBlock, shared=True),
        inputs=masked_text_inputs,
        attention=4,
        mlp=2,
        sites=lambda model: per_block("blocks", 2, attention=("attn", "cross"), mlp="mlp"),
    ),
    Specimen(
        name="u-vit",
        family="style",
        build=built(UViT),
        inputs=image_inputs,
        attention=5,
        mlp=5,
        sites=lambda model: per_block("blocks", 5, attention="attn", mlp="mlp"),
        note="the long skips are concatenations, not residual joins",
    ),
    image_style("registers", TokenBlock, note="the branch reads more tokens than it gives: the cut is part of it"),
]
