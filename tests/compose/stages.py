"""What stages are tried on: two lazy blocks, a sampler of them, and how their weights are stored in four bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lazycompress.integrations.digits.model import digits_sampler, draw_noise
from lazycompress.recipe import Weights
from lazycompress.runtime import LazyModel, wrap
from tests.conftest import make_lively_gates, two_blocks

#: Two blocks, each with q, k, v, out and two layers of an MLP; each branch has a body for all samples and one for some.
LAYERS, BODIES, GATES = 12, 2, 4

INT4 = Weights(mode="int4_sym", group_size=64, ratio=1.0, all_layers=True)


def sampler(model: Any) -> Tensor:
    noise = draw_noise(4, int(torch.randint(0, 10**6, (1,))))
    return digits_sampler(noise, torch.arange(4), 12)(model)


def make(model: nn.Module | None = None) -> LazyModel:
    inputs = {
        "hidden_states": draw_noise(2),
        "timestep": torch.tensor([980, 980]),
        "class_labels": torch.tensor([1, 2]),
    }
    return wrap(model or two_blocks(), (), inputs, make_lively_gates)


def never(model: Any) -> Tensor:
    raise AssertionError("the sampler ran")
