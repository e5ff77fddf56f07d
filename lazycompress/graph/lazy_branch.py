"""One lowered branch: runs where it is needed, in Python under PyTorch and as `torch.cond` under `torch.export`.

Under `torch.compile` it is `torch.cond` too if its gate is static, one decision for the batch; else it stays in Python, and the
compiled graph breaks there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from ..gate import decide, select


class Controller(Protocol):
    """Decides what a branch gives while gates are trained; the branch has been computed for every sample."""

    def __call__(
        self, branch: int, score: Tensor, valid: Tensor, fresh: list[Tensor], caches: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]: ...


@dataclass(frozen=True)
class Operand:
    """How an operand is cut to some of the samples: `rows` of dim 0 per sample, 0 if it has no batch dimension."""

    rows: int


class LazyBranch(nn.Module):
    """One branch: `forward(score, valid, threshold, caches, operands) -> (outputs, lazy)`.

    Per sample: the branch runs on the samples that compute, gathered; the others repeat their cache. Where some operand
    cannot be cut to a part of the batch, the branch runs on the whole batch if any sample computes.
    """

    def __init__(
        self,
        index: int,
        core: fx.GraphModule,
        operands: list[Operand],
        outputs: list[int],
        gather: bool,
        shapes: fx.GraphModule | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.core = core
        self.operands = operands
        self.outputs = outputs
        self.gather = gather
        #: From the operands the shape of each output, where more than its batch is dynamic.
        self.shapes = shapes
        #: While exported: whether inputs may have other sizes than the example's.
        self.any_size = True
        #: One decision for the whole batch: everyone reuses or everyone computes. Nothing is gathered then.
        self.whole_batch = False
        #: The gate is static: what it decides does not hang on the sample, but for where images begin.
        self.scheduled = False
        #: The branch is the whole network, next to which gathering its samples costs nothing: exported, it is in the graph once,
        #: and not a second time for batches in which everyone computes.
        self.once = False
        self.controller: Controller | None = None

    def forward(
        self, score: Tensor, valid: Tensor, threshold: Tensor, caches: list[Tensor], operands: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        if self.controller is not None:
            return self.controller(self.index, score, valid, self.run(operands), caches)
        lazy = decide(score, valid, threshold)
        compiled = self.scheduled and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        if self.whole_batch or compiled:
            lazy = lazy.all().expand(lazy.shape[0]).clone()
        if compiled:
            return self._compiled(lazy, caches, operands), lazy
        if torch.compiler.is_exporting():
            return self._as_cond(lazy, caches, operands), lazy
        stay = int((~lazy).sum())
        if stay == 0:
            return caches, lazy
        if stay == lazy.shape[0]:
            return self.run(operands), lazy
        return self.some(lazy, computing(lazy), caches, operands), lazy

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The branch on every sample."""
        return list(self.core(*operands))

    def some(self, lazy: Tensor, samples: Tensor, caches: Sequence[Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        """Outputs where `samples` compute, which are those that are not lazy."""
        if self.gather:
            cut = [take(value, samples, operand.rows) for value, operand in zip(operands, self.operands, strict=True)]
            # Each sample's row among the computed ones. A gather and a choice: converters make an element-wise scatter,
            # which is many times slower, of an index copy.
            place = (torch.cumsum(~lazy, 0) - 1).clamp(min=0)
            fresh = [take(new, place, rows) for new, rows in zip(self.run(cut), self.outputs, strict=True)]
        else:
            fresh = self.run(operands)
        return [select(new, cache, lazy) for new, cache in zip(fresh, caches, strict=True)]

    def _compiled(self, lazy: Tensor, caches: Sequence[Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        """Outputs under `torch.compile`: both ways in one graph, without a value that Python waits for."""

        # Bodies must agree on layout, and may not give an operand itself.
        def nobody() -> tuple[Tensor, ...]:
            return tuple(cache.clone(memory_format=torch.contiguous_format) for cache in caches)

        def everyone() -> tuple[Tensor, ...]:
            return tuple(value.contiguous() for value in self.run(operands))

        return list(torch.cond(lazy.all(), nobody, everyone, ()))

    def _as_cond(self, lazy: Tensor, caches: Sequence[Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        weights = dict(self.core.named_parameters()) | dict(self.core.named_buffers())
        slots, values = _apart(weights)
        ends = [len(caches), len(caches) + len(operands)]
        cond = torch.ops.higher_order.cond

        def apart(rest: Sequence[Tensor]) -> tuple[LazyBranch, Any, Any]:
            """The branch with the weights that came as operands, and caches, operands."""
            own = rest[ends[1] :]
            twin: Any = _Swapped(self, {name: own[slot] for name, slot in slots.items()})
            return twin, rest[: ends[0]], rest[ends[0] : ends[1]]

        # Bodies must agree on the layout of what they give, hence `contiguous` in each; with dynamic sizes they cannot
        # be seen to agree but on one dimension.
        def plain(value: Tensor, always: bool = False) -> Tensor:
            flat = self.shapes is not None and self.any_size
            value = value.clone(memory_format=torch.contiguous_format) if always or flat else value.contiguous()
            return value.flatten() if flat else value

        def everyone(lazy: Tensor, samples: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            twin, _, operands = apart(rest)
            return tuple(plain(value) for value in twin.run(operands))

        def some(lazy: Tensor, samples: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            twin, caches, operands = apart(rest)
            return tuple(plain(value) for value in twin.some(lazy, samples, caches, operands))

        def nobody(lazy: Tensor, samples: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            # What goes through may not be the operand itself.
            return tuple(plain(cache, always=True) for cache in rest[: ends[0]])

        def not_everyone(lazy: Tensor, samples: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return tuple(cond((~lazy).any(), some, nobody, (lazy, samples, *rest)))

        tensors = (*caches, *operands, *values)
        if self.whole_batch:
            reuse = lambda *rest: nobody(lazy, lazy, *rest)  # noqa: E731
            compute = lambda *rest: everyone(lazy, lazy, *rest)  # noqa: E731
            return self._sized(cond(lazy.any(), reuse, compute, tensors), operands)
        # Outside of the bodies: a size that only the data knows may not be born inside and leave them.
        samples = computing(lazy)
        if self.once:
            return self._sized(cond((~lazy).any(), some, nobody, (lazy, samples, *tensors)), operands)
        # The operator itself, not `torch.cond`: the operands keep this order, and nothing is traced twice.
        return self._sized(cond(lazy.any(), not_everyone, everyone, (lazy, samples, *tensors)), operands)

    def _sized(self, results: Sequence[Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        """Results in their shapes, which `torch.export` then knows, whichever way they came."""
        if self.shapes is None or not self.any_size:
            return list(results)
        found = []
        for result, shape in zip(results, self.shapes(*operands), strict=True):
            torch._check(result.shape[0] == math.prod(shape))
            found.append(result.reshape(shape))
        return found


class _Swapped:
    """A branch that runs with other tensors in the places of its weights (`torch.cond` wants them as operands)."""

    def __init__(self, branch: LazyBranch, weights: dict[str, Tensor]) -> None:
        self.branch = branch
        self.weights = weights

    def some(self, *args: Any) -> list[Tensor]:
        return LazyBranch.some(cast(LazyBranch, self), *args)

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.func.functional_call(self.branch.core, self.weights, tuple(operands)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.branch, name)


def _apart(weights: dict[str, Tensor]) -> tuple[dict[str, int], list[Tensor]]:
    """Each weight's number among those that are different tensors: operands of `torch.cond` may not share memory."""
    slots: dict[str, int] = {}
    numbers: dict[Any, int] = {}
    values: list[Tensor] = []
    for name, value in weights.items():
        same = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())
        if same not in numbers:
            numbers[same] = len(values)
            values.append(value)
        slots[name] = numbers[same]
    return slots, values


def computing(lazy: Tensor) -> Tensor:
    """Numbers of the samples that are not lazy, int64 [at most batch]."""
    samples = torch.nonzero(~lazy).squeeze(1)
    torch._check(samples.shape[0] <= lazy.shape[0])
    return samples


def take(value: Tensor, samples: Tensor, rows: int) -> Tensor:
    """The rows of `value` that belong to `samples`; `rows` of dim 0 per sample, 0 for a value without a batch."""
    if rows == 0:
        return value
    if rows == 1:
        return value.index_select(0, samples)
    folded = value.reshape(-1, rows, *value.shape[1:])
    return folded.index_select(0, samples).reshape(-1, *value.shape[1:])
