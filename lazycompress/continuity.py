"""Do a call's latents go on with an image? Samplers make them of the last latents and outputs, and other images are elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Latents go on with an image if its last latents and outputs explain all of them but this share of their norm. Samplers of
#: ODEs leave less than a hundredth, other images of the same prompt far more: seldom less than a fifth, most often one.
UNEXPLAINED = 0.1

#: Latents with equal prints but for this share of their norm are the same: guidance calls a model with them twice.
EQUAL = 1e-5

#: Latents of fewer numbers than this for each vector that explains them prove nothing.
FEWEST = 8


def unexplained(latents: Tensor, before: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Norm of what of `latents` is outside of the span of `before` and `outputs`, as a share of its own; float32 scalar.

    Models that are given more than they predict (an image beside the noise, say) have it behind: what counts is the part that
    all have. By Gram-Schmidt.
    """
    alike = [output for output in outputs if output.dim() == latents.dim() and output.device == latents.device]
    sizes = [min(t.shape[d] for t in (latents, *alike)) for d in range(latents.dim())]
    common = tuple(slice(0, size) for size in sizes)
    target = latents[common].to(torch.float32).flatten()
    basis: list[Tensor] = []
    for vector in [before, *alike][: max(1, target.numel() // FEWEST)]:
        flat = vector[common].to(torch.float32).flatten()
        norm = torch.linalg.vector_norm(flat)
        for known in basis:
            flat = flat - torch.dot(known, flat) * known
        # What is left of a vector that the others explain is rounding; it is no direction.
        length = torch.linalg.vector_norm(flat)
        basis.append(torch.where(length > 1e-4 * norm, flat / length.clamp(min=1e-30), torch.zeros_like(flat)))
    rest = target
    for known in basis:
        rest = rest - torch.dot(known, rest) * known
    left: Tensor = torch.linalg.vector_norm(rest) / torch.linalg.vector_norm(target).clamp(min=1e-30)
    return left
