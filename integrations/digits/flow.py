"""The second bundled model, unlike the first wherever it can be: rectified flow, rotary embeddings, RMSNorm and SwiGLU.

Blocks are those of LLaMA (arXiv 2302.13971) with two-dimensional rotary embeddings; one modulation is computed for all
blocks, which add a table of their own (PixArt, arXiv 2310.00426). The model predicts the velocity of a rectified flow (arXiv
2209.03003), and is sampled with Euler's method from noise (sigma 1) to image (sigma 0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .data import IMAGE_SIZE
from .model import NULL_CLASS, Sampler

WEIGHTS_FILE = Path(__file__).parent / "weights" / "flow.safetensors"

WIDTH, HEADS, DEPTH, HIDDEN, PATCH = 96, 4, 6, 256, 2
_TIME_FEATURES = 64


class FlowDiT(nn.Module):
    """Velocity of noisy digits: float [B, 1, 8, 8], timestep [B] (1000 is pure noise), class_labels int64 [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(NULL_CLASS + 1, WIDTH)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.blocks = nn.ModuleList([_Block() for _ in range(DEPTH)])
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, PATCH * PATCH)
        for zeroed in (self.modulation, self.head):
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)
        cosine, sine = _rotations()
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        x = self.patch(hidden_states).flatten(2).transpose(1, 2)
        frequencies = torch.exp(torch.arange(_TIME_FEATURES // 2, device=x.device) * (-9.2103 / (_TIME_FEATURES // 2)))
        angles = timestep.float().unsqueeze(1) * frequencies
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)) + self.label(class_labels)
        shared = self.modulation(F.silu(c)).unflatten(1, (6, WIDTH))
        for block in self.blocks:
            x = block(x, shared, self.cosine, self.sine)
        size = IMAGE_SIZE // PATCH
        out: Tensor = self.head(self.norm(x)).unflatten(1, (size, size)).unflatten(3, (PATCH, PATCH))
        return out.permute(0, 1, 3, 2, 4).reshape(x.shape[0], 1, IMAGE_SIZE, IMAGE_SIZE)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, WIDTH))
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, shared: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (shared + self.table).unsqueeze(2).unbind(1)
        z = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(z).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = _rotate(self.q_norm(q), cosine, sine), _rotate(self.k_norm(k), cosine, sine)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.out(attended)
        z = self.norm2(x) * (1 + scale2) + shift2
        gate, up = self.gate_up(z).chunk(2, dim=-1)
        out: Tensor = x + gate2 * self.down(F.silu(gate) * up)
        return out


def _rotations() -> tuple[Tensor, Tensor]:
    """Cosine and sine per token and channel of a head, [tokens, channels]: half of the channels for each axis."""
    size, channels = IMAGE_SIZE // PATCH, WIDTH // HEADS
    frequencies = 1.0 / 100.0 ** (torch.arange(0, channels // 2, 2) / (channels // 2))
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angles = torch.cat([p.reshape(-1, 1) * frequencies for p in (rows, columns)], dim=1)
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def _rotate(value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = value.chunk(2, dim=-1)
    return value * cosine + torch.cat([-second, first], dim=-1) * sine


def flow_sampler(noise: Tensor, labels: Tensor, steps: int = 50) -> Sampler:
    """A callable that integrates the flow from `noise` [N, 1, 8, 8] with Euler's method and returns the images."""

    def sampler(model: Any) -> Tensor:
        scheduler = cast(Any, FlowMatchEulerDiscreteScheduler)()
        scheduler.set_timesteps(steps, device=noise.device)
        x = noise
        for t in scheduler.timesteps:
            velocity = model(hidden_states=x, timestep=t.repeat(len(x)), class_labels=labels)
            velocity = velocity if isinstance(velocity, Tensor) else velocity[0]
            x = scheduler.step(velocity, t, x).prev_sample
        return x

    return sampler


def flow_loss(model: nn.Module, images: Tensor, labels: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity at `sigma` [B] in (0, 1): a scalar."""
    s = sigma.reshape(-1, 1, 1, 1)
    predicted = model((1 - s) * images + s * noise, 1000 * sigma, labels)
    return F.mse_loss(predicted, noise - images)


def save_flow(model: nn.Module, path: Path) -> None:
    """Write the weights in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}, path)


def load_flow(path: Path = WEIGHTS_FILE, dtype: torch.dtype = torch.float32) -> FlowDiT:
    """The bundled model, in evaluation mode, on the CPU: stored in float16, cast to `dtype`."""
    model = FlowDiT()
    model.load_state_dict(load_file(path))
    return model.to(dtype).eval()
