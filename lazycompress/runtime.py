"""`LazyModel`: the original model's interface over a lowered lazy graph, with its state and its statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import InputError, LazyCompressError
from .gate import Gates
from .graph.capture import Call, CallKey, Capture, capture, take_apart
from .graph.insert import LazyGraph, find_conditions, find_timestep, insert_gates
from .graph.locate import Branch, locate_branches
from .graph.lower import Controller, lazy_branches, lower
from .graph.ops import macs_of
from .recipe import Recipe
from .report import Summary, Usage

_log = logging.getLogger(__name__)

Policy = Literal["learned", "compute", "reuse"]

#: Scores below this belong to decisions that guards forbid.
NEVER_REUSED = 1e-6

_THRESHOLDS = {"compute": float("inf"), "reuse": -1.0}


class _Program:
    """One capture, ready to run: shares weights and gates with every other capture of the same model."""

    def __init__(self, captured: Capture, flat: LazyGraph, lowered: LazyGraph) -> None:
        self.captured = captured
        self.flat = flat
        self.lowered = lowered


class LazyModel(nn.Module):
    """A model that reuses branch outputs of the previous denoising step.

    It has the forward signature, return type, `config`, `dtype` and `device` of the model it was made from, and shares
    its weights. State is kept between calls and forgotten when a new image begins: the timestep is not past the
    last one, the conditioning changed, the batch or any size changed, or `reset()` was called.

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
        self._programs: dict[CallKey, list[_Program]] = {}
        self._state: list[Tensor] | None = None
        self._state_key: Any = None
        self._policy: Policy = "learned"
        captured = capture(model, example)
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
        self._programs[example.key] = [self._build(captured, example)]
        self.usage = Usage([branch.macs for branch in self.branches])

    # -- what the original model has ------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        own = getattr(self.model, "dtype", None)
        return own if isinstance(own, torch.dtype) else next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "gates"):
                raise
            return getattr(super().__getattr__("model"), name)

    @property
    def past_timestep(self) -> Tensor:
        """Timesteps of the last call, float32 [batch]."""
        if self._state is None:
            raise LazyCompressError("the lazy model has not been called since its last reset")
        return self._state[0]

    # -- running ----------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, value: Policy) -> None:
        if value not in ("learned", "compute", "reuse"):
            raise LazyCompressError(f"policy: there is no {value!r}; use 'learned', 'compute' or 'reuse'")
        self._policy = value

    def reset(self) -> None:
        """Forget the caches and the statistics: the next call computes every branch."""
        self._state = None
        self.usage.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self.model, args, kwargs)
        program = self.program(call)
        threshold = torch.tensor(
            _THRESHOLDS.get(self._policy, float(self.gates.threshold)), device=call.tensors[0].device
        )
        if self._state is None or self._state_key != (call.key, call.batch, id(program)):
            device = call.tensors[call.latents].device
            self._state = [spec.fresh(call.batch, device) for spec in program.lowered.state]
            self._state_key = (call.key, call.batch, id(program))
        results = program.lowered.graph_module(*call.tensors, threshold, *self._state)
        count = program.lowered.outputs
        self._state = [value.detach() for value in results[count:-1]]
        self.usage.add(results[count], results[-1])
        return pytree.tree_unflatten(results[:count], program.captured.output_spec)

    def program(self, call: Call) -> _Program:
        """The capture that runs `call`, made now if this kind of call is new."""
        programs = self._programs.setdefault(call.key, [])
        for program in programs:
            if program.captured.serves(call):
                return program
        _log.warning(
            "lazycompress captures %s again: sizes, batch or fixed values differ from every call so far; weights and "
            "gates are shared",
            type(self.model).__name__,
        )
        program = self._build(capture(self.model, call), call)
        programs.append(program)
        return program

    def set_gates(self, gates: Gates) -> None:
        """Use other gates, of any timestep grid, in every capture there is."""
        self.gates = gates
        for programs in self._programs.values():
            for k, program in enumerate(programs):
                flat = program.flat
                flat = insert_gates(program.captured, flat.branches, gates, flat.timestep, flat.conditions)
                programs[k] = _Program(program.captured, flat, lower(flat))
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
        conditions = find_conditions(call.leaves, call.tensors, call.latents, timestep, captured.output_sizes)
        flat = insert_gates(captured, branches, self.gates, timestep, conditions)
        return _Program(captured, flat, lower(flat))

    def expected_macs_ratio(self) -> float:
        """Computed share of the branches' MACs that the gates' biases give on their own timestep grid."""
        reused = torch.sigmoid(self.gates.bias.detach().cpu()) > self.gates.threshold.cpu()
        return 1.0 - float((self._costs() * reused).sum())

    def _costs(self) -> Tensor:
        """Share of the MACs of a whole sampling run that each gate of the table decides on, [branches, grid]."""
        macs = torch.tensor([float(branch.macs) for branch in self.branches])
        return (macs / macs.sum()).unsqueeze(1).expand_as(self.gates.bias) / self.gates.bias.shape[1]

    def set_target(self, target: float) -> float:
        """Move the threshold so that at most `target` of the branches' MACs are computed, without training.

        It counts the gates' biases on their own timestep grid, so it holds for a sampler with the steps of training; gates with
        per-sample weights meet it on average only.

        Args:
            target: computed share of the branches' MACs, in (0, 1].

        Returns:
            The share that the new threshold gives.

        Raises:
            LazyCompressError: the gates, or the guards they were trained under, allow no such share.
        """
        if not 0.0 < target <= 1.0:
            raise LazyCompressError(f"target: a share in (0, 1] is needed, there was {target}")
        scores, order = torch.sigmoid(self.gates.bias.detach().cpu()).flatten().sort(descending=True)
        reused = self._costs().flatten()[order].cumsum(0)
        possible = scores > NEVER_REUSED
        enough = (reused >= 1.0 - target - 1e-6) & possible
        if target == 1.0:
            threshold, share = 1.0, 1.0
        elif not bool(enough.any()):
            least = 1.0 - float(reused[possible][-1]) if bool(possible.any()) else 1.0
            raise LazyCompressError(f"target {target}: the gates and their guards allow {least:.2f} at least")
        else:
            last = int(enough.nonzero()[0])
            below = float(scores[last + 1]) if last + 1 < len(scores) else 0.0
            threshold, share = (float(scores[last]) + below) / 2, 1.0 - float(reused[last])
        self.gates.threshold.fill_(threshold)
        return share

    @contextmanager
    def controlled(self, controller: Controller) -> Iterator[None]:
        """Within the block every branch is computed, and `controller` says what it gives; for training gates."""
        modules = [b for programs in self._programs.values() for p in programs for b in lazy_branches(p.lowered)]
        for module in modules:
            module.controller = controller
        try:
            yield
        finally:
            for module in modules:
                module.controller = None

    def summary(self) -> Summary:
        """What was found, and what has been reused since the last `reset()`."""
        return self.usage.summary(self.branches)


def wrap(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    gates: Gates | Callable[[list[Branch]], Gates] | None = None,
    timestep_input: str | None = None,
) -> LazyModel:
    """Capture, locate, insert and lower `model` for calls like `model(*args, **kwargs)`."""
    return LazyModel(model, take_apart(model, args, kwargs), gates, timestep_input=timestep_input)
