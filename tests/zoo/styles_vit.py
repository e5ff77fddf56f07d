"""Vision-transformer styles: how attention is written, where the norms are, and how the residual is scaled."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specimen import Site, Specimen, built
from .styles_parts import (
    AdaBlock,
    FusedAttention,
    ImageDenoiser,
    Mlp,
    PreNormBlock,
    heads_apart,
    heads_together,
    image_inputs,
    image_style,
    modulate,
    plain_style,
)


class TorchAttentionBlock(nn.Module):
    """Pre-norm block around ``nn.MultiheadAttention``, as in ViT (Dosovitskiy et al., arXiv 2010.11929).

    Torch's module returns a pair. If weights are asked for, it computes softmax by hand, otherwise the fused attention.
    """

    def __init__(self, width: int, heads: int, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        z = self.norm1(x)
        mixed, _ = self.attn(z, z, z, need_weights=self.weights)
        x = x + mixed
        return x + self.mlp(self.norm2(x))


class SoftmaxAttention(nn.Module):
    """Attention as "Attention is all you need" (Vaswani et al., arXiv 1706.03762) has it: matmul, softmax, matmul."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (heads_apart(part(x), self.heads) for part in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
        return self.out(heads_together(torch.matmul(scores.softmax(dim=-1), value)))


class EinsumAttention(nn.Module):
    """The same with ``torch.einsum`` on tokens that keep their axes in place."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", query * query.shape[-1] ** -0.5, key)
        return self.out(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value).flatten(2))


class SandwichBlock(nn.Module):
    """Norms before and after each branch, CogView's remedy for deep models (Ding et al., arXiv 2105.13290), gated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.attn, self.mlp = FusedAttention(width, heads), Mlp(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale1, gate1, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(4, dim=-1)
        x = x + gate1 * self.norms[1](self.attn(self.norms[0](x) * (1 + scale1)))
        return x + gate2 * self.norms[3](self.mlp(self.norms[2](x) * (1 + scale2)))


class PostNormBlock(nn.Module):
    """``x = norm(x + f(x))``, the first transformer's order (arXiv 1706.03762): the stream passes through the norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = FusedAttention(width, heads), Mlp(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class OutNormBlock(nn.Module):
    """Swin v2's residual post-norm (Liu et al., arXiv 2111.09883): ``x + norm(f(x))``, nothing before the branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = FusedAttention(width, heads), Mlp(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class LayerScale(nn.Module):
    """One learnt factor per channel (CaiT, Touvron et al., arXiv 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): drops a sample's whole branch in training, idle otherwise."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class DropoutAttention(FusedAttention):
    """Dropout after the output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class DropoutMlp(nn.Sequential):
    """An MLP with dropout after each linear."""

    def __init__(self, width: int) -> None:
        inner = 2 * width
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Dropout(0.1), nn.Linear(inner, width), nn.Dropout(0.1))


class LayerScaleBlock(nn.Module):
    """``x + drop_path(alpha * scale(f(norm(x))))``: LayerScale, a depth factor, stochastic depth and dropout."""

    def __init__(self, width: int, heads: int, alpha: float = 0.7) -> None:
        super().__init__()
        self.alpha = alpha
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = DropoutAttention(width, heads), DropoutMlp(width)
        self.scale1, self.scale2 = LayerScale(width), LayerScale(width)
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.drop_path(self.alpha * self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.alpha * self.scale2(self.mlp(self.norm2(x))))


class WeightedSumBlock(nn.Module):
    """``x * a + f(x) * b``: both sides of the join are scaled, as in DeepNorm (Wang et al., arXiv 2203.00555)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = FusedAttention(width, heads), Mlp(width)
        self.keep = nn.Parameter(torch.ones(2, width))
        self.take = nn.Parameter(torch.ones(2, width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x * (1 + self.keep[0]) + self.attn(self.norm1(x)) * self.take[0]
        return x * (1 + self.keep[1]) + self.mlp(self.norm2(x)) * self.take[1]


class MagnitudeBlock(nn.Module):
    """EDM2's magnitude-preserving sum (Karras et al., arXiv 2312.02696): ``(0.7 x + 0.3 f) / sqrt(0.7² + 0.3²)``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = FusedAttention(width, heads), Mlp(width)
        self.gains = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gain1, gain2 = self.gains(c).add(1).unsqueeze(1).chunk(2, dim=-1)
        for branch, gain in ((self.attn, gain1), (self.mlp, gain2)):
            x = torch.lerp(x, branch(F.normalize(x, dim=-1) * gain), 0.3) / math.hypot(0.7, 0.3)
        return x


def _torch_attention(name: str, weights: bool) -> Specimen:
    """Two blocks around ``nn.MultiheadAttention``: the first entry of the pair that it returns is the branch."""

    def sites(model: nn.Module) -> list[Site]:
        kinds = (("attention", "attn", (0,)), ("mlp", "mlp", None))
        return [Site(kind, (f"blocks.{i}.{path}",), pick) for i in range(2) for kind, path, pick in kinds]

    build = built(ImageDenoiser, block=partial(TorchAttentionBlock, weights=weights), added=True)
    return Specimen(name, "style", build, image_inputs, attention=2, mlp=2, sites=sites)


class BiasedAttention(FusedAttention):
    """Learnt relative-position bias per head, given to the fused attention as a float mask (Swin, arXiv 2103.14030)."""

    def __init__(self, width: int, heads: int, length: int = 16) -> None:
        super().__init__(width, heads)
        self.bias = nn.Parameter(torch.zeros(heads, length, length))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (heads_apart(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(heads_together(F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias[None])))


class AffineNormBlock(nn.Module):
    """AdaGN's way (Dhariwal and Nichol, arXiv 2105.05233) on tokens: scale and shift from the condition, no gate."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = BiasedAttention(width, heads), Mlp(width)
        self.modulation = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(c)).unflatten(1, (4, -1)).unbind(1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


SPECIMENS: list[Specimen] = [
    image_style("dit-adaln-zero", AdaBlock, depth=3),
    _torch_attention("torch-mha", weights=False),
    _torch_attention("torch-mha-weights", weights=True),
    plain_style("softmax-by-hand", PreNormBlock, attn=SoftmaxAttention),
    image_style("einsum", partial(AdaBlock, attn=EinsumAttention)),
    image_style("affine-norm-bias", AffineNormBlock),
    image_style("sandwich-norm", SandwichBlock),
    plain_style("post-norm", PostNormBlock),
    plain_style("out-norm", OutNormBlock),
    plain_style("layerscale-droppath", LayerScaleBlock),
    plain_style("weighted-sum", WeightedSumBlock),
    image_style("magnitude-lerp", MagnitudeBlock, note="the join is a lerp between stream and branch"),
]
