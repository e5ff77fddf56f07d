"""Stage 4, train."""

from __future__ import annotations

import torch

from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler
from .freeze import freeze
from .paper import train_paper
from .trainer import TrainReport, train_gates


def learn(lazy: LazyModel, sampler: Sampler, recipe: Recipe, *, progress: bool = True) -> TrainReport:
    """Learn gates by the method that the recipe names, and freeze them if its schedule is static; see `train_gates`."""
    method = train_paper if recipe.train.method == "paper" else train_gates
    # Whoever calls may have switched gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        report = method(lazy, sampler, recipe, progress=progress)
        if recipe.schedule == "static" and not int(lazy.gates.static):
            report = freeze(lazy, sampler, recipe, report)
    return report


__all__ = ["TrainReport", "freeze", "learn", "train_gates", "train_paper"]
