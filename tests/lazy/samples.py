"""Pipelines made lazy without learning, and what they sample."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

import lazycompress
from lazycompress.integrations.diffusers import lazy_denoisers
from lazycompress.lazy.attach import Handle

from .models import Even

STEPS = 8


def sample(pipe: Any, call: dict[str, Any], steps: int = STEPS, seed: int = 0, **more: Any) -> Tensor:
    torch.manual_seed(seed)
    kind = {} if isinstance(pipe, diffusers.DiTPipeline) else {"output_type": "latent"}
    output = pipe(**{**call, "num_inference_steps": steps, **kind, **more})[0]
    return torch.as_tensor(output).detach() if isinstance(output, Tensor) else torch.stack([_pixels(i) for i in output])


def _pixels(image: Any) -> Tensor:
    return torch.tensor(list(image.getdata()), dtype=torch.float32)


def learn(pipe: Any, call: dict[str, Any]) -> Handle:
    """The pipeline made lazy; learning takes time, and so its plans are even ones that compute half."""
    call = {**call, "num_inference_steps": STEPS}
    lazycompress.apply(pipe, {"train": {"enabled": False}}, call_kwargs=call, progress=False)
    for handle in lazy_denoisers(pipe).values():
        assert isinstance(handle, Handle)
        handle.engine.planner = Even(handle.plan.timesteps, handle.plan.streams)
        handle.set_target(0.5)
    found = lazy_denoisers(pipe)["transformer"]
    assert isinstance(found, Handle)
    return found
