"""Denoisers that are no diffusion transformers: nothing in them is to be reused, and a tool should say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specimen import Specimen, built, countdown, moving
from .styles_parts import CLASSES, HEADS, WIDTH, FusedAttention, ImageFrame, Mlp, TimeEmbed, image_inputs

FEATURES = 24


class PlainMlp(nn.Module):
    """A perceptron on vectors and the embedded timestep, layer after layer."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimeEmbed(WIDTH)
        self.layers = nn.ModuleList([nn.Linear(FEATURES + WIDTH, 64), nn.Linear(64, 64), nn.Linear(64, FEATURES)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = torch.cat([x, self.time(t)], dim=1)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x)


class ResidualMlp(nn.Module):
    """A perceptron with residual joins, but on one vector per sample: no tokens, no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimeEmbed(WIDTH)
        self.first, self.last = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, FEATURES)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), Mlp(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) + self.time(t)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


class ConvResidual(nn.Module):
    """ResNet's block (He et al., arXiv 1512.03385), with the timestep added between its convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(WIDTH, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x))) + self.time(c)[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(inner)))


class ResNet(nn.Module):
    """A convolutional denoiser with residual blocks and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.classes = TimeEmbed(WIDTH), nn.Embedding(CLASSES, WIDTH)
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.blocks = nn.ModuleList(ConvResidual(16) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.first(x), self.time(t) + self.classes(y)
        for block in self.blocks:
            x = block(x, c)
        return self.last(x)


class ConvUNet(nn.Module):
    """A U-Net (Ronneberger et al., arXiv 1505.04597) of plain convolutions: concatenated skips, no residual joins."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.classes = TimeEmbed(WIDTH), nn.Embedding(CLASSES, WIDTH)
        self.shift = nn.Linear(WIDTH, 32)
        self.down1, self.down2 = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.last = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        outer = F.silu(self.down1(x))
        inner = F.silu(self.down2(outer)) + self.shift(self.time(t) + self.classes(y))[:, :, None, None]
        inner = F.silu(self.middle(inner))
        return self.last(torch.cat([F.silu(self.up(inner)), outer], dim=1))


class NoResidual(ImageFrame):
    """Attention and MLPs one after another: there is no stream to which a reused output could be added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(FusedAttention(WIDTH, HEADS), nn.LayerNorm(WIDTH), Mlp(WIDTH)) for _ in range(2))
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        return self.leave(self.layers(tokens), c)


def vector_inputs(batch: int, step: int) -> dict[str, Any]:
    """Noisy vectors and the timestep."""
    return {"x": moving(batch, step, FEATURES), "t": countdown(batch, step)}


def _negative(
    name: str, cls: type[nn.Module], note: str, inputs: Callable[[int, int], dict[str, Any]] = image_inputs
) -> Specimen:
    return Specimen(name, "style", built(cls), inputs, attention=0, mlp=0, sites=lambda model: [], note=note)


NOT_DITS: list[Specimen] = [
    _negative("plain-mlp", PlainMlp, "neither tokens nor residual joins", vector_inputs),
    _negative("residual-mlp", ResidualMlp, "residual joins of vectors, no tokens", vector_inputs),
    _negative("resnet", ResNet, "residual joins around convolutions, no attention anywhere"),
    _negative("conv-unet", ConvUNet, "skips are concatenations"),
    _negative("no-residual", NoResidual, "attention without residual joins"),
]
