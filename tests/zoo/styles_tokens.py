"""Styles that rearrange tokens: linear and windowed attention, space and time apart, pyramids, outer skips."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specimen import Site, Specimen, built, countdown, labels, moving, per_block
from .styles_parts import (
    CHANNELS,
    CLASSES,
    HEADS,
    WIDTH,
    AdaBlock,
    FusedAttention,
    ImageDenoiser,
    ImageFrame,
    Mlp,
    TimeEmbed,
    heads_apart,
    heads_together,
    image_inputs,
    image_style,
)


class LinearAttention(nn.Module):
    """Attention with a ReLU kernel for softmax (Katharopoulos et al., arXiv 2006.16236; SANA, arXiv 2410.10629).

    Keys and values are multiplied first; a column of ones beside the values gives the denominator.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (heads_apart(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        sums = F.relu(key).transpose(-2, -1) @ F.pad(value, (0, 1), value=1.0)
        mixed = F.relu(query) @ sums
        return self.out(heads_together(mixed[..., :-1] / (mixed[..., -1:] + 1e-3)))


class WindowAttention(FusedAttention):
    """Attention within windows of the grid (Swin, Liu et al., arXiv 2103.14030), which reshapes fold into the batch."""

    def __init__(self, width: int, heads: int, shift: int, grid: int = 8, window: int = 4) -> None:
        super().__init__(width, heads)
        self.shift, self.grid, self.window = shift, grid, window

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        count, size = self.grid // self.window, self.window
        grid = x.reshape(batch, self.grid, self.grid, width)
        if self.shift:
            grid = grid.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = grid.reshape(batch, count, size, count, size, width).transpose(2, 3).reshape(-1, size * size, width)
        grid = super().forward(windows).reshape(batch, count, count, size, size, width).transpose(2, 3)
        grid = grid.reshape(batch, self.grid, self.grid, width)
        if self.shift:
            grid = grid.roll((self.shift, self.shift), dims=(1, 2))
        return grid.reshape(batch, length, width)


class WindowPair(nn.Module):
    """Swin's pair of blocks: plain windows, then shifted ones."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.still = AdaBlock(width, heads, attn=partial(WindowAttention, shift=0))
        self.moved = AdaBlock(width, heads, attn=partial(WindowAttention, shift=2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.moved(self.still(x, c), c)


class FoldedAttention(FusedAttention):
    """Attention along one of two axes of ``(batch, frames, places, width)``, the other folded into the batch inside."""

    def __init__(self, width: int, heads: int, time: bool) -> None:
        super().__init__(width, heads)
        self.time = time

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2) if self.time else x
        mixed = super().forward(rows.flatten(0, 1)).reshape(rows.shape)
        return mixed.transpose(1, 2) if self.time else mixed


class SpaceTimeBlock(nn.Module):
    """Space, time, MLP (TimeSformer, Bertasius et al., arXiv 2102.05095) on a stream that keeps its batch apart."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.space = FoldedAttention(width, heads, time=False)
        self.time = FoldedAttention(width, heads, time=True)
        self.mlp = Mlp(width)
        self.gates = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate1, gate2, gate3 = self.gates(c)[:, None, None].chunk(3, dim=-1)
        x = x + gate1 * self.space(self.norm1(x))
        x = x + gate2 * self.time(self.norm2(x))
        return x + gate3 * self.mlp(self.norm3(x))


class VideoDenoiser(nn.Module):
    """Frames of 4x4 patches of one pixel, denoised with attention over space and time apart.

    Args:
        folded: Latte's way (Ma et al., arXiv 2401.03048): blocks in turn on ``(batch * frames, places, width)`` and
            ``(batch * places, frames, width)``, so that the stream itself has other axes folded into its batch.
    """

    def __init__(self, folded: bool, frames: int = 3, places: int = 16) -> None:
        super().__init__()
        self.folded = folded
        self.first, self.last = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.where = nn.Parameter(torch.zeros(1, 1, places, WIDTH))
        self.when = nn.Parameter(torch.zeros(1, frames, 1, WIDTH))
        self.time, self.classes = TimeEmbed(WIDTH), nn.Embedding(CLASSES, WIDTH)
        block = AdaBlock if folded else SpaceTimeBlock
        self.blocks = nn.ModuleList(block(WIDTH, HEADS) for _ in range(4 if folded else 2))
        self.last_norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batch, frames, channels, height, width = x.shape
        tokens = self.first(x.flatten(3).transpose(2, 3)) + self.where + self.when
        c = self.time(t) + self.classes(y)
        for index, block in enumerate(self.blocks):
            tokens = self.fold(block, tokens, c, time=index % 2 == 1) if self.folded else block(tokens, c)
        return self.last(self.last_norm(tokens)).transpose(2, 3).reshape(batch, frames, channels, height, width)

    @staticmethod
    def fold(block: nn.Module, tokens: Tensor, c: Tensor, time: bool) -> Tensor:
        """Run a block with the axis that it does not mix folded into the batch, and the condition repeated for it."""
        rows = tokens.transpose(1, 2) if time else tokens
        repeated = c.unsqueeze(1).expand(-1, rows.shape[1], -1).flatten(0, 1)
        rows = block(rows.flatten(0, 1), repeated).reshape(rows.shape)
        return rows.transpose(1, 2) if time else rows


class Hourglass(ImageFrame):
    """Hourglass diffusion transformer (Crowson et al., arXiv 2401.11605): 2x2 tokens merge into one for the middle.

    Args:
        learnt: Join the outer level again by a learnt blend, as the paper does, rather than by a plain sum.
    """

    def __init__(self, learnt: bool, inner: int = 48) -> None:
        super().__init__(patch=1)
        self.down = AdaBlock(WIDTH, HEADS)
        self.merge, self.condition = nn.Linear(4 * WIDTH, inner), nn.Linear(WIDTH, inner)
        self.middle = nn.ModuleList(AdaBlock(inner, HEADS) for _ in range(2))
        self.split = nn.Linear(inner, 4 * WIDTH)
        self.blend = nn.Parameter(torch.zeros(())) if learnt else None
        self.up = AdaBlock(WIDTH, HEADS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        skip = self.down(tokens, c)
        batch, length, width = skip.shape
        quads = skip.reshape(batch, 4, 2, 4, 2, width).transpose(2, 3).reshape(batch, 16, 4 * width)
        tokens, inner = self.merge(quads), self.condition(c)
        for block in self.middle:
            tokens = block(tokens, inner)
        tokens = self.split(tokens).reshape(batch, 4, 4, 2, 2, width).transpose(2, 3).reshape(batch, length, width)
        tokens = tokens + skip if self.blend is None else torch.lerp(skip, tokens, self.blend.sigmoid())
        return self.leave(self.up(tokens, c), c)


class Preconditioned(ImageDenoiser):
    """EDM's preconditioning (Karras et al., arXiv 2206.00364): a join around the whole network."""

    def __init__(self) -> None:
        super().__init__(AdaBlock)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sigma = (t.float() / 100)[:, None, None, None]
        total = (sigma**2 + 0.25).sqrt()
        return x * 0.25 / total**2 + super().forward(x / total, t, y) * (0.5 * sigma / total)


class TrunkSkip(ImageDenoiser):
    """A sum around all blocks, so that the trunk learns the difference to the embedded tokens."""

    def __init__(self) -> None:
        super().__init__(AdaBlock)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        trunk = tokens
        for block in self.blocks:
            trunk = block(trunk, c)
        return self.leave(tokens + trunk, c)


def video_inputs(batch: int, step: int) -> dict[str, Any]:
    """Noisy frames, timestep and class."""
    return {
        "x": moving(batch, step, 3, CHANNELS, 4, 4),
        "t": countdown(batch, step),
        "y": labels(batch, CLASSES),
    }


def hourglass_sites(model: nn.Module) -> list[Site]:
    """Attention and MLP of the four blocks; neither merging nor splitting, nor the skip around the middle."""
    blocks = ["down", "middle.0", "middle.1", "up"]
    return [Site(kind, (f"{b}.{m}",)) for b in blocks for kind, m in (("attention", "attn"), ("mlp", "mlp"))]


def window_sites(model: nn.Module) -> list[Site]:
    """Two blocks in each pair."""
    pairs = [f"blocks.0.{half}" for half in ("still", "moved")]
    return [Site(kind, (f"{b}.{m}",)) for b in pairs for kind, m in (("attention", "attn"), ("mlp", "mlp"))]


def _usual(model: nn.Module) -> list[Site]:
    return per_block("blocks", 2, attention="attn", mlp="mlp")


def _space_time(model: nn.Module) -> list[Site]:
    return per_block("blocks", 2, attention=("space", "time"), mlp="mlp")


def _folded(model: nn.Module) -> list[Site]:
    return per_block("blocks", 4, attention="attn", mlp="mlp")


_SKIP_NOTE = "the sum around several blocks is a skip, not a branch"

SPECIMENS: list[Specimen] = [
    image_style("linear-attention", partial(AdaBlock, attn=LinearAttention), note="attention without a softmax"),
    Specimen(
        "windows", "style", built(ImageDenoiser, block=WindowPair, depth=1, patch=1), image_inputs, 2, 2, window_sites
    ),
    Specimen("space-time", "style", built(VideoDenoiser, folded=False), video_inputs, 4, 2, _space_time),
    Specimen(
        name="space-time-folded",
        family="style",
        build=built(VideoDenoiser, folded=True),
        inputs=video_inputs,
        attention=4,
        mlp=4,
        sites=_folded,
        note="the first axis of a branch is batch times frames or batch times places, never the batch alone",
    ),
    Specimen(
        "hourglass", "style", built(Hourglass, learnt=False), image_inputs, 4, 4, hourglass_sites, note=_SKIP_NOTE
    ),
    Specimen(
        "hourglass-blend", "style", built(Hourglass, learnt=True), image_inputs, 4, 4, hourglass_sites, note=_SKIP_NOTE
    ),
    Specimen("preconditioned", "style", built(Preconditioned), image_inputs, 2, 2, _usual, note=_SKIP_NOTE),
    Specimen("trunk-skip", "style", built(TrunkSkip), image_inputs, 2, 2, _usual, note=_SKIP_NOTE),
]
