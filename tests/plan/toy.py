"""A model for which the theory of plans is exact: each call gives a smooth function of time, and pulls towards a point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lazycompress.sampling import Sampler

SIZE = 12


class Toy(nn.Module):
    """Velocity of x at t: a curve in time, different for each image, and `pull` times x. Affine, so that errors add up."""

    def __init__(self, pull: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
        self.pull = pull

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        phase = t.reshape(-1, 1)
        curve = torch.sin(3 * phase) * (label @ self.first) + torch.exp(-4 * phase) * (label @ self.second)
        return curve + self.pull * x


def euler(steps: int = 20, images: int = 4, scale: float = 1.0) -> Sampler:
    """Euler's method from t = 1 to 0; `scale` of guidance: 1 is one call a step, others are two."""

    def sampler(model: Any) -> Tensor:
        x = torch.randn(images, SIZE, dtype=torch.float64)
        label = torch.randn(images, SIZE, dtype=torch.float64)
        for k in range(steps):
            t = torch.full((images,), 1 - k / steps, dtype=torch.float64)
            velocity = model(x, t, label)
            if scale != 1.0:
                other = model(x, t, torch.zeros_like(label))
                velocity = other + scale * (velocity - other)
            x = x - velocity / steps
        return x

    return sampler


def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    return float(args[1][0])
