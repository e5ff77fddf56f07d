"""Calls of the sampler's own loop, recorded from the dense model, and the short training that repairs a pruned copy on them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..errors import InputError
from ..graph.call import Call, call_of
from ..sampling import NotCalledError, Sampler, first_tensor

_log = logging.getLogger(__name__)

#: At most this many runs of the sampler are recorded.
_RUNS = 4
#: One recorded call in so many is kept out of the training, to judge it.
_HELD_OUT = 8
#: Inputs without a batch dimension (a timestep for all samples) are compared if they have fewer values than this.
_SMALL = 4096


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One forward call of the dense model, and its prediction."""

    inputs: Mapping[str, Any]
    output: Tensor

    def run(self, model: nn.Module) -> Tensor:
        return first_tensor(model(**self.inputs))


@contextmanager
def own_noise(seed: int) -> Iterator[None]:
    """Torch's global generator at `seed` within the block, and as it was after it."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def record(model: nn.Module, sampler: Sampler, count: int, seed: int) -> list[RecordedCall]:
    """Run the sampler, once or more, until `count` calls of `model` were seen; the model is left as it is.

    Raises:
        InputError: the sampler never called the model.
    """
    calls: list[RecordedCall] = []
    last: list[Tensor] = []
    signature = inspect.signature(model.forward)
    rest = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]

    def keep(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = next(
            (t for t in last if t.shape == value.shape and t.dtype == value.dtype and torch.equal(t, value)), None
        )
        return value.detach().clone() if same is None else same  # what all steps share (a prompt) is kept once

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = dict(signature.bind(*args, **kwargs).arguments)
        for name in rest:
            inputs |= inputs.pop(name, {})
        inputs = pytree.tree_map(keep, inputs)
        last[:] = [value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor)]
        calls.append(RecordedCall(inputs, first_tensor(output).detach().clone()))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), own_noise(seed + 777):
            for _ in range(_RUNS):
                sampler(model)
                if not calls:
                    raise NotCalledError("the sampler returned without calling the model it was given")
                if len(calls) >= count:
                    break
    finally:
        handle.remove()
    return calls


@contextmanager
def input_energies(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Sums of squares of what reaches each of the layers while the block runs: name -> float32 [in_features]."""
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = args[0].detach().float().square().flatten(0, -2).sum(0)
            found[name] = found[name] + squares if name in found else squares

        return layer.register_forward_pre_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Samples:
    """Training batches that mix the samples of many calls, where only what has a batch dimension differs between them."""

    def __init__(self, model: nn.Module, calls: Sequence[RecordedCall], seed: int) -> None:
        groups: dict[Any, list[tuple[Call, Tensor]]] = {}
        for number, recorded in enumerate(calls):
            call = call_of(model, recorded.inputs)
            alone: Any = [t.flatten().tolist() for t, leaf in zip(call.tensors, call.leaves, strict=True)
                          if leaf.batch_dim is None and t.numel() < _SMALL]  # fmt: skip
            large = any(
                leaf.batch_dim is None and t.numel() >= _SMALL
                for t, leaf in zip(call.tensors, call.leaves, strict=True)
            )
            if large or call.lists or recorded.output.shape[:1] != (call.batch,):
                alone = number
            groups.setdefault((call.key, call.sizes, repr(alone)), []).append((call, recorded.output))
        self._groups = list(groups.values())
        self._generator = torch.Generator().manual_seed(seed)

    def _number(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self._generator))

    def draw(self) -> RecordedCall:
        """A batch as large as the recorded ones, in float32."""
        number = self._number(sum(map(len, self._groups)))
        for group in self._groups:
            if number < len(group):
                break
            number -= len(group)
        first, output = group[number]
        if len(group) == 1:
            return RecordedCall(_widened(first.arguments(first.tensors)), output.float())
        picks = [(group[self._number(len(group))], self._number(first.batch)) for _ in range(first.batch)]
        tensors = []
        for place, (tensor, leaf) in enumerate(zip(first.tensors, first.leaves, strict=True)):
            dim = leaf.batch_dim
            parts = (
                [call.tensors[place].narrow(dim, row % call.batch, 1) for (call, _), row in picks]
                if dim is not None
                else []
            )
            tensors.append(torch.cat(parts, dim) if dim is not None else tensor)
        outputs = [whole.narrow(0, row % call.batch, 1) for (call, whole), row in picks]
        return RecordedCall(_widened(first.arguments(tensors)), torch.cat(outputs).float())


def finetune(
    student: nn.Module, calls: Sequence[RecordedCall], steps: int, rate: float, seed: int, progress: bool
) -> tuple[float, float]:
    """Train all weights of `student`, in place, to predict what the dense model predicted.

    Half-precision weights are trained in float32 and rounded back. A training that does not lower the error on the calls
    that were held out is undone.

    Returns:
        Relative error on the held-out calls, before and after: squared differences over squares of the dense output.

    Raises:
        InputError: the student's output has another shape than the dense one's.
    """
    held = calls[:: min(_HELD_OUT, max(len(calls) // 2, 1))]
    used = _Samples(student, [call for call in calls if call not in held] or calls, seed)
    got, expected = held[0].run(student.eval()).shape, held[0].output.shape
    if got != expected:
        raise InputError(f"the pruned model's output is {list(got)}, the dense one's {list(expected)}")
    before = relative_error(student, held)
    if steps == 0:
        return before, before
    original = {name: value.detach().clone() for name, value in student.state_dict().items()}
    tensors = [*student.named_parameters(), *student.named_buffers()]
    dtypes = {name: value.dtype for name, value in tensors}
    wants = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    nn.Module.float(student)
    trained = [p.requires_grad_(p.is_floating_point()) for p in student.parameters()]
    trained = [p for p in trained if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    with torch.enable_grad(), tqdm(total=steps, desc="fine-tune", disable=not progress) as bar:
        for _ in range(steps):
            call = used.draw()
            loss = (call.run(student) - call.output).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2e}", refresh=False)
            bar.update()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
            parameter.grad = None
            parameter.requires_grad_(wants[name])
        for name, buffer in student.named_buffers():
            buffer.data = buffer.data.to(dtypes[name])
    after = relative_error(student, held)
    if not after < before:
        _log.warning(
            "fine-tuning did not repair the pruned model (relative error %.2e, before %.2e) and was undone; choose a "
            "smaller prune.learning_rate or more prune.finetune_steps", after, before,
        )  # fmt: skip
        student.load_state_dict(original)
        after = before
    return before, after


def relative_error(model: nn.Module, calls: Sequence[RecordedCall]) -> float:
    """Squared differences to the recorded outputs over the squares of those."""
    wrong, all_of_it = 0.0, 0.0
    with torch.no_grad():
        for call in calls:
            wrong += float((call.run(model).float() - call.output.float()).square().sum())
            all_of_it += float(call.output.float().square().sum())
    return wrong / max(all_of_it, 1e-30)


def _widened(inputs: Mapping[str, Any]) -> dict[str, Any]:
    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    found: dict[str, Any] = pytree.tree_map(widen, dict(inputs))
    return found
