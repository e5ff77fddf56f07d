"""Torch's generators of random numbers, on all devices, lent for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_noise() -> Iterator[None]:
    """The global generators of the CPU and of every accelerator are at the end of the block as they were before."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        with torch.random.fork_rng(devices=[]):
            yield
        return
    with torch.random.fork_rng(devices=range(torch.accelerator.device_count()), device_type=accelerator.type):
        yield
