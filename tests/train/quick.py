"""Trainings that take seconds, and gates that are to be alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lazycompress
from lazycompress.runtime import LazyModel

QUICK = {"units": "branches", "train.effort": 0.25, "sampling.steps": 8, "sampling.batch": 4}
PAPER = {**QUICK, "train.method": "paper", "forecast": 0, "train.effort": 0.06}


def learn(digits: nn.Module, overrides: dict[str, Any]) -> LazyModel:
    lazy: LazyModel = lazycompress.apply(digits, "digits_dit.yaml", overrides=overrides, progress=False)
    return lazy


def same_gates(a: LazyModel, b: LazyModel, atol: float = 0.0) -> None:
    one, other = a.gates.state_dict(), b.gates.state_dict()
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=name)
