"""Memory of a sampling run with gradients: how much it will take, how much there is, and what makes it less."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..free_memory import available, size_of
from ..graph.lower import lazy_branches
from ..graph.untouched import untouched
from ..noise import own_noise
from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Enough, Sampler
from .distributed import Group

#: Of what is free, this share may be planned for: the estimate leaves out what is small, and others need memory, too.
SHARE = 0.9


@contextmanager
def training_mode(lazy: LazyModel, recipe: Recipe) -> Iterator[None]:
    """Within the block the runs with gradients take the memory and the precision that the recipe's training section says."""
    with (
        recomputed(lazy) if recipe.train.checkpointing else nullcontext(),
        autocast(lazy, torch.bfloat16) if recipe.train.precision == "bfloat16" else nullcontext(),
    ):
        yield


@contextmanager
def autocast(lazy: LazyModel, dtype: torch.dtype) -> Iterator[None]:
    """Within the block, the lazy model's heavy operations run in `dtype`; the model itself is left as it is.

    Matrices of weights are cast once. Autocast alone would cast, and keep, every frozen weight anew at every call.
    """
    cast: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    gates = {id(weight) for weight in lazy.gates.parameters()}
    for module in lazy.program(lazy.example).lowered.graph_module.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.dim() > 1 and weight.dtype is torch.float32 and id(weight) not in gates:
                places.append((module, name, weight))
                if id(weight) not in cast:
                    cast[id(weight)] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    try:
        for module, name, weight in places:
            module._parameters[name] = cast[id(weight)]
        with torch.autocast(lazy.device.type, dtype):
            yield
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


@contextmanager
def recomputed(lazy: LazyModel) -> Iterator[None]:
    """Within the block, branches keep their inputs for the backward pass and nothing of what they compute on the way.

    What they give is kept all the same, as every branch's outputs are what training looks at.
    """
    branches = lazy_branches(lazy.program(lazy.example).lowered)
    cores = [branch.core for branch in branches]
    # A weight must not need a gradient at the second computation if it did not at the first one.
    frozen = [p for p in lazy.model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for branch in branches:
        branch.core = _Recomputed(branch.core)  # type: ignore[assignment]
    try:
        yield
    finally:
        for branch, core in zip(branches, cores, strict=True):
            branch.core = core
        for parameter in frozen:
            parameter.requires_grad_(True)


class _Recomputed(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, *operands: Tensor) -> Any:
        return checkpoint(self.core, *operands, use_reentrant=False, preserve_rng_state=False)


def check_memory(lazy: LazyModel, sampler: Sampler, recipe: Recipe, calls: int, group: Group) -> None:
    """Say so if a sampling run with gradients will not fit.

    Args:
        lazy: the model.
        sampler: is run up to its second call, with gradients.
        recipe: its training section counts.
        calls: that a backward pass goes through.
        group: processes that train together; those on one machine share its memory.

    Raises:
        InputError: it will not fit; says the estimate, what there is, and what to lower.
    """
    sharing = group.local if lazy.device.type == "cpu" else 1
    there = available(lazy.device, sharing)
    if there is None:
        return
    with training_mode(lazy, recipe):
        call = bytes_of_a_call(lazy, sampler)
    if call * calls <= there * SHARE:
        return
    lower = ["sampling.batch or pipeline.batch"]
    lower += [] if recipe.train.checkpointing else ["set train.checkpointing: true"]
    lower += [] if recipe.train.precision else ["set train.precision: bfloat16"]
    raise InputError(
        f"learning needs about {size_of(call * calls)} of memory ({size_of(call)} a call of the model, {calls} calls), "
        f"{size_of(there)} are free on {lazy.device}{f' for each of {sharing} processes' if sharing > 1 else ''}: lower "
        f"{', '.join(lower)}, or sample in fewer steps"
    )


def bytes_of_a_call(lazy: LazyModel, sampler: Sampler) -> int:
    """What one call of the model adds to the memory of a sampling run with gradients: measured in the second call.

    Counted are the tensors that the backward pass keeps, those that training records, and the gradients of these. 0 if the
    sampler makes one call only, or cuts the gradient.
    """
    recorder = _Recorder(lazy)
    frozen = [p for p in lazy.model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    lazy.reset()
    try:
        with (
            own_noise(),
            untouched(lazy.model),  # the run is cut off, and may have set something that it would have taken back
            torch.enable_grad(),
            lazy.programs.controlled(recorder),
            torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda kept: kept),
        ):
            sampler(lazy)
    except Enough:
        pass
    finally:
        lazy.reset()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return sum(recorder.sizes.values()) + recorder.gradients


class _Recorder:
    """Controller that counts what the second call would leave in memory, and stops the third."""

    def __init__(self, lazy: LazyModel) -> None:
        self.lazy = lazy
        self.thread = threading.current_thread()
        graph = lazy.program(lazy.example).lowered.graph_module  # its weights may be cast ones
        weights = [*lazy.model.parameters(), *lazy.model.buffers(), *graph.parameters(), *graph.buffers()]
        self.ours = {weight.untyped_storage().data_ptr() for weight in weights}
        self.sizes: dict[int, int] = {}
        #: Held, lest another tensor takes the same place in memory.
        self.held: list[Tensor] = []
        self.gradients = 0

    def keep(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if self.lazy.usage.calls == 1 and storage.data_ptr() not in self.ours:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.held.append(saved)
        return saved

    def __call__(
        self, branch: int, score: Tensor, valid: Tensor, fresh: list[Tensor], caches: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        if self.lazy.usage.calls > 1:
            Enough.leave(self.thread)
        outputs = [f if f.requires_grad else f.detach().requires_grad_() for f in fresh]
        if self.lazy.usage.calls == 1:
            for value in outputs:
                self.keep(value.detach())
                self.gradients += value.nbytes
        return outputs, torch.zeros_like(valid)
