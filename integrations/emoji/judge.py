"""A small picture encoder and a small word encoder that agree (CLIP, Radford et al. 2021, arXiv 2103.00020): they judge.

Trained on all pictures, held-out combinations too, since it only measures. It shares nothing with the pipeline but the
tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

JUDGE_FILE = "judge.safetensors"
FEATURE_DIM = 128
_TEMPERATURE = 0.05


class Judge(nn.Module):
    """Picture and prompt, each to a point on the sphere of 128 dimensions; a pair that belongs together is close."""

    def __init__(self, vocabulary: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.words = nn.Embedding(vocabulary, FEATURE_DIM)
        self.prompt_head = nn.Sequential(
            nn.Linear(FEATURE_DIM, 2 * FEATURE_DIM), nn.GELU(), nn.Linear(2 * FEATURE_DIM, FEATURE_DIM)
        )
        self.picture = nn.Sequential(
            nn.Conv2d(3, 48, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 96, 4, stride=2, padding=1),
            nn.GroupNorm(8, 96),
            nn.GELU(),
            nn.Conv2d(96, 192, 4, stride=2, padding=1),
            nn.GroupNorm(8, 192),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(192 * 16, FEATURE_DIM),
        )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``[N, 3, 32, 32]`` in ``-1..1`` -> ``[N, 128]``, not on the sphere: the Frechet distance's space."""
        return cast(torch.Tensor, self.picture(images))

    def embed_prompts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 ``[N, L]`` -> ``[N, 128]`` on the sphere; the order of the words does not matter."""
        real = (tokens != self.padding).unsqueeze(-1)
        mean = (self.words(tokens) * real).sum(1) / real.sum(1)
        return F.normalize(self.prompt_head(mean), dim=-1)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Cosines of every picture with every prompt: ``[N, 3, 32, 32]``, ``[M, L]`` -> ``[N, M]``."""
        return F.normalize(self.features(images), dim=-1) @ self.embed_prompts(tokens).T


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Small moves and zooms, a little noise, brightness: what a good sample may differ by from its picture."""
    n = len(images)
    zoom = 1 + 0.15 * (2 * torch.rand(n, generator=generator) - 1)
    move = 0.15 * (2 * torch.rand(n, 2, generator=generator) - 1)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = zoom
    affine[:, :, 2] = move
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1  # outside is white
    brightness = 0.1 * torch.randn(n, 3, 1, 1, generator=generator)
    return (
        moved
        + brightness
        + 0.1 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    )


def judge_loss(
    judge: nn.Module, images: torch.Tensor, targets: torch.Tensor, prompts: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Cross-entropy of the right prompt among all: images ``[N, 3, 32, 32]``, rows of ``prompts`` ``[N]`` -> scalar."""
    device = prompts.device
    return F.cross_entropy(judge(augment(images, generator).to(device), prompts) / _TEMPERATURE, targets.to(device))


def save_judge(judge: Judge, folder: Path) -> None:
    """Writes the weights in half precision into ``folder``."""
    save_file({name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}, folder / JUDGE_FILE)


def load_judge(folder: Path, padding: int) -> Judge:
    """The judge in ``folder``: float32, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: ``folder`` holds none.
    """
    state = {name: tensor.float() for name, tensor in load_file(folder / JUDGE_FILE).items()}
    judge = Judge(len(state["words.weight"]), padding)
    judge.load_state_dict(state)
    return judge.eval()
