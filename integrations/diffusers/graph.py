"""Pipelines whose denoisers run as lazy graphs: for plans with branches, and for files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...api import make_lazy
from ...eager import eager
from ...errors import InputError
from ...lazy.attach import uncompiled
from ...recipe import Recipe
from ...runtime import LazyModel
from ...sampling import Sampler
from ...scopes import Scope
from ...storage import save as save_gates
from .sampling import Arguments, learning_sampler
from .scopes import PipelineCalls

#: Folder of the gates inside the folder of a saved denoiser.
GATES_FOLDER = "lazy"


class LazyDenoiser(LazyModel):
    """A lazy model that pipelines save, move and ask for its config, as they do with the dense one.

    `save_pretrained` writes the dense model, and the gates into `lazy/` beside it: the folder loads in diffusers without
    this package, and `lazycompress.load(pipe, folder)` makes it lazy again.
    """

    #: Calls a step, as seen while learning; more than one is guidance in calls that take turns.
    turns: int = 1

    @property
    def stood_there(self) -> nn.Module:
        """What the pipeline had in its place: the model, or what compiled it."""
        found: nn.Module = vars(self).get("_stood_there", self.model)
        return found

    def take_the_place_of(self, part: nn.Module) -> None:
        """Remember what the pipeline is to be given back; it is no part of this module."""
        vars(self)["_stood_there"] = part

    #: Finds the call of a pipeline that calls.
    _calls = PipelineCalls()

    @eager
    def _scope(self) -> Scope | None:
        return super()._scope() or self._calls(self)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        saved: Any = self.model
        saved.save_pretrained(
            save_directory, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size, **options
        )  # fmt: skip
        save_gates(self, Path(save_directory) / GATES_FOLDER, overwrite=True)

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Any:
        raise InputError("load the pipeline with diffusers, then call lazycompress.load(pipe, folder)")


def make_denoisers(
    pipeline: Any,
    recipe: Recipe,
    calls: Mapping[str, Mapping[str, Any]],
    arguments: Arguments,
    sampler: Sampler | None,
    progress: bool,
) -> dict[str, LazyDenoiser]:
    """Capture and learn each denoiser of a pipeline, and put it in the place of the dense one.

    Args:
        calls: arguments of one call of each.

    Raises:
        LazyCompressError: a denoiser cannot be captured, located or trained; the pipeline is as it was.
    """
    made: dict[str, LazyDenoiser] = {}
    hooks: list[Any] = []
    try:
        for name, inputs in calls.items():
            part = getattr(pipeline, name)
            sample = sampler or learning_sampler(pipeline, name, arguments)
            contexts: set[int] = set()

            def make(
                *given: Any, name: str = name, part: Any = part, contexts: set[int] = contexts, **options: Any
            ) -> LazyDenoiser:
                made[name] = LazyDenoiser(*given, **options)
                made[name].take_the_place_of(part)
                hooks.append(made[name].register_forward_hook(lambda module, *_: contexts.add(module.context)))
                return made[name]

            own = recipe.checkpoint_of(name) if len(calls) > 1 else recipe
            lazy = make_lazy(uncompiled(part), inputs, own, sample, make=make, progress=progress)
            for hook in hooks:
                hook.remove()
            hooks.clear()
            made[name].turns = max(1, len(contexts))
            register(pipeline, name, lazy)
    except BaseException:
        for name, lazy in made.items():
            register(pipeline, name, lazy.stood_there)
        raise
    return made


def register(pipeline: Any, name: str, module: nn.Module) -> None:
    """Give a pipeline another part, as it does itself."""
    pipeline.register_modules(**{name: module})
