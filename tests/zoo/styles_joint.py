"""Several token streams: joint attention over two and over three, and two streams that read each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specimen import Site, Specimen, built, moving
from .styles_parts import HEADS, WIDTH, ImageFrame, Mlp, heads_apart, heads_together, modulate, text_inputs

TEXT = 24
SOUNDS, SOUND = 10, 6


class JointAttention(nn.Module):
    """Image and text attend at once, each with projections of its own (MMDiT, Esser et al., arXiv 2403.03206)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.image_qkv, self.text_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.image_out, self.text_out = nn.Linear(width, width), nn.Linear(width, width)
        self.query_norm, self.key_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.image_qkv(image).chunk(3, dim=-1), self.text_qkv(text).chunk(3, dim=-1), strict=True)
        query, key, value = (heads_apart(torch.cat(pair, dim=1), self.heads) for pair in pairs)
        mixed = F.scaled_dot_product_attention(self.query_norm(query), self.key_norm(key), value)
        images, texts = heads_together(mixed).split([image.shape[1], text.shape[1]], dim=1)
        return self.image_out(images), self.text_out(texts)


class StreamMlp(nn.Module):
    """Norm, modulation and MLP of one stream, the join included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.inner = Mlp(width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return x + gate.unsqueeze(1) * self.inner(modulate(self.norm(x), shift, scale))


class TwoStreamBlock(nn.Module):
    """MMDiT's block (arXiv 2403.03206): both streams are modulated apart, meet in attention, and have an MLP each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.image_norm, self.text_norm = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.image_modulation, self.text_modulation = (nn.Linear(width, 6 * width) for _ in range(2))
        self.attn = JointAttention(width, heads)
        self.image_mlp, self.text_mlp = StreamMlp(width), StreamMlp(width)

    def forward(self, image: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate, *image_rest = self.image_modulation(F.silu(c)).chunk(6, dim=1)
        shift2, scale2, gate2, *text_rest = self.text_modulation(F.silu(c)).chunk(6, dim=1)
        images, texts = self.attn(
            modulate(self.image_norm(image), shift, scale), modulate(self.text_norm(text), shift2, scale2)
        )
        image = self.image_mlp(image + gate.unsqueeze(1) * images, *image_rest)
        return image, self.text_mlp(text + gate2.unsqueeze(1) * texts, *text_rest)


class TwoStreamDenoiser(ImageFrame):
    """Image and text through joint blocks; only the image comes out, so the last block's text is for nothing."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.classes = nn.Linear(TEXT, WIDTH)
        self.words = nn.Linear(TEXT, WIDTH)
        self.blocks = nn.ModuleList(TwoStreamBlock(WIDTH, HEADS) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        image, c = self.enter(x, t, text.mean(dim=1))
        words = self.words(text)
        for block in self.blocks:
            image, words = block(image, words, c)
        return self.leave(image, c)


class ThreeStreamBlock(nn.Module):
    """Joint attention over image, sound and text, written in the block itself, with an MLP for each stream.

    After multi-modal flows that widen MMDiT to further modalities (OmniFlow, Li et al., arXiv 2412.01169). The streams
    differ in width, so that projections take them to and from the attention's width.
    """

    def __init__(self, widths: dict[str, int], inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in widths.items()})
        self.qkv = nn.ModuleDict({name: nn.Linear(width, 3 * inner) for name, width in widths.items()})
        self.out = nn.ModuleDict({name: nn.Linear(inner, width) for name, width in widths.items()})
        self.gate = nn.ModuleDict({name: nn.Linear(inner, 2 * width) for name, width in widths.items()})
        self.mlp = nn.ModuleDict({name: Mlp(width) for name, width in widths.items()})
        self.mlp_norm = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in widths.items()})

    def forward(self, streams: dict[str, Tensor], c: Tensor) -> dict[str, Tensor]:
        parts = torch.cat([self.qkv[name](self.norm[name](x)) for name, x in streams.items()], dim=1)
        query, key, value = (heads_apart(part, self.heads) for part in parts.chunk(3, dim=-1))
        mixed = heads_together(F.scaled_dot_product_attention(query, key, value))
        result, start = {}, 0
        for name, x in streams.items():
            gate1, gate2 = self.gate[name](c).unsqueeze(1).chunk(2, dim=-1)
            x = x + gate1 * self.out[name](mixed[:, start : start + x.shape[1]])
            start += x.shape[1]
            result[name] = x + gate2 * self.mlp[name](self.mlp_norm[name](x))
        return result


class ThreeStreamDenoiser(ImageFrame):
    """Denoises image and sound together, given text."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"image": WIDTH, "sound": 16, "text": TEXT}
        self.classes = nn.Linear(TEXT, WIDTH)
        self.sound_in, self.sound_out = nn.Linear(SOUND, 16), nn.Linear(16, SOUND)
        self.blocks = nn.ModuleList(ThreeStreamBlock(widths, WIDTH, HEADS) for _ in range(2))

    def forward(self, x: Tensor, sound: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        image, c = self.enter(x, t, text.mean(dim=1))
        streams = {"image": image, "sound": self.sound_in(sound), "text": text}
        for block in self.blocks:
            streams = block(streams, c)
        return self.leave(streams["image"], c), self.sound_out(streams["sound"])


class ReadOther(nn.Module):
    """One stream's queries against the other stream's keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        key, value = (heads_apart(part, self.heads) for part in self.key_value(other).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(heads_apart(self.query(x), self.heads), key, value)
        return self.out(heads_together(mixed))


class MutualBlock(nn.Module):
    """Co-attention (ViLBERT, Lu et al., arXiv 1908.02265): each stream reads the other as it was before the block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_reads, self.text_reads = ReadOther(width, heads), ReadOther(width, heads)
        self.image_mlp, self.text_mlp = StreamMlp(width), StreamMlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, image: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.modulation(c).chunk(6, dim=1)
        image_z, text_z = self.image_norm(image), self.text_norm(text)
        image, text = image + self.image_reads(image_z, text_z), text + self.text_reads(text_z, image_z)
        return self.image_mlp(image, *parts[:3]), self.text_mlp(text, *parts[3:])


class MutualDenoiser(TwoStreamDenoiser):
    """Two streams without joint attention; again only the image comes out."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.blocks = nn.ModuleList(MutualBlock(WIDTH, HEADS) for _ in range(2))


def sound_inputs(batch: int, step: int) -> dict[str, Any]:
    """Noisy image and sound, timestep and encoded text."""
    return text_inputs(batch, step) | {"sound": moving(batch, step, SOUNDS, SOUND, seed=5)}


def two_stream_sites(model: nn.Module) -> list[Site]:
    """The last block's text MLP is left out: nothing reads it."""
    joint = [Site("attention", (f"blocks.{i}.attn",)) for i in range(3)]
    images = [Site("mlp", (f"blocks.{i}.image_mlp.inner",)) for i in range(3)]
    return joint + images + [Site("mlp", (f"blocks.{i}.text_mlp.inner",)) for i in range(2)]


def three_stream_sites(model: nn.Module) -> list[Site]:
    """Attention leaves through one projection for each stream; the last block's text goes nowhere."""
    streams = [("image", "sound", "text"), ("image", "sound")]
    joint = [Site("attention", tuple(f"blocks.{i}.out.{name}" for name in names)) for i, names in enumerate(streams)]
    return joint + [Site("mlp", (f"blocks.{i}.mlp.{name}",)) for i, names in enumerate(streams) for name in names]


def mutual_sites(model: nn.Module) -> list[Site]:
    """Of the last block only the image's half counts."""
    halves = ["blocks.0.image", "blocks.0.text", "blocks.1.image"]
    reads = [Site("attention", (f"{half}_reads",)) for half in halves]
    return reads + [Site("mlp", (f"{half}_mlp.inner",)) for half in halves]


_TEXT_NOTE = "the text half of the last block cannot reach the output"

SPECIMENS: list[Specimen] = [
    Specimen("mmdit", "style", built(TwoStreamDenoiser), text_inputs, 3, 5, two_stream_sites, note=_TEXT_NOTE),
    Specimen(
        "three-streams", "style", built(ThreeStreamDenoiser), sound_inputs, 2, 5, three_stream_sites, note=_TEXT_NOTE
    ),
    Specimen("mutual-reading", "style", built(MutualDenoiser), text_inputs, 3, 3, mutual_sites, note=_TEXT_NOTE),
]
