"""Styles that differ in the MLP: parallel to attention, gated, a mixture of experts, or a convolution."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specimen import Site, Specimen, built
from .styles_parts import (
    AdaBlock,
    FusedAttention,
    ImageDenoiser,
    ImageFrame,
    Mlp,
    PreNormBlock,
    heads_apart,
    heads_together,
    image_inputs,
    image_style,
    modulate,
    plain_style,
)


class ParallelBlock(nn.Module):
    """ViT-22B's block (Dehghani et al., arXiv 2302.05442): one norm, attention and MLP side by side, one join."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attn, self.mlp = FusedAttention(width, heads), Mlp(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, dim=1)
        z = modulate(self.norm(x), shift, scale)
        return x + gate.unsqueeze(1) * (self.attn(z) + self.mlp(z))


class ParallelChainBlock(nn.Module):
    """GPT-J's spelling of it, ``attn(z) + mlp(z) + x``: no gate, and the stream comes last in a chain of sums."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn, self.mlp = FusedAttention(width, heads), Mlp(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        z = self.norm(x)
        return self.attn(z) + self.mlp(z) + x


class TwoSumsBlock(ParallelChainBlock):
    """The chain from the left, ``x + attn(z) + mlp(z)``: two sums, and the MLP does not read the first one's result."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        z = self.norm(x)
        return x + self.attn(z) + self.mlp(z)


class FusedParallelBlock(nn.Module):
    """PaLM's parallel block (Chowdhery et al., arXiv 2204.02311) with one projection in and one out.

    The first gives queries, keys, values and both halves of a SwiGLU, the second reads attention and MLP side by side.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.sizes = [width, width, width, 2 * width, 2 * width]
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.enter = nn.Linear(width, sum(self.sizes), bias=False)
        self.out = nn.Linear(3 * width, width, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, dim=1)
        *qkv, up, switch = self.enter(modulate(self.norm(x), shift, scale)).split(self.sizes, dim=-1)
        query, key, value = (heads_apart(part, self.heads) for part in qkv)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + gate.unsqueeze(1) * self.out(torch.cat([heads_together(mixed), F.silu(switch) * up], dim=-1))


class GatedMlp(nn.Module):
    """Gated linear units (Shazeer, arXiv 2002.05202): SwiGLU with three linears, or GEGLU with a chunked one."""

    def __init__(self, width: int, chunked: bool) -> None:
        super().__init__()
        self.chunked = chunked
        inner = 2 * width
        self.up = nn.Linear(width, 2 * inner if chunked else inner)
        if not chunked:
            self.switch = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.chunked:
            value, switch = self.up(x).chunk(2, dim=-1)
            return self.down(value * F.gelu(switch))
        return self.down(F.silu(self.switch(x)) * self.up(x))


class MaskedExperts(nn.Module):
    """Top-k routed experts (Shazeer et al., arXiv 1701.06538; DiT-MoE, arXiv 2407.11633), all of them computed.

    Logits below the k-th largest are masked before softmax, so that the experts not chosen weigh nothing.
    """

    def __init__(self, width: int, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Mlp(width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        least = logits.topk(self.chosen, dim=-1).values[..., -1:]
        shares = logits.masked_fill(logits < least, float("-inf")).softmax(dim=-1)
        return sum(share * expert(x) for share, expert in zip(shares.split(1, dim=-1), self.experts, strict=True))


class EinsumExperts(nn.Module):
    """Soft mixture with stacked weights and a shared expert: products before and after a softmax, yet no attention."""

    def __init__(self, width: int, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.zeros(experts, width, width))
        self.down = nn.Parameter(torch.zeros(experts, width, width))
        self.shared = Mlp(width, ratio=1)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(dim=-1)
        inner = F.gelu(torch.einsum("bnc,ecd->bend", x, self.up))
        mixed = torch.einsum("bne,bend->bnd", shares, torch.einsum("bend,edc->benc", inner, self.down))
        return self.shared(x) + mixed


class ConvMlp(nn.Module):
    """Mix-FFN (SegFormer, Xie et al., arXiv 2105.15203; SANA, arXiv 2410.10629): a depthwise convolution inside."""

    def __init__(self, width: int, grid: int = 4) -> None:
        super().__init__()
        self.grid = grid
        self.up = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.up(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.down(F.gelu(self.depthwise(grid)).flatten(2).transpose(1, 2))


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of ``(batch, channels, height, width)``, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        normal = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class ConvAttention(nn.Module):
    """Self-attention over pixels with 1x1 convolutions for projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-2, -1)
        query, key, value = parts.unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(-2, -1).reshape(x.shape))


class ConvBlock(nn.Module):
    """A block on a stream of feature maps, as in convolutional DiTs (DiC, arXiv 2501.00603; DiCo, arXiv 2505.11196)."""

    def __init__(self, width: int, heads: int, group: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(4, width) if group else ChannelLayerNorm(width) for _ in range(2))
        self.attn = ConvAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, width, 1),
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale1, gate1, scale2, gate2 = self.modulation(c)[:, :, None, None].chunk(4, dim=1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2))


class MapDenoiser(ImageFrame):
    """A denoiser whose residual stream is ``(batch, channels, height, width)`` from first to last block."""

    def __init__(self, group: bool, width: int = 32, heads: int = 4) -> None:
        super().__init__(width)
        self.blocks = nn.ModuleList(ConvBlock(width, heads, group) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        grid = tokens.transpose(1, 2).unflatten(2, (4, 4))
        for block in self.blocks:
            grid = block(grid, c)
        return self.leave(grid.flatten(2).transpose(1, 2), c)


def _parallel(name: str, block: type[nn.Module], modules: tuple[str, ...], added: bool = False) -> Specimen:
    """Two parallel blocks, whose one branch leaves through ``modules``."""

    def sites(model: nn.Module) -> list[Site]:
        return [Site("parallel", tuple(f"blocks.{i}.{module}" for module in modules)) for i in range(2)]

    build = built(ImageDenoiser, block=block, added=added)
    return Specimen(name, "style", build, image_inputs, attention=0, mlp=0, parallel=2, sites=sites)


def _maps(name: str, group: bool) -> Specimen:
    """The denoiser on feature maps with one of the two norms."""
    like = image_style(name, AdaBlock)
    return Specimen(name, "style", built(MapDenoiser, group=group), image_inputs, 2, 2, like.sites)


SPECIMENS: list[Specimen] = [
    _parallel("parallel-one-join", ParallelBlock, ("attn", "mlp")),
    _parallel("parallel-chain", ParallelChainBlock, ("attn", "mlp"), added=True),
    plain_style(
        "parallel-two-sums", TwoSumsBlock, note="two joins that read one norm: attention and MLP are told apart"
    ),
    _parallel("parallel-fused", FusedParallelBlock, ("out",)),
    image_style("swiglu", partial(AdaBlock, mlp=partial(GatedMlp, chunked=False))),
    plain_style("geglu", PreNormBlock, mlp=partial(GatedMlp, chunked=True)),
    image_style("moe-masked", partial(AdaBlock, mlp=MaskedExperts)),
    image_style("moe-einsum", partial(AdaBlock, mlp=EinsumExperts), note="a softmax between products that only routes"),
    image_style("conv-mlp", partial(AdaBlock, mlp=ConvMlp)),
    _maps("maps-channel-norm", group=False),
    _maps("maps-group-norm", group=True),
]
