"""A gate: looks at how loud each channel is, over the tokens, where the package's own looks at its mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def score(
    streams: Sequence[Tensor],
    channel_dims: Sequence[int],
    hats: Tensor,
    weight: Tensor,
    bias: Tensor,
    elapsed: Tensor,
    slope: Tensor,
) -> Tensor:
    loud = []
    for stream, dim in zip(streams, channel_dims, strict=True):
        values = stream.float().movedim(dim, -1).square()
        loud.append(values.reshape(hats.shape[0], -1, values.shape[-1]).mean(dim=1).add(1e-6).sqrt())
    features = torch.cat(loud, dim=1)
    logit = (features * (hats @ weight)).sum(dim=1) + (hats * bias).sum(dim=1) - slope * elapsed.log()
    return torch.sigmoid(logit)
