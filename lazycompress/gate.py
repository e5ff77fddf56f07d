"""Gates: when a branch may reuse its last output. The one definition that torch, ONNX and OpenVINO all run.

For branch i, sample b, timestep t, and Z the branch's input after norm and modulation:

    logit(b)  = mean over tokens of Z[b] . w_i(t) + c_i(t)
    score(b)  = sigmoid(logit(b))                       in [0, 1], higher is lazier
    lazy(b)   = valid(b) and score(b) > threshold
    Y[b]      = cache[b] if lazy(b) else F(Z)[b];  cache <- Y

`w_i(t)` and `c_i(t)` are tables over a grid of timesteps, interpolated linearly and held constant beyond its ends: at the
grid's own points this is one gate per sampling step, as in LazyDiT (arXiv 2412.12444); the mean and the bias are ours.
`valid(b)` is false where sample b starts a new image: the timestep is not strictly past the last one, or what the model is
conditioned on has changed.

The functions below are also operators (`torch.ops.lazycompress.*`), so that graph passes, quantization among them, see
one opaque node where a gate is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: A past timestep that every timestep fails to be past of, times the direction.
NEVER = 3.0e38


def enter(stream: Tensor, branch: int, position: int) -> Tensor:
    """Mark `stream` as the entry number `position` of a branch; the value itself, unchanged."""
    return stream


def timestep_per_sample(timestep: Tensor, latents: Tensor) -> Tensor:
    """Timesteps as float32 [batch], from a scalar, [1], [batch] or per-token [batch, tokens] tensor (its largest)."""
    value = timestep.to(torch.float32)
    if value.dim() > 1:
        value = value.flatten(1).amax(dim=1)
    return value.reshape(-1).expand(latents.shape[0])


def fingerprint(conditions: Sequence[Tensor], latents: Tensor) -> Tensor:
    """Two numbers per sample and condition, float32 [batch, 2 * conditions]: a change of prompt or label changes them."""
    rows = []
    for condition in conditions:
        flat = condition.to(torch.float32).reshape(condition.shape[0], -1)
        ramp = torch.arange(flat.shape[1], dtype=torch.float32, device=flat.device) * 0.61803398875
        rows += [flat.mean(dim=1), (flat * (ramp - ramp.floor())).mean(dim=1)]
    if not rows:
        return latents.new_zeros((latents.shape[0], 1), dtype=torch.float32)
    return torch.stack(rows, dim=1)


def valid(timestep: Tensor, past_timestep: Tensor, prints: Tensor, past_prints: Tensor, direction: Tensor) -> Tensor:
    """Which samples go on with the image of the last call, bool [batch]. `direction` is 1 for descending timesteps.

    The past may have another batch size (the state of an exported model): then no sample goes on.
    """
    counts = torch.ones_like(past_timestep).sum() == torch.ones_like(timestep).sum()
    rows = torch.arange(timestep.shape[0], device=timestep.device).clamp(max=past_timestep.shape[0] - 1)
    onward = (past_timestep.index_select(0, rows) - timestep) * direction > 0
    unchanged = (prints == past_prints.index_select(0, rows)).all(dim=1)
    return counts & onward & unchanged


def hat(timestep: Tensor, grid: Tensor) -> Tensor:
    """Weights of linear interpolation, [batch, grid]: timesteps [batch], ascending grid [grid]; exact at grid points."""
    if grid.shape[0] == 1:
        return torch.ones_like(timestep).unsqueeze(1)
    inside = torch.minimum(torch.maximum(timestep, grid[:1]), grid[-1:]).unsqueeze(1)
    gaps = grid[1:] - grid[:-1]
    rising = torch.cat([torch.ones_like(inside), (inside - grid[:-1]) / gaps], dim=1)
    falling = torch.cat([(grid[1:] - inside) / gaps, torch.ones_like(inside)], dim=1)
    return torch.minimum(rising, falling).clamp(0.0, 1.0)


def score(streams: Sequence[Tensor], channel_dims: Sequence[int], hats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gate's score, float32 [batch].

    Args:
        streams: the branch's inputs Z, each [batch * k, ..., channels, ...].
        channel_dims: which dimension of each holds the channels.
        hats: [batch, grid]. weight: [grid, channels of all streams]. bias: [grid].
    """
    pooled = []
    for stream, dim in zip(streams, channel_dims, strict=True):
        values = stream.to(torch.float32)
        channels = values.shape[dim]
        if dim != values.dim() - 1:
            values = values.flatten(dim + 1).mean(dim=-1)
        pooled.append(values.reshape(hats.shape[0], -1, channels).mean(dim=1))
    features = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
    logit = (features * (hats @ weight)).sum(dim=1) + (hats * bias).sum(dim=1)
    return torch.sigmoid(logit)


def decide(score: Tensor, valid: Tensor, threshold: Tensor) -> Tensor:
    """Which samples reuse, bool [batch]."""
    return valid & (score > threshold)


def select(fresh: Tensor, cache: Tensor, lazy: Tensor) -> Tensor:
    """`cache` where lazy, else `fresh`; both [batch * k, ...], lazy [batch]."""
    rows = fresh.reshape(lazy.shape[0], -1)
    return torch.where(lazy.unsqueeze(1), cache.reshape(rows.shape), rows).reshape(fresh.shape)


_library: Any = torch.library.Library("lazycompress", "DEF")  # type: ignore[no-untyped-call]
for _function, _schema in (
    (enter, "(Tensor stream, int branch, int position) -> Tensor"),
    (timestep_per_sample, "(Tensor timestep, Tensor latents) -> Tensor"),
    (fingerprint, "(Tensor[] conditions, Tensor latents) -> Tensor"),
    (valid, "(Tensor timestep, Tensor past_timestep, Tensor prints, Tensor past_prints, Tensor direction) -> Tensor"),
    (hat, "(Tensor timestep, Tensor grid) -> Tensor"),
    (score, "(Tensor[] streams, int[] channel_dims, Tensor hats, Tensor weight, Tensor bias) -> Tensor"),
    (decide, "(Tensor score, Tensor valid, Tensor threshold) -> Tensor"),
    (select, "(Tensor fresh, Tensor cache, Tensor lazy) -> Tensor"),
):
    _library.define(f"{_function.__name__}{_schema}")
    _library.impl(_function.__name__, _function, "CompositeImplicitAutograd")


class Gates(nn.Module):
    """The trained part of a lazy model: one linear gate per branch and grid timestep.

    Attributes:
        grid: ascending timesteps, float32 [grid].
        weights: per branch, float32 [grid, channels].
        bias: float32 [branches, grid]; large and negative means that the branch always computes there.
        threshold: scalar; a branch reuses where its score is above.
        direction: 1 where timesteps fall while sampling, -1 where they rise.
    """

    grid: Tensor
    threshold: Tensor
    direction: Tensor

    def __init__(self, names: Sequence[str], widths: Sequence[int], grid: Tensor, direction: int = 1) -> None:
        super().__init__()
        self.names = list(names)
        self.register_buffer("grid", grid.to(torch.float32).sort().values)
        self.register_buffer("threshold", torch.tensor(0.5))
        self.register_buffer("direction", torch.tensor(float(direction)))
        size = self.grid.shape[0]
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(size, width)) for width in widths])
        # An untrained gate computes: sigmoid(-4) = 0.018.
        self.bias = nn.Parameter(torch.full((len(self.names), size), -4.0))

    @property
    def never(self) -> float:
        """The past timestep of a sample that has none: no timestep is past it."""
        return -NEVER * float(self.direction)
