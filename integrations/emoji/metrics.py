"""How good pictures are: do they find their prompt, how far from real ones are they, how far from dense ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import CLIPTokenizer

from ..digits.metrics import frechet_distance
from .judge import Judge
from .model import tokenize

__all__ = ["frechet_distance", "picture_features", "psnr", "recall_at"]


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise ratio of each pair of images, in dB: ``[N, C, H, W]`` in ``0..1`` twice -> float32 ``[N]``.

    Infinite where the two are equal.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"Images of the same shape are needed, got {list(a.shape)} and {list(b.shape)}.")
    return -10 * (a.float() - b.float()).square().flatten(1).mean(1).log10()


@torch.no_grad()
def picture_features(judge: Judge, images: torch.Tensor) -> torch.Tensor:
    """The judge's features of images ``[N, 3, 32, 32]`` in ``0..1``: float64 ``[N, 128]``."""
    return torch.cat([judge.features(part.float() * 2 - 1) for part in torch.split(images, 256)]).double()


@torch.no_grad()
def recall_at(
    k: int,
    judge: Judge,
    tokenizer: CLIPTokenizer,
    images: torch.Tensor,
    prompts: Sequence[str],
    candidates: Sequence[str],
) -> float:
    """The share of images whose own prompt is among the ``k`` of ``candidates`` that the judge finds closest.

    Args:
        images: ``[N, 3, 32, 32]`` in ``0..1``.
        prompts: the prompt of each image.
        candidates: all prompts that may be found, without repetition, the images' own among them.

    Raises:
        ValueError: a prompt is not among the candidates, or the numbers of images and prompts differ.
    """
    if len(images) != len(prompts):
        raise ValueError(f"Each image needs its prompt, got {len(images)} images and {len(prompts)} prompts.")
    place = {prompt: index for index, prompt in enumerate(candidates)}
    missing = next((prompt for prompt in prompts if prompt not in place), None)
    if missing is not None:
        raise ValueError(f"The prompt {missing!r} is not among the {len(candidates)} candidates.")
    own = torch.tensor([place[prompt] for prompt in prompts]).unsqueeze(1)
    cosines = torch.cat(
        [judge(part.float() * 2 - 1, tokenize(tokenizer, candidates)) for part in torch.split(images, 256)]
    )
    return (cosines.topk(min(k, len(candidates))).indices == own).any(1).double().mean().item()
