"""`LazyModel`: the original model's interface over a lowered lazy graph, with its state and its statistics."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import targets
from .contexts import States
from .errors import LazyCompressError, shown
from .gates import Gates
from .graph.call import Call, take_apart
from .graph.insert import LazyGraph
from .models import InPlaceOf
from .programs import GatesFor, NoGraphError, Program, Programs
from .recipe import Recipe
from .report import Summary, Usage
from .scopes import Scope, opened

Policy = Literal["learned", "compute", "reuse"]

_THRESHOLDS = {"compute": float("inf"), "reuse": -1.0}

#: What a copy has besides model, example and gates.
_COPIED = ("recipe", "training_report", "reports", "_policy")


class LazyModel(InPlaceOf):
    """A model that reuses branch outputs of the previous denoising step.

    It has the forward signature, return type, `config`, `dtype` and `device` of the model it was made from, and shares
    its weights. Each image that is under way has a state of its own, whatever the order of calls; see `contexts`.

    Attributes:
        branches: what was located, in the order in which it runs.
        policy: "learned" (the gates decide), "compute" (never reuse), "reuse" (reuse wherever a cache is valid).
        programs: the captures that run its calls.
        moving: inputs that move from call to call within an image, and so say nothing of which image it is.
        dense_macs: multiply-accumulates of one dense call per sample, branches and all else.
        reports: what quantization and compression did, a line each.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Call,
        gates: GatesFor = None,
        *,
        timestep_input: str | None = None,
        moving: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.example = example
        self.timestep_input = timestep_input
        self.moving = frozenset(moving)
        self.recipe: Recipe | None = None
        self.training_report: Any = None
        self.reports: list[Any] = []
        self.programs = Programs(model, example, gates, timestep_input, self.moving)
        self.gates = self.programs.gates
        self._states = States()
        self._lock = threading.RLock()
        self._policy: Policy = "learned"
        first = self.program(example)
        self.branches, self.dense_macs = first.flat.branches, first.captured.dense_macs
        self.usage = Usage([branch.macs for branch in self.branches])

    @property
    def timestep(self) -> float:
        """The largest timestep of the call that runs, or ran last."""
        return float(self._states.now.max())

    @property
    def context(self) -> int:
        """Number of the state that the call uses, counted since the last `reset()`: calls that take turns differ in it."""
        return self._states.last.number

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, value: Policy) -> None:
        if not isinstance(value, str) or value not in ("learned", "compute", "reuse"):
            raise LazyCompressError(f"policy: there is no {shown(value)}; use 'learned', 'compute' or 'reuse'")
        self._policy = value

    def reset(self) -> None:
        """Forget the caches and the statistics: the next call computes every branch."""
        with self._lock:
            self._states.clear()
            self.usage.clear()

    def end(self, scope: Scope) -> None:
        """Forget the images of one run of a sampler."""
        with self._lock:
            self._states.end(scope)

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Within the block, calls go on with the state of that name; diffusers pipelines name their guidance calls so."""
        return self._states.named(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call, scope = take_apart(self.model, args, kwargs), self._scope()
        with self._lock:
            program = self.programs.serving(call)
            if not isinstance(program, LazyCompressError):
                graph = self.programs.running(program)
                state = self._states.find(call, graph, self.gates, scope)
        if isinstance(program, LazyCompressError):
            return self._as_it_is(call, args, kwargs, program)
        limit = _THRESHOLDS.get(self._policy, float(self.gates.threshold))
        threshold = torch.tensor(limit, dtype=torch.float32, device=call.tensors[0].device)
        results = self.programs.run(graph, call, [threshold, *state.tensors])
        if isinstance(results, LazyCompressError):
            with self._lock:
                self._states.drop(state)
            return self._as_it_is(call, args, kwargs, results)
        count = graph.outputs
        with self._lock:
            state.keep(call.tensors[call.latents], results[:count], [value.detach() for value in results[count:-1]])
            self.usage.add(results[count], results[-1])
        return pytree.tree_unflatten(results[:count], program.captured.output_spec)

    def _scope(self) -> Scope | None:
        """The run of a sampler that a call belongs to; None where nobody knows."""
        return opened(self)

    def _as_it_is(self, call: Call, args: Any, kwargs: Any, why: LazyCompressError) -> Any:
        """What the model itself gives for a call that no graph takes; `why` is raised where it does not either."""
        self.usage.add_dense(call.batch)
        try:
            output = self.model(*args, **kwargs)
        except Exception as error:
            if isinstance(why, NoGraphError):
                raise
            raise why from error
        self.programs.leave_to_the_model(call, why)
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LazyModel:
        dtype, places = self.dtype, _places(self.model)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if _places(self.model) == places:
            return self  # nothing moved: hooks that offload say before every call where the model is to be
        tensors = [t.to(self.device, self.dtype if t.dtype is dtype else t.dtype) for t in self.example.tensors]
        self.example = replace(self.example, tensors=tensors)
        self.programs.forget(retyped=self.dtype != dtype)
        self._states.clear()
        return self

    def __reduce__(self) -> Any:
        # A copy, or what was pickled, is captured again: graphs hold functions that neither can be done with.
        if self.stages:
            raise LazyCompressError(
                f"a lazy model that went through {', '.join(self.stages)} cannot be copied or pickled: copy the dense model "
                "and make it lazy again, or export it"
            )
        names = (*_COPIED, *inspect.get_annotations(type(self)))
        kept = {name: value for name, value in vars(self).items() if name in names}
        made_of = (type(self), self.model, self.example, self.gates, self.timestep_input, self.moving)
        return _captured_again, made_of, kept

    def program(self, call: Call) -> Program:
        """The capture that runs `call`, made now if this kind of call is new."""
        return self.programs.of(call)

    @property
    def stages(self) -> list[str]:
        """What was done to the branches since they were captured: "quantize", "weights"."""
        return self.programs.stages

    def replace_flat(self, flat: LazyGraph, stage: str) -> None:
        """Run another flat graph in place of the example's: the same calls, with quantized or compressed branches.

        From now on the model takes the kinds of call that it has been captured for; another one would run in full
        precision.
        """
        self.programs.replace(self.example, flat, stage)
        self.reset()

    @contextmanager
    def instead(self, flat: LazyGraph) -> Iterator[None]:
        """Within the block the example's calls run `flat`, a variant of their own flat graph with the same gates."""
        with self.programs.instead(self.example, flat):
            self.reset()
            try:
                yield
            finally:
                self.reset()

    def set_gates(self, gates: Gates) -> None:
        """Use other gates, of any timestep grid, in every capture there is; see `Programs.set_gates`."""
        self.programs.set_gates(gates)
        self.gates = gates
        self.reset()

    def expected_macs_ratio(self, timesteps: Tensor | None = None) -> float:
        """Computed share of the branches' MACs in an image of these timesteps, or the gates' own; sample weights left out."""
        return targets.expected_ratio(self.gates, targets.shares(self.branches), timesteps)

    def set_target(self, target: float, timesteps: Tensor | None = None) -> float:
        """Move the gates so that at most `target` of the branches' MACs are computed, and return the share they now give.

        Nothing is trained, and per-sample weights are left out.
        Training leaves schedules for a few budgets, and the order in which reuse pays: the nearest of the schedules is
        filled up or thinned out in that order, by whole steps if it is made of them.

        Args:
            target: computed share of the branches' MACs, in (0, 1].
            timesteps: of the calls of another sampler, in their order: the share is met there, by stretching or shrinking
                the times that outputs are kept.

        Raises:
            LazyCompressError: the gates, or the guards they were trained under, allow no such share.
        """
        return targets.move(self.gates, targets.shares(self.branches), target, timesteps)

    def summary(self) -> Summary:
        """What was found, and what has been reused since the last `reset()`."""
        return self.usage.summary(self.branches)


def _places(model: nn.Module) -> list[tuple[int, torch.device, torch.dtype]]:
    """Where a model's values are, and as what."""
    return [(t.data_ptr(), t.device, t.dtype) for t in (*model.parameters(), *model.buffers())]


def _captured_again(
    kind: type[LazyModel],
    model: nn.Module,
    example: Call,
    gates: Gates,
    timestep_input: str | None,
    moving: Collection[str],
) -> LazyModel:
    return kind(model, example, gates, timestep_input=timestep_input, moving=moving)


def wrap(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    gates: GatesFor = None,
    timestep_input: str | None = None,
) -> LazyModel:
    """Capture, locate, insert and lower `model` for calls like `model(*args, **kwargs)`."""
    return LazyModel(model, take_apart(model, args, kwargs), gates, timestep_input=timestep_input)
