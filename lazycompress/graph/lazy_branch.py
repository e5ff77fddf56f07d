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

from ..gate import decide, forecast, moved, select, trend


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
    """One branch: `forward(score, valid, threshold, caches, operands, rates, pace) -> (outputs, lazy, rates)`.

    Per sample: the branch runs on the samples that compute, gathered; the others go on from their cache. Where some operand
    cannot be cut to a part of the batch, the branch runs on the whole batch if any sample computes. Rates come stream by
    stream, the same number for each cache; without any the others repeat their cache.
    """

    def __init__(
        self,
        index: int,
        core: fx.GraphModule,
        operands: list[Operand],
        outputs: list[int],
        gather: bool,
        scales: list[int],
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
        #: Rows of dim 0 per sample that each cache has.
        self.scales = scales
        #: One decision for the whole batch: everyone reuses or everyone computes. Nothing is gathered then.
        self.whole_batch = False
        #: The gate is static: what it decides does not hang on the sample, but for where images begin.
        self.scheduled = False
        self.controller: Controller | None = None

    def forward(
        self,
        score: Tensor,
        valid: Tensor,
        threshold: Tensor,
        caches: list[Tensor],
        operands: list[Tensor],
        rates: list[Tensor],
        pace: Tensor,
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        if self.controller is not None:
            outputs, taken = self.controller(self.index, score, valid, self.run(operands), caches)
            return outputs, taken, rates
        lazy = decide(score, valid, threshold)
        compiled = self.scheduled and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        if self.whole_batch or compiled:
            lazy = lazy.all().expand(lazy.shape[0]).clone()
        if compiled:
            results = self._compiled(lazy, caches, operands, rates, pace)
            return results[: len(caches)], lazy, results[len(caches) :]
        if torch.compiler.is_exporting():
            results = self._as_cond(lazy, caches, operands, rates, pace)
            return results[: len(caches)], lazy, results[len(caches) :]
        stay = int((~lazy).sum())
        if stay == 0:
            results = self.nobody(caches, rates, pace)
        elif stay == lazy.shape[0]:
            results = self.everyone(caches, operands, rates, pace)
        else:
            results = self.some(lazy, computing(lazy), caches, operands, rates, pace)
        return results[: len(caches)], lazy, results[len(caches) :]

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The branch on every sample."""
        return list(self.core(*operands))

    def nobody(self, caches: Sequence[Tensor], rates: Sequence[Tensor], pace: Tensor) -> list[Tensor]:
        """Outputs and rates where no sample computes."""
        together = list(zip(caches, _grouped(rates, len(caches)), self.scales, strict=True))
        return [
            *(forecast(cache, own, pace, scale) for cache, own, scale in together),
            *(rate for _, own, scale in together for rate in moved(own, pace, scale)),
        ]

    def everyone(
        self, caches: Sequence[Tensor], operands: Sequence[Tensor], rates: Sequence[Tensor], pace: Tensor
    ) -> list[Tensor]:
        """Outputs and rates where every sample computes."""
        fresh = self.run(operands)
        if not rates:
            return fresh
        found = list(fresh)
        for new, cache, own, scale in zip(fresh, caches, _grouped(rates, len(caches)), self.scales, strict=True):
            found += trend(new, cache, own, pace, scale)
        return found

    def some(
        self,
        lazy: Tensor,
        samples: Tensor,
        caches: Sequence[Tensor],
        operands: Sequence[Tensor],
        rates: Sequence[Tensor],
        pace: Tensor,
    ) -> list[Tensor]:
        """Outputs and rates where `samples` compute, which are those that are not lazy."""
        if self.gather:
            cut = [take(value, samples, operand.rows) for value, operand in zip(operands, self.operands, strict=True)]
            # Each sample's row among the computed ones. A gather and a choice: converters make an element-wise scatter,
            # which is many times slower, of an index copy.
            place = (torch.cumsum(~lazy, 0) - 1).clamp(min=0)
            fresh = [take(new, place, rows) for new, rows in zip(self.run(cut), self.outputs, strict=True)]
        else:
            fresh = self.run(operands)
        outputs, changed = [], []
        for new, cache, own, scale in zip(fresh, caches, _grouped(rates, len(caches)), self.scales, strict=True):
            outputs.append(select(new, forecast(cache, own, pace, scale), lazy))
            after = zip(trend(new, cache, own, pace, scale), moved(own, pace, scale), strict=True)
            changed += [select(computed, kept, lazy) for computed, kept in after]
        return outputs + changed

    def _compiled(
        self,
        lazy: Tensor,
        caches: Sequence[Tensor],
        operands: Sequence[Tensor],
        rates: Sequence[Tensor],
        pace: Tensor,
    ) -> list[Tensor]:
        """Outputs and rates under `torch.compile`: both ways in one graph, without a value that Python waits for."""

        # Bodies must agree on layout, and may not give an operand itself.
        def nobody() -> tuple[Tensor, ...]:
            return tuple(
                value.clone(memory_format=torch.contiguous_format) for value in self.nobody(caches, rates, pace)
            )

        def everyone() -> tuple[Tensor, ...]:
            return tuple(value.contiguous() for value in self.everyone(caches, operands, rates, pace))

        return list(torch.cond(lazy.all(), nobody, everyone, ()))

    def _as_cond(
        self,
        lazy: Tensor,
        caches: Sequence[Tensor],
        operands: Sequence[Tensor],
        rates: Sequence[Tensor],
        pace: Tensor,
    ) -> list[Tensor]:
        weights = dict(self.core.named_parameters()) | dict(self.core.named_buffers())
        names, values = list(weights), list(weights.values())
        ends = [len(caches), len(caches) + len(rates), len(caches) + len(rates) + len(operands)]
        cond = torch.ops.higher_order.cond

        def apart(rest: Sequence[Tensor]) -> tuple[LazyBranch, Any, Any, Any]:
            """The branch with the weights that came as operands, and caches, operands, rates."""
            twin: Any = _Swapped(self, dict(zip(names, rest[ends[2] :], strict=True)))
            return twin, rest[: ends[0]], rest[ends[1] : ends[2]], rest[ends[0] : ends[1]]

        # Bodies must agree on the layout of what they give, hence `contiguous` in each; with dynamic sizes they cannot
        # be seen to agree but on one dimension.
        def plain(value: Tensor, always: bool = False) -> Tensor:
            flat = self.shapes is not None and self.any_size
            value = value.clone(memory_format=torch.contiguous_format) if always or flat else value.contiguous()
            return value.flatten() if flat else value

        def everyone(lazy: Tensor, samples: Tensor, pace: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            twin, caches, operands, rates = apart(rest)
            return tuple(plain(value) for value in twin.everyone(caches, operands, rates, pace))

        def some(lazy: Tensor, samples: Tensor, pace: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            twin, caches, operands, rates = apart(rest)
            return tuple(plain(value) for value in twin.some(lazy, samples, caches, operands, rates, pace))

        def nobody(lazy: Tensor, samples: Tensor, pace: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            twin, caches, _, rates = apart(rest)
            results = twin.nobody(caches, rates, pace)
            # What goes through may not be the operand itself.
            through = {id(value) for value in (*caches, *rates)}
            return tuple(plain(value, always=id(value) in through) for value in results)

        def not_everyone(lazy: Tensor, samples: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return tuple(cond((~lazy).any(), some, nobody, (lazy, samples, *rest)))

        tensors = (pace, *caches, *rates, *operands, *values)
        if self.whole_batch:
            reuse = lambda *rest: nobody(lazy, lazy, *rest)  # noqa: E731
            compute = lambda *rest: everyone(lazy, lazy, *rest)  # noqa: E731
            return self._sized(cond(lazy.any(), reuse, compute, tensors), operands)
        # Outside of the bodies: a size that only the data knows may not be born inside and leave them.
        samples = computing(lazy)
        # The operator itself, not `torch.cond`: the operands keep this order, and nothing is traced twice.
        return self._sized(cond(lazy.any(), not_everyone, everyone, (lazy, samples, *tensors)), operands)

    def _sized(self, results: Sequence[Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        """Results in their shapes, which `torch.export` then knows, whichever way they came."""
        if self.shapes is None or not self.any_size:
            return list(results)
        own = self.shapes(*operands)
        each = len(results) // len(own) - 1  # rates of each cache
        found = []
        for result, shape in zip(results, [*own, *(shape for shape in own for _ in range(each))], strict=True):
            torch._check(result.shape[0] == math.prod(shape))
            found.append(result.reshape(shape))
        return found


class _Swapped:
    """A branch that runs with other tensors in the places of its weights (`torch.cond` wants them as operands)."""

    def __init__(self, branch: LazyBranch, weights: dict[str, Tensor]) -> None:
        self.branch = branch
        self.weights = weights

    def everyone(self, *args: Any) -> list[Tensor]:
        return LazyBranch.everyone(cast(LazyBranch, self), *args)

    def some(self, *args: Any) -> list[Tensor]:
        return LazyBranch.some(cast(LazyBranch, self), *args)

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.func.functional_call(self.branch.core, self.weights, tuple(operands)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.branch, name)


def _grouped(rates: Sequence[Tensor], caches: int) -> list[Sequence[Tensor]]:
    """The rates of each cache."""
    each = len(rates) // caches
    return [rates[k * each : (k + 1) * each] for k in range(caches)]


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
