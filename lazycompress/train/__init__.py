"""Stage 4, train."""

from __future__ import annotations

from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler
from .paper import train_paper
from .trainer import TrainReport, train_gates


def learn(lazy: LazyModel, sampler: Sampler, recipe: Recipe, *, progress: bool = True) -> TrainReport:
    """Learn gates by the method that the recipe names; see `train_gates`."""
    method = train_paper if recipe.train.method == "paper" else train_gates
    return method(lazy, sampler, recipe, progress=progress)


__all__ = ["TrainReport", "learn", "train_gates", "train_paper"]
