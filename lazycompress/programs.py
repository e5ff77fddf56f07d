"""The captures of one model as graphs that are ready to run: one for each kind of call that there has been."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .eager import eager
from .errors import CaptureError, InputError, LazyCompressError, LocateError, shortened
from .gates import Gates
from .graph.branch import Branch
from .graph.call import Call, CallKey
from .graph.capture import Capture, capture
from .graph.insert import LazyGraph, find_conditions, find_timestep, insert_gates
from .graph.locate import locate_branches
from .graph.lower import Controller, lazy_branches, lower
from .graph.lower_whole import lower_whole
from .graph.makeup import Key, Makeup, named
from .models import described, evaluating

_log = logging.getLogger(__name__)

#: Gates, or what makes them for the branches that were found; None: untrained ones.
GatesFor = Gates | Callable[[list[Branch]], Gates] | None


class Program:
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

    def control(self, controller: Controller | None) -> None:
        """Have a controller say what each branch gives; None: the gates."""
        for branch in lazy_branches(self.lowered):
            branch.controller = controller

    def swap_gates(self, gates: Gates) -> None:
        """Read other gates of the same form."""
        for graph in (self.flat, self.lowered, *self._whole):
            if graph is not None:
                graph.graph_module.lazy_gates = gates


class NoGraphError(InputError):
    """A call that the model itself runs, and none of its graphs."""


class Programs:
    """All programs of one model, made as calls ask for them, and again where the model is no longer what they were made from.

    Attributes:
        gates: what all of them read.
        stages: what was done to the branches since they were captured: "quantize", "weights".
    """

    gates: Gates

    def __init__(
        self, model: nn.Module, example: Call, gates: GatesFor, timestep_input: str | None, moving: Collection[str]
    ) -> None:
        self.stages: list[str] = []
        self._model = model
        self._timestep_input = timestep_input
        self._moving = moving
        self._controller: Controller | None = None
        self._outputs: Callable[[list[Tensor]], list[Tensor]] | None = None
        self._each_branch = False
        self._makeup = Makeup.of(model)
        #: Entries that calls of the model itself change; and those of which it is known whether they are.
        self._restless: set[Key] = set()
        self._looked_at: set[Key] = set()
        #: Calls that no graph runs, and why.
        self._dense: dict[tuple[CallKey, tuple[tuple[int, ...], ...]], LazyCompressError] = {}
        self._told: set[str] = set()
        self._made: dict[CallKey, list[Program]] = {}
        self._made[example.key] = [self._captured(example, partial(_fitting, gates))]

    def __iter__(self) -> Iterator[Program]:
        return (program for programs in self._made.values() for program in programs)

    def of(self, call: Call) -> Program:
        """The program that runs `call`, captured now if this kind of call is new, or the model is another than at its capture.

        Raises:
            InputError: it is new, and would run without the stages that the branches went through.
            NoGraphError: something stands around the model's parts that no graph has, or they are others than went through these.
            CaptureError, LocateError: it cannot be captured, or has other branches.
        """
        self._notice(call)
        return self._found(call)

    def _found(self, call: Call) -> Program:
        programs = self._made.setdefault(call.key, [])
        for program in programs:
            if program.captured.serves(call):
                return program
        name = type(self._model).__name__
        if self.stages:
            raise InputError(
                f"{name} went through {', '.join(self.stages)} for calls like its example; this one has "
                "other sizes or fixed values: make the model lazy with an example of it"
            )
        if any(self):
            _log.warning(
                "lazycompress captures %s again: sizes, batch or fixed values differ from every call so far; weights and "
                "gates are shared",
                name,
            )
        program = self._captured(call)
        programs.append(program)
        return program

    def serving(self, call: Call) -> Program | LazyCompressError:
        """The program that runs `call`; or why none does, and the model itself has to."""
        try:
            self._notice(call)
            return self._dense.get((call.key, call.shapes)) or self._found(call)
        except (NoGraphError, CaptureError, LocateError) as error:
            return error

    def leave_to_the_model(self, call: Call, why: LazyCompressError) -> None:
        """From now on the model itself runs calls of this kind, as it can and no graph does; told once."""
        if not isinstance(why, NoGraphError):  # which is so for as long as something stands around it
            self._dense[call.key, call.shapes] = why
        if str(why) not in self._told:
            self._told.add(str(why))
            _log.warning("lazycompress: %s; such calls run as they are", why)

    @eager
    def _notice(self, call: Call) -> None:
        """Forget what was captured, if it was from a model that is another one now.

        Raises:
            NoGraphError: there is no use in capturing it again.
        """
        if self._makeup.stands():
            return
        name, now = type(self._model).__name__, Makeup.of(self._model)
        around = self._makeup.changed_around(now)
        if around:
            raise NoGraphError(f"{named(around)} of {name} was set after its capture: no graph has that")
        changed = self._makeup.changed(now, self._restless)
        if changed - self._looked_at:
            self._restless |= _changed_by_calling(self._model, call)
            self._looked_at |= changed
            changed -= self._restless
        if not changed:
            self._makeup = now
            return
        if self.stages:
            raise NoGraphError(
                f"{named(changed)} of {name} is another one than when it went through {', '.join(self.stages)}"
            )
        _log.warning(
            "lazycompress captures %s again: its %s is another one than at the last capture", name, named(changed)
        )
        self._makeup = Makeup.of(self._model)
        self._looked_at.clear()
        self._made.clear()
        self._dense.clear()

    def forget(self, retyped: bool) -> None:
        """Weights have moved, or have another dtype."""
        if retyped:
            self._made.clear()  # they hold buffers and constants of the old dtype
        self._makeup = Makeup.of(self._model)
        for program in self:
            program.forget()

    def running(self, program: Program) -> LazyGraph:
        """The graph of a program that runs now."""
        return program.lowered if self._each_branch else program.runs(self.gates)

    def run(self, graph: LazyGraph, call: Call, more: list[Tensor]) -> list[Tensor] | InputError:
        """What a graph gives for a call, threshold and state; or why it does not fit."""
        try:
            results = list(graph.graph_module(*call.tensors, *more))
        except torch.OutOfMemoryError:
            raise
        # torch has no class for inputs that do not fit
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            inputs = zip(call.leaves, call.tensors, strict=True)
            told = ", ".join(f"{leaf.name} {described(value)}" for leaf, value in inputs)
            return InputError(
                f"{type(self._model).__name__} cannot be called so: {shortened(str(error), 200)}; it was given {told}"
            )
        if self._outputs is not None:
            given = self._outputs([results[k] for k in graph.forecast])
            for k, value in zip(graph.forecast, given, strict=True):
                results[k] = value
        return results

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
            with self.each_branch():
                yield
        finally:
            self._outputs = None
            self._control(None)

    def replace(self, example: Call, flat: LazyGraph, stage: str) -> None:
        """Run another flat graph for the example's calls, and none for others: they would run in full precision."""
        self._made = {example.key: [Program(self.of(example).captured, flat)]}
        self.stages = [*self.stages, stage]

    @contextmanager
    def instead(self, example: Call, flat: LazyGraph) -> Iterator[None]:
        """Within the block the example's calls run `flat`, a variant of their own flat graph with the same gates."""
        kept, program = self._made, self.of(example)
        self._made = {example.key: [Program(program.captured, flat)]}
        try:
            yield
        finally:
            self._made = kept
            self._swap_gates(self.gates)

    def set_gates(self, gates: Gates) -> None:
        """Read other gates, of any timestep grid, in every capture there is.

        Raises:
            LazyCompressError: the branches went through a stage, and these gates need another graph.
        """
        if self.stages:
            self._swap_gates(gates)
            return
        self.gates = gates
        for programs in self._made.values():
            for k, program in enumerate(programs):
                flat = program.flat
                flat = insert_gates(program.captured, flat.branches, gates, flat.timestep, flat.conditions)
                programs[k] = Program(program.captured, flat)

    def _control(self, controller: Controller | None) -> None:
        self._controller = controller  # for captures that are made later, too
        for program in self:
            program.control(controller)

    def _swap_gates(self, gates: Gates) -> None:
        if gates.form != self.gates.form:
            raise LazyCompressError(
                f"the model went through {', '.join(self.stages)} with other gates: of order {int(self.gates.order)}, "
                f"{'' if int(self.gates.static) else 'not '}static, {self.gates.kind}; make it lazy again instead"
            )
        self.gates = gates
        for program in self:
            program.swap_gates(gates)

    def _captured(self, call: Call, first: Callable[[list[Branch]], Gates] | None = None) -> Program:
        """A new program, with dynamic sizes if all stages can do with them; `first` makes the gates."""
        earlier = next((program.captured.way for program in self), None)
        captured = capture(self._model, call, earlier=earlier)
        try:
            return self._build(captured, call, first)
        except Exception:
            if not captured.sizes.is_dynamic:
                raise
        return self._build(capture(self._model, call, sizes=False, earlier=earlier), call, first)

    def _build(self, captured: Capture, call: Call, first: Callable[[list[Branch]], Gates] | None) -> Program:
        branches = locate_branches(captured.graph_module.graph, captured.batch)
        if first is not None:
            self.gates = first(branches)
        found = [b.width for b in branches]  # names may differ by the way of capture; the order does not
        known = [w.shape[1] for w in self.gates.weights]
        if found != known:
            raise LocateError(
                f"a call of {type(self._model).__name__} runs other branches than the gates are for: {len(found)}, and not "
                f"{len(known)}"
            )
        timestep = find_timestep(call.leaves, call.tensors, self._timestep_input)
        if timestep == call.latents:
            raise InputError(f"recipe key timestep_input: {self._timestep_input!r} are the latents, no timestep")
        conditions = find_conditions(
            call.leaves, call.tensors, call.latents, timestep, captured.output_sizes, self._moving
        )
        program = Program(captured, insert_gates(captured, branches, self.gates, timestep, conditions))
        program.control(self._controller)
        return program


def _changed_by_calling(model: nn.Module, call: Call) -> set[Key]:
    """Entries that a call of the model itself changes: a counter, a table that it remembers."""
    before = Makeup.of(model)
    with torch.no_grad(), evaluating(model):
        try:
            model(**call.arguments(call.tensors))
        except Exception as error:  # capture, which comes next, has the words for it
            _log.debug("the model does not run: %s", error)
    return before.changed(Makeup.of(model))


def _fitting(gates: GatesFor, branches: list[Branch]) -> Gates:
    """The gates for these branches.

    Raises:
        LazyCompressError: they are for others.
    """
    names = [branch.name for branch in branches]
    if gates is None:
        gates = Gates(names, [branch.width for branch in branches], torch.zeros(1))
    gates = gates if isinstance(gates, Gates) else gates(branches)
    if gates.names != names:
        raise LazyCompressError(
            f"the gates are for {len(gates.names)} branches ({', '.join(gates.names[:3])}, ...), the model "
            f"has {len(names)} ({', '.join(names[:3])}, ...)"
        )
    return gates
