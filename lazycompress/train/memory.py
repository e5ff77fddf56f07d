"""Memory of a sampling run with gradients: how much it will take, how much there is, and what makes it less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..graph.lower import lazy_branches
from ..recipe import Recipe
from ..runtime import LazyModel
from ..sampling import Sampler
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
        f"learning needs about {_size(call * calls)} of memory ({_size(call)} a call of the model, {calls} calls), "
        f"{_size(there)} are free on {lazy.device}{f' for each of {sharing} processes' if sharing > 1 else ''}: lower "
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
    state = torch.get_rng_state()
    lazy.reset()
    try:
        with torch.enable_grad(), lazy.controlled(recorder), torch.autograd.graph.saved_tensors_hooks(
            recorder.keep, lambda kept: kept
        ):  # fmt: skip
            sampler(lazy)
    except _EnoughSeen:
        pass
    finally:
        torch.set_rng_state(state)
        lazy.reset()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return sum(recorder.sizes.values()) + recorder.gradients


class _EnoughSeen(BaseException):
    """Leaves the sampler; not an Exception, so that no handler in between swallows it."""


class _Recorder:
    """Controller that counts what the second call would leave in memory, and stops the third."""

    def __init__(self, lazy: LazyModel) -> None:
        self.lazy = lazy
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
            raise _EnoughSeen
        outputs = [f if f.requires_grad else f.detach().requires_grad_() for f in fresh]
        if self.lazy.usage.calls == 1:
            for value in outputs:
                self.keep(value.detach())
                self.gradients += value.nbytes
        return outputs, torch.zeros_like(valid)


def available(device: torch.device, sharing: int = 1) -> int | None:
    """Free bytes of a device for each of some processes that share it; None where that cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    free_bytes = [size for size in (_of_the_machine(), _of_the_container()) if size is not None]
    return min(free_bytes) // sharing if free_bytes else None


def _of_the_machine() -> int | None:
    try:
        import psutil
    except ImportError:
        pass
    else:
        return int(psutil.virtual_memory().available)
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_the_container() -> int | None:
    """What the limit of a control group leaves; its page cache counts as used, so this is at least that much."""
    folder = Path("/sys/fs/cgroup")
    limit, used = (_lines(folder / name)[:1] for name in ("memory.max", "memory.current"))
    if not limit or not used or not limit[0].isdigit():
        return None
    cache = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")]
    return int(limit[0]) - int(used[0]) + sum(cache)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
