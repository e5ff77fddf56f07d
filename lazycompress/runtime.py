"""`LazyModel`: the original model's interface over a lowered lazy graph, with its state and its statistics."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import targets
from .contexts import States
from .errors import InputError, LazyCompressError, LocateError, shortened, shown
from .gate import Gates, fingerprint, timestep_per_sample
from .graph.capture import Call, CallKey, Capture, capture, take_apart
from .graph.insert import LazyGraph, find_conditions, find_timestep, insert_gates
from .graph.locate import Branch, locate_branches
from .graph.lower import Controller, lazy_branches, lower
from .graph.lower_whole import lower_whole
from .graph.ops import macs_of
from .models import InPlaceOf, described
from .recipe import Recipe
from .report import Summary, Usage

_log = logging.getLogger(__name__)

Policy = Literal["learned", "compute", "reuse"]

_Result = TypeVar("_Result")

_THRESHOLDS = {"compute": float("inf"), "reuse": -1.0}


#: What a copy has besides model, example and gates.
_COPIED = ("recipe", "training_report", "reports", "_policy")


class _Program:
    """One capture, ready to run: shares weights and gates with every other capture of the same model.

    Attributes:
        flat: the reference.
        lowered: with a branch for each of the flat graph's.
    """

    def __init__(self, captured: Capture, flat: LazyGraph) -> None:
        self.captured = captured
        self.flat = flat
        self.lowered = lower(flat)
        self._whole: list[LazyGraph | None] = []

    @property
    def whole(self) -> LazyGraph | None:
        """With the whole network as one branch, for gates that decide all alike; None if the model does not take it."""
        if not self._whole:
            try:
                self._whole = [lower_whole(self.flat)]
            except LocateError as error:
                _log.debug("the network cannot be one branch: %s", error)
                self._whole = [None]
        return self._whole[0]

    def runs(self, gates: Gates) -> LazyGraph:
        """The lowered graph that runs with these gates."""
        return (self.whole if gates.together else None) or self.lowered

    def forget(self) -> None:
        """Weights have moved: make again what holds them in places of its own."""
        self._whole.clear()

    def swap_gates(self, gates: Gates) -> None:
        """Read other gates of the same form."""
        for graph in (self.flat, self.lowered, *self._whole):
            if graph is not None:
                graph.graph_module.lazy_gates = gates


class LazyModel(InPlaceOf):
    """A model that reuses branch outputs of the previous denoising step.

    It has the forward signature, return type, `config`, `dtype` and `device` of the model it was made from, and shares
    its weights. State is kept between calls and forgotten when a new image begins: the timestep is not past the
    last one, the conditioning changed, the batch or any size changed, or `reset()` was called. Calls with different
    conditioning may take turns (guidance in two calls): each has a state of its own, see `contexts`.

    Attributes:
        branches: what was located, in the order in which it runs.
        policy: "learned" (the gates decide), "compute" (never reuse), "reuse" (reuse wherever a cache is valid).
    """

    def __init__(
        self,
        model: nn.Module,
        example: Call,
        gates: Gates | Callable[[list[Branch]], Gates] | None = None,
        *,
        timestep_input: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.example = example
        self.timestep_input = timestep_input
        self.recipe: Recipe | None = None
        self.training_report: Any = None
        #: What quantization and compression did, a line each.
        self.reports: list[Any] = []
        self._programs: dict[CallKey, list[_Program]] = {}
        self._controller: Controller | None = None
        self._each_branch = False
        self._outputs: Callable[[list[Tensor]], list[Tensor]] | None = None
        #: What was done to the branches since they were captured: "quantize", "weights".
        self.stages: list[str] = []
        self._states = States()
        self._timesteps = torch.zeros(0)
        self._policy: Policy = "learned"
        self._capture(example, lambda captured: self._start(captured, gates))
        self.usage = Usage([branch.macs for branch in self.branches])

    def _start(self, captured: Capture, gates: Gates | Callable[[list[Branch]], Gates] | None) -> None:
        """Branches, gates and program of the first capture."""
        self.branches = locate_branches(captured.graph_module.graph, captured.batch)
        names, widths = [b.name for b in self.branches], [b.width for b in self.branches]
        if gates is None:
            gates = Gates(names, widths, torch.zeros(1))
        self.gates = gates if isinstance(gates, Gates) else gates(self.branches)
        if self.gates.names != names:
            raise LazyCompressError(
                f"the gates are for {len(self.gates.names)} branches ({', '.join(self.gates.names[:3])}, ...), the model "
                f"has {len(names)} ({', '.join(names[:3])}, ...)"
            )
        #: Multiply-accumulates of one dense call per sample, branches and all else.
        self.dense_macs = sum(macs_of(node) for node in captured.graph_module.graph.nodes) // captured.batch
        self._programs[self.example.key] = [self._build(captured, self.example)]

    def _capture(self, call: Call, use: Callable[[Capture], _Result]) -> _Result:
        """What `use` makes of a capture of `call`, with dynamic sizes if all stages can do with them."""
        earlier = next((program.captured.way for programs in self._programs.values() for program in programs), None)
        captured = capture(self.model, call, earlier=earlier)
        try:
            return use(captured)
        except Exception:
            if not captured.sizes.is_dynamic:
                raise
        return use(capture(self.model, call, sizes=False, earlier=earlier))

    @property
    def past_timestep(self) -> Tensor:
        """Timesteps of the last call, float32 [batch]."""
        if self._states.last is None:
            raise LazyCompressError("the lazy model has not been called since its last reset")
        return self._states.last.timesteps

    @property
    def timestep(self) -> float:
        """The largest timestep of the call that runs, or ran last."""
        return float(self._timesteps.max())

    @property
    def context(self) -> int:
        """Number of the state that the call uses, counted since the last `reset()`: calls that take turns differ in it."""
        if self._states.last is None:
            raise LazyCompressError("the lazy model has not been called since its last reset")
        return self._states.last.number

    # -- running ----------------------------------------------------------------------------------------------------

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
        self._states.clear()
        self.usage.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LazyModel:
        # A change of dtype is for the weights: a gate in half precision would not know its timesteps apart.
        kept = {name: value.detach().clone() for name, value in self.gates.state_dict().items()}
        before, places = self.dtype, self._places()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, parameter in self.gates.named_parameters():
                parameter.data = kept[name].to(parameter.device)
        for name, buffer in self.gates.named_buffers():
            setattr(self.gates, name, kept[name].to(buffer.device))
        if self._places() == places:
            return self  # nothing moved: hooks that offload say before every call where the model is to be
        self._move_example(before)
        if self.dtype != before:
            self._programs.clear()  # they hold buffers and constants of the old dtype
        for programs in self._programs.values():
            for program in programs:
                program.forget()
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
        return _captured_again, (type(self), self.model, self.example, self.gates, self.timestep_input), kept

    def _places(self) -> list[tuple[int, torch.device, torch.dtype]]:
        """Where the model's values are, and as what."""
        return [(t.data_ptr(), t.device, t.dtype) for t in (*self.model.parameters(), *self.model.buffers())]

    def _move_example(self, old: torch.dtype) -> None:
        tensors = [t.to(self.device, self.dtype if t.dtype is old else t.dtype) for t in self.example.tensors]
        self.example = replace(self.example, tensors=tensors)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Within the block, calls go on with the state of that name; diffusers pipelines name their guidance calls so."""
        outer, self._states.name = self._states.name, name
        try:
            yield
        finally:
            self._states.name = outer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self.model, args, kwargs)
        program = self.program(call)
        threshold = torch.tensor(
            _THRESHOLDS.get(self._policy, float(self.gates.threshold)), device=call.tensors[0].device
        )
        by_branch = self._controller is not None or self._each_branch
        lowered = program.lowered if by_branch else program.runs(self.gates)
        latents = call.tensors[call.latents]
        timesteps = timestep_per_sample(call.tensors[lowered.timestep], latents)
        self._timesteps = timesteps
        state = self._states.find(
            (call.shapes, id(lowered)),
            timesteps,
            fingerprint(
                [call.tensors[i] for i in lowered.conditions],
                latents,
                [call.tensors[i] for i, _ in lowered.sized],
                [dim for _, dim in lowered.sized],
            ),
            float(self.gates.direction),
            self.gates.never,
            lambda: [spec.fresh(call.batch, latents.device) for spec in lowered.state],
        )
        results = self._run(lowered, call, [threshold, *state.tensors])
        count = lowered.outputs
        if self._outputs is not None:
            given = self._outputs([results[k] for k in lowered.forecast])
            for k, value in zip(lowered.forecast, given, strict=True):
                results[k] = value
        state.tensors = [value.detach() for value in results[count:-1]]
        self.usage.add(results[count], results[-1])
        return pytree.tree_unflatten(results[:count], program.captured.output_spec)

    def _run(self, lowered: LazyGraph, call: Call, more: list[Tensor]) -> list[Tensor]:
        try:
            return list(lowered.graph_module(*call.tensors, *more))
        except torch.OutOfMemoryError:
            raise
        except (
            IndexError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # torch has no class for inputs that do not fit
            given = zip(call.leaves, call.tensors, strict=True)
            told = ", ".join(f"{leaf.name} {described(value)}" for leaf, value in given)
            raise InputError(
                f"{type(self.model).__name__} cannot be called so: {shortened(str(error), 200)}; it was given {told}"
            ) from error

    def program(self, call: Call) -> _Program:
        """The capture that runs `call`, made now if this kind of call is new."""
        programs = self._programs.setdefault(call.key, [])
        for program in programs:
            if program.captured.serves(call):
                return program
        if self.stages:
            raise InputError(
                f"{type(self.model).__name__} went through {', '.join(self.stages)} for calls like its example; this one has "
                "other sizes or fixed values: make the model lazy with an example of it"
            )
        _log.warning(
            "lazycompress captures %s again: sizes, batch or fixed values differ from every call so far; weights and "
            "gates are shared",
            type(self.model).__name__,
        )
        program = self._capture(call, lambda captured: self._build(captured, call))
        programs.append(program)
        return program

    def replace_flat(self, flat: LazyGraph, stage: str) -> None:
        """Run another flat graph in place of the example's: the same calls, with quantized or compressed branches.

        From now on the model takes the kinds of call that it has been captured for; another one would run in full
        precision.
        """
        program = self.program(self.example)
        self._programs = {self.example.key: [_Program(program.captured, flat)]}
        self.stages = [*self.stages, stage]
        self.reset()

    @contextmanager
    def instead(self, flat: LazyGraph) -> Iterator[None]:
        """Within the block the example's calls run `flat`, a variant of their own flat graph with the same gates."""
        kept, program = self._programs, self.program(self.example)
        self._programs = {self.example.key: [_Program(program.captured, flat)]}
        self.reset()
        try:
            yield
        finally:
            self._programs = kept
            self._swap_gates(self.gates)

    def _swap_gates(self, gates: Gates) -> None:
        if gates.form != self.gates.form:
            raise LazyCompressError(
                f"the model went through {', '.join(self.stages)} with other gates: of order {int(self.gates.order)}, "
                f"{'' if int(self.gates.static) else 'not '}static, {self.gates.kind}; make it lazy again instead"
            )
        self.gates = gates
        for programs in self._programs.values():
            for program in programs:
                program.swap_gates(gates)
        self.reset()

    def set_gates(self, gates: Gates) -> None:
        """Use other gates, of any timestep grid, in every capture there is.

        Raises:
            LazyCompressError: the model is quantized, and these gates need another graph.
        """
        if self.stages:
            self._swap_gates(gates)
            return
        self.gates = gates
        for programs in self._programs.values():
            for k, program in enumerate(programs):
                flat = program.flat
                flat = insert_gates(program.captured, flat.branches, gates, flat.timestep, flat.conditions)
                programs[k] = _Program(program.captured, flat)
        self.reset()

    def _build(self, captured: Capture, call: Call) -> _Program:
        branches = locate_branches(captured.graph_module.graph, captured.batch)
        found = [b.width for b in branches]  # names may differ by the way of capture; the order does not
        known = [w.shape[1] for w in self.gates.weights]
        if found != known:
            raise InputError(
                f"this call runs other branches than the gates are for: {len(found)} instead of {len(known)}"
            )
        timestep = find_timestep(call.leaves, call.tensors, self.timestep_input)
        if timestep == call.latents:
            raise InputError(f"recipe key timestep_input: {self.timestep_input!r} are the latents, no timestep")
        conditions = find_conditions(call.leaves, call.tensors, call.latents, timestep, captured.output_sizes)
        flat = insert_gates(captured, branches, self.gates, timestep, conditions)
        program = _Program(captured, flat)
        for branch in lazy_branches(program.lowered):
            branch.controller = self._controller
        return program

    def expected_macs_ratio(self, timesteps: Tensor | None = None) -> float:
        """Computed share of the branches' MACs over one image, per-sample weights left out.

        Args:
            timesteps: of the calls, in their order; left out, the gates' own grid.
        """
        return targets.expected_ratio(self.gates, targets.shares(self.branches), timesteps)

    def set_target(self, target: float, timesteps: Tensor | None = None) -> float:
        """Move the gates so that at most `target` of the branches' MACs are computed, without training.

        Training leaves schedules for a few budgets, and the order in which reuse pays: the nearest of the schedules is
        filled up or thinned out in that order, by whole steps if it is made of them.

        Args:
            target: computed share of the branches' MACs, in (0, 1].
            timesteps: of the calls of another sampler, in their order: the share is met there, by stretching or shrinking
                the times that outputs are kept.

        Returns:
            The share that the gates now give; per-sample weights are left out.

        Raises:
            LazyCompressError: the gates, or the guards they were trained under, allow no such share.
        """
        return targets.move(self.gates, targets.shares(self.branches), target, timesteps)

    @contextmanager
    def each_branch(self) -> Iterator[None]:
        """Within the block each branch runs by itself even where gates decide all alike: caches are kept then."""
        outer, self._each_branch = self._each_branch, True
        try:
            yield
        finally:
            self._each_branch = outer

    @contextmanager
    def controlled(
        self, controller: Controller, outputs: Callable[[list[Tensor]], list[Tensor]] | None = None
    ) -> Iterator[None]:
        """Within the block every branch is computed, and `controller` says what it gives; for training gates.

        `outputs` says what the model gives in place of those of its outputs that forecasts are for.
        """
        self._outputs = outputs
        self._control(controller)
        try:
            yield
        finally:
            self._outputs = None
            self._control(None)

    def _control(self, controller: Controller | None) -> None:
        self._controller = controller  # for captures that are made later, too
        for programs in self._programs.values():
            for program in programs:
                for branch in lazy_branches(program.lowered):
                    branch.controller = controller

    def summary(self) -> Summary:
        """What was found, and what has been reused since the last `reset()`."""
        return self.usage.summary(self.branches)


def _captured_again(
    kind: type[LazyModel], model: nn.Module, example: Call, gates: Gates, timestep_input: str | None
) -> LazyModel:
    return kind(model, example, gates, timestep_input=timestep_input)


def wrap(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    gates: Gates | Callable[[list[Branch]], Gates] | None = None,
    timestep_input: str | None = None,
) -> LazyModel:
    """Capture, locate, insert and lower `model` for calls like `model(*args, **kwargs)`."""
    return LazyModel(model, take_apart(model, args, kwargs), gates, timestep_input=timestep_input)
