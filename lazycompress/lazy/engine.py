"""The module engine: follows a plan of whole calls, for each sample of each image by itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..eager import around, eager
from ..errors import InputError, LazyCompressError
from ..plan.forecasts import points_in
from ..plan.move import MOST_CALLS
from ..plan.plan import Plan, stream_of
from ..scopes import Scope
from .calls import Call, Reader
from .follow import Pace, alike, spread
from .images import Images, Record, Sample
from .outputs import Form, take_apart
from .prints import Eye, Sight
from .usage import CallSummary, CallUsage

_log = logging.getLogger(__name__)

Policy = Literal["learned", "compute", "reuse"]

#: Computed outputs that are kept at least: multistep samplers make the next latents of two.
_FEWEST_RECORDS = 2


class Planner(Protocol):
    """Makes plans for a budget."""

    def plan(self, target: float, timesteps: tuple[float, ...] | None = None) -> Plan:
        """A plan that computes at most `target` of the calls, each stream being called at these timesteps.

        Left out, they are those that were learned at. Of a few calls more may have to compute: the first of each stream, and
        those that guards name.
        """
        ...


@dataclass(frozen=True)
class Decision:
    """What is to be done with one call.

    Attributes:
        samples: that it goes on with or begins, in the order of the batch.
        computes: which of them compute.
    """

    call: Call
    samples: list[Sample]
    computes: list[bool]

    @property
    def skips(self) -> bool:
        """Whether the module is not called at all."""
        return not any(self.computes)


class Engine:
    """Decides about the calls of one module and makes the outputs of those that are not computed.

    Attributes:
        reader: reads the calls.
        plan: what is followed where a run has the plan's timesteps.
        planner: makes plans for other timesteps and other targets; None: the plan's density is followed.
        target: share of the calls that may be computed, which the planner is asked for.
        usage: counts since the last reset.
    """

    def __init__(self, reader: Reader, plan: Plan, planner: Planner | None = None, target: float | None = None) -> None:
        self.reader = reader
        self.planner = planner
        self.target = plan.share if target is None else target
        self.usage = CallUsage()
        self._policy: Policy = "learned"
        self._start(plan)

    def _start(self, plan: Plan) -> None:
        self._plan = plan
        self._plans: dict[tuple[float, ...], Plan] = {}
        self._images, self._eye = Images(), Eye()
        self._lock = threading.RLock()
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        kept = ("reader", "planner", "target", "_policy", "_plan")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.usage = CallUsage()
        self._start(self._plan)

    @property
    def plan(self) -> Plan:
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        with self._lock:
            self._start(plan)

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, value: Policy) -> None:
        if value not in ("learned", "compute", "reuse"):
            raise LazyCompressError(f"policy: there is no {value!r}; use 'learned', 'compute' or 'reuse'")
        self._policy = value

    def set_target(self, target: float, timesteps: Sequence[float] | Tensor | None = None) -> float:
        """Plan for another share of the calls, without learning; see `Planner.plan`.

        Returns:
            The share that is now computed at these timesteps.

        Raises:
            LazyCompressError: it is no share, or there is nothing to plan with.
        """
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0.0 < target <= 1.0:
            raise LazyCompressError(f"target: a share in (0, 1] is needed, there was {target!r}")
        if self.planner is None:
            raise LazyCompressError("set_target: this plan came without a calibration; apply the recipe again")
        own = None if timesteps is None else tuple(float(t) for t in timesteps)
        plan = self.planner.plan(float(target), own)
        if own is not None and plan.share > target + 1e-9:
            raise LazyCompressError(
                f"set_target: {sum(plan.computes)} of {len(plan.computes)} calls compute always, which is {plan.share:.0%}: "
                f"{target:g} cannot be met"
            )
        self.plan, self.target = plan, float(target)
        return self.plan.share

    def reset(self) -> None:
        """Forget all images and the statistics."""
        with self._lock:
            self._images.clear()
            self.usage.clear()

    def end(self, scope: Scope) -> None:
        """The images of a scope are over."""
        with self._lock:
            self._images.end(scope)

    def summary(self) -> CallSummary:
        return self.usage.summary()

    @eager
    @torch.no_grad()
    def decide(self, args: Sequence[Any], kwargs: Mapping[str, Any], scope: Scope | None) -> Decision | None:
        """What is to be done with a call; None: the module runs as it is, and nothing is kept."""
        try:
            call = self.reader.read(args, kwargs)
        except InputError as error:
            self._dense(0, f"{error}; such calls run as they are")
            return None
        if self._policy == "compute":
            with self._lock:
                self.usage.add_dense(call.batch)
            return None
        sight = self._eye.look(call, self.reader.conditions(call, scope is not None))
        constants = self.reader.constants(call)
        kinds = [_kind(call.latents[row], constants) for row in range(call.batch)]
        with self._lock:
            found = self._images.find(kinds, call, sight, scope, self._direction)
            streams = [
                self._images.calls_before(scope, t, seen) for t, seen in zip(sight.times, sight.latents, strict=True)
            ]
            samples, computes = [], []
            for row, known in enumerate(found):
                sample = known or self._begin(kinds[row], row, call, sight, scope, streams[row])
                wanted = sample.pace.step(sight.times[row]) if known else self._first(sample, sight.times[row])
                computes.append((self._policy != "reuse" and wanted) or not sample.records)
                samples.append(sample)
                if known:
                    self._move_on(sample, row, call, sight)
            self.usage.add(sight.times, computes, [known is None for known in found])
        return Decision(call, samples, computes)

    @eager
    @torch.no_grad()
    def keep(self, decision: Decision, output: Any) -> Any:
        """What the call gives: of samples that were to be skipped, their forecasts in the place of what was computed."""
        batch = decision.call.batch
        taken = take_apart(output, batch)
        if taken is None:
            self.drop(decision)
            self._dense(
                0, f"the outputs of {self.reader.model} cannot be told apart by sample; its calls run as they are"
            )
            return output
        tensors, form = taken
        copies = [tensor.detach().clone() for tensor in tensors]
        with self._lock:
            for row, (sample, computed) in enumerate(zip(decision.samples, decision.computes, strict=True)):
                if computed:
                    self._remember(sample, form, form.of_sample(copies, row, batch))
        if all(decision.computes):
            return output
        rows = [
            form.of_sample(tensors, row, batch) if computed else self._forecast(sample)
            for row, (sample, computed) in enumerate(zip(decision.samples, decision.computes, strict=True))
        ]
        return form.of_batch(rows)

    @eager
    @torch.no_grad()
    def skip(self, decision: Decision) -> Any:
        """What a call gives for which the module is not called."""
        form = decision.samples[0].form
        assert form is not None
        return form.of_batch([self._forecast(sample) for sample in decision.samples])

    def drop(self, decision: Decision) -> None:
        """Forget the samples of a call: it failed, or what it gave cannot be kept."""
        with self._lock:
            self._images.forget(decision.samples)

    @property
    def _direction(self) -> float:
        return 1.0 if self._plan.timesteps[0] >= self._plan.timesteps[-1] else -1.0

    def _dense(self, samples: int, why: str) -> None:
        with self._lock:
            self.usage.add_dense(samples, read=False)
            told, self._told = self._told, True
        if not told:
            _log.warning("lazycompress: %s", why)

    def _begin(self, kind: Hashable, row: int, call: Call, sight: Sight, scope: Scope | None, stream: int) -> Sample:
        sample = Sample(
            kind, scope, row, call.batch, sight.times[row], [sight.latents[row]], sight.conditions[row],
            call.latents[row].detach().clone(), Pace(stream_of(self._plan_at(sight.times[row], scope), stream)), call,
        )  # fmt: skip
        self._images.add(sample)
        return sample

    def _first(self, sample: Sample, timestep: float) -> bool:
        sample.pace.step(timestep)
        return True

    def _move_on(self, sample: Sample, row: int, call: Call, sight: Sight) -> None:
        sample.row, sample.batch = row, call.batch
        sample.timestep = sight.times[row]
        sample.prints = [sight.latents[row], sample.prints[0]]
        sample.conditions = sight.conditions[row]
        sample.latents = call.latents[row].detach().clone()

    def _plan_at(self, timestep: float, scope: Scope | None) -> Plan:
        """The plan for an image that begins at a timestep."""
        timesteps = scope.seen_from(timestep) if scope is not None else None
        if timesteps is None or alike(stream_of(self._plan, 0), timesteps):
            return self._plan
        if timesteps not in self._plans:
            if len(self._plans) > 256:
                self._plans.clear()
            few = len(timesteps) * (max(self._plan.streams) + 1) <= MOST_CALLS
            plan = (
                self.planner.plan(self.target, timesteps)
                if self.planner and few
                else spread(stream_of(self._plan, 0), timesteps)
            )
            self._plans[timesteps] = plan
        return self._plans[timesteps]

    def _remember(self, sample: Sample, form: Form, tensors: list[Tensor]) -> None:
        if sample.records and [t.shape for t in sample.records[-1].tensors] != [t.shape for t in tensors]:
            sample.records.clear()
        sample.form = form
        records = [*sample.records, Record(sample.pace.time, tensors)]
        times = [record.time for record in records]
        kept = {*points_in(times, self._plan.order), *range(len(records))[-_FEWEST_RECORDS:]}
        sample.records = [records[k] for k in sorted(kept)]

    def _forecast(self, sample: Sample) -> list[Tensor]:
        """The forecast from the last computed outputs of a sample, at now; in float32, given in their own dtype."""
        parts = sample.pace.plan.forecast([record.time for record in sample.records], sample.pace.time)
        records, weights = [sample.records[k] for k, _ in parts], [weight for _, weight in parts]
        return [_combined([r.tensors[k] for r in records], weights) for k in range(len(records[0].tensors))]


def _kind(latents: Tensor, constants: Hashable) -> Hashable:
    return tuple(latents.shape), latents.dtype, latents.device, constants


def _combined(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    last = values[0]
    if list(weights) == [1.0] or not last.is_floating_point():
        return last
    # Products and sums by themselves, none fused: so the same numbers come out whatever the batch.
    total = values[0].to(torch.float32) * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value.to(torch.float32) * weight
    return total.to(last.dtype)


# What runs outside of the module is not for compilers; what it calls is.
@around
def run(
    engine: Engine, inner: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], scope: Scope | None
) -> tuple[Any, bool]:
    """One call of a module, by its engine: what it gives, and whether `inner`, the module itself, was called."""
    decision = engine.decide(args, kwargs, scope)
    if decision is None:
        return inner(*args, **kwargs), True
    if decision.skips:
        return engine.skip(decision), False
    try:
        output = inner(*args, **kwargs)
    except BaseException:
        engine.drop(decision)
        raise
    return engine.keep(decision, output), True
