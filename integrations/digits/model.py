"""The digits Diffusion Transformer (a small DiT, Peebles & Xie 2022, arXiv 2212.09748) and a sampling loop for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from .data import IMAGE_SIZE, NUM_CLASSES

WEIGHTS_DIR = Path(__file__).parent / "weights"
NULL_CLASS = NUM_CLASSES
"""The label that means "no label", for classifier-free guidance; diffusers appends it to the embedding table."""

# Names that diffusers itself uses, so that DiTTransformer2DModel.from_pretrained reads the folder too.
_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

MODEL_CONFIG: Mapping[str, Any] = {
    "sample_size": IMAGE_SIZE,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 6,
    "num_embeds_ada_norm": NUM_CLASSES,
    "norm_type": "ada_norm_zero",
}

# What the published DiT checkpoints use. No clipping: it would cut gradients that run back through the trajectory.
SCHEDULER_CONFIG: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}

Sampler = Callable[[Any], torch.Tensor]
"""Runs one whole denoising loop: model -> images ``[N, 1, 8, 8]``."""


def build_model() -> nn.Module:
    """A new float32 model in training mode, initialised so that each block starts as the identity.

    diffusers leaves torch's default initialisation in place; DiT's own (adaLN-Zero, section 3.2 of the paper) zeroes
    the modulation and the output projection.
    """
    dit_class: Any = DiTTransformer2DModel  # diffusers is untyped
    model = dit_class(**MODEL_CONFIG)
    modulations = [block.norm1.linear for block in model.transformer_blocks]
    for linear in (*modulations, model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return cast(nn.Module, model.train())


def save_model(model: nn.Module, directory: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes ``config.json`` and the weights, cast to ``dtype``, into ``directory``, replacing older ones."""
    directory.mkdir(parents=True, exist_ok=True)
    cast(Any, model).save_config(directory)
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    partial = directory / (_WEIGHTS_FILE + ".partial")  # a reader never sees half a file
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(directory / _WEIGHTS_FILE)


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model written by :func:`save_model`, in evaluation mode, on the CPU, with its weights in ``dtype``.

    Raises:
        FileNotFoundError: ``directory`` lacks the config or the weights.
        RuntimeError: the weights do not fit the config.
    """
    config = json.loads((directory / _CONFIG_FILE).read_text(encoding="utf-8"))
    dit_class: Any = DiTTransformer2DModel
    model: nn.Module = dit_class.from_config(config)
    model.load_state_dict(load_file(directory / _WEIGHTS_FILE))
    # diffusers' own .to() warns about modules that need float32, of which a DiT has none.
    nn.Module.to(model, dtype)
    return model.eval()


def load_bundled(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The bundled trained model, in evaluation mode, on the CPU: stored in float16, cast to ``dtype``."""
    return load_model(WEIGHTS_DIR, dtype)


def build_scheduler(
    scheduler_class: type[Any] = DDIMScheduler, scheduler_config: Mapping[str, Any] = SCHEDULER_CONFIG
) -> Any:
    """A new diffusers scheduler, by default the DDIM (Song et al. 2021, arXiv 2010.02502) of the bundled model."""
    return scheduler_class.from_config(dict(scheduler_config))


def draw_noise(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``n`` starting points of a denoising loop: standard normal ``[n, 1, 8, 8]``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, MODEL_CONFIG["in_channels"], IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype)


def cycle_labels(n: int) -> torch.Tensor:
    """``n`` labels 0, 1, .. 9, 0, 1, ..: int64 ``[n]``."""
    return torch.arange(n) % NUM_CLASSES


def digits_sampler(
    noise: torch.Tensor,
    labels: torch.Tensor,
    steps: int = 50,
    scheduler_class: type[Any] = DDIMScheduler,
    scheduler_config: Mapping[str, Any] = SCHEDULER_CONFIG,
) -> Sampler:
    """A callable that runs one whole denoising loop from ``noise`` with the model it is given, and returns the images.

    Each step calls ``model(hidden_states=x, timestep=t, class_labels=labels).sample``, with ``t`` of shape ``[N]``. The
    loop neither disables gradients nor works in place, so a gradient of the images reaches the model through every
    step. Every call builds a new scheduler: multi-step schedulers remember earlier steps, and two runs must not share
    that memory.

    Args:
        noise: ``[N, 1, 8, 8]``, in the model's dtype and on its device; see :func:`draw_noise`.
        labels: int64 ``[N]``, ``0..9`` or :data:`NULL_CLASS`.
        steps: number of model calls (some schedulers, such as Heun's, call more often).
        scheduler_class: any diffusers scheduler that takes epsilon predictions.
        scheduler_config: its settings; see :func:`build_scheduler`.

    Returns:
        ``sampler(model) -> images``: ``[N, 1, 8, 8]`` in the noise's dtype, not clamped.

    Raises:
        ValueError: ``noise`` and ``labels`` differ in length, or have wrong shapes.
    """
    if noise.ndim != 4 or labels.shape != noise.shape[:1]:
        raise ValueError(
            f"Expected noise [N, C, H, W] and labels [N], got {list(noise.shape)} and {list(labels.shape)}."
        )

    def sampler(model: Any) -> torch.Tensor:
        scheduler = build_scheduler(scheduler_class, scheduler_config)
        scheduler.set_timesteps(steps, device=noise.device)
        x: torch.Tensor = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            # repeat, not expand: a stride of 0 is a layout that an exported model never saw
            prediction = model(
                hidden_states=scheduler.scale_model_input(x, t), timestep=t.repeat(len(x)), class_labels=labels
            ).sample
            x = scheduler.step(prediction, t, x).prev_sample
        return x

    return sampler
