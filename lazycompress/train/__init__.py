"""Stage 4, train."""

from __future__ import annotations

import torch

from ..errors import InputError
from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler
from .freeze import freeze
from .paper import train_paper
from .trainer import TrainReport, train_gates


def learn(lazy: LazyModel, sampler: Sampler, recipe: Recipe, *, progress: bool = True) -> TrainReport:
    """Learn gates by the method that the recipe names, and freeze them if its schedule is static; see `train_gates`.

    Raises:
        InputError: gradients cannot go through the model; or as `train_gates`.
    """
    made_inside = next((name for name, weight in lazy.model.named_parameters() if weight.is_inference()), None)
    if made_inside is not None:
        raise InputError(
            f"{made_inside} of {type(lazy.model).__name__} was made under torch.inference_mode(), and branches are learned with "
            "gradients, which it does not take: make the model outside of that, or take units: calls"
        )
    method = train_paper if recipe.train.method == "paper" else train_gates
    # Whoever calls may have switched gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        report = method(lazy, sampler, recipe, progress=progress)
        if recipe.schedule == "static" and not int(lazy.gates.static):
            report = freeze(lazy, sampler, recipe, report)
    return report


__all__ = ["TrainReport", "freeze", "learn", "train_gates", "train_paper"]
