"""What learning takes for granted of a model and a sampler, seen in two sampling runs of the dense model before any work.

1. The sampler hands the model its calls, and gives back the final latents: a tensor [batch, ...] of finite numbers.
2. The same seed gives the same run: as many calls, with the same inputs. Lazy images are compared with dense ones so.
3. Another seed gives other noise. Else the held-out images, which judge a schedule, are those that it was learned on.
4. The model's weights and outputs are finite, it gives the same output for the same call, and leaves its inputs as they are.
   A call that is reused neither counts nor draws nor writes.

What is asked of the sampler alone is in `sampling.checked`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import InputError, LazyCompressError, shortened
from .graph.call import path_name, pattern
from .graph.insert import is_timestep_name
from .graph.untouched import untouched
from .models import bad_weight, bind, described, evaluating, named, not_finite, on_meta
from .noise import own_noise
from .sampling import Enough, Sampler, StandIn, checked

#: Of a tensor so many values are compared, spread over it.
COMPARED = 4096

#: Two runs with the same seed may differ by this much of the values' size: kernels of accelerators add in any order.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE = 5e-2


def rehearse(model: nn.Module, sampler: Sampler, seed: int = 0, timestep_input: str | None = None) -> frozenset[str]:
    """Sample twice with the dense model and the same seed, and begin a third run with another seed.

    Args:
        model: called in evaluation mode, without gradients; its parts are afterwards in the mode they were in.
        sampler: as for `apply`.
        seed: of torch's global generators, which are afterwards as they were.
        timestep_input: the timestep's name; None: found by its name.

    Returns:
        Patterns of the inputs that move from timestep to timestep, the latents and the timestep among them.

    Raises:
        InputError: one of the demands of this module is not met; the line says which, and in which call.
    """
    sampler = checked(sampler)
    if found := bad_weight(model):
        raise InputError(f"{type(model).__name__} cannot be learned from: {found}")
    with own_noise(), torch.no_grad(), evaluating(model):
        first, again = (_sampled(model, sampler, seed) for _ in range(2))
        _compare(type(model).__name__, first, again)
        other = _Run(model, stops=True)
        torch.manual_seed(seed + 1)
        with untouched(model):  # the run is cut off, and may have set something that it would have taken back
            other.sample(sampler)
    if other.calls and _same(first.calls[0].noise, other.calls[0].noise):
        raise InputError(
            "the sampler starts from the same noise whatever torch's seed is: it sets a seed, or has a generator or noise of its "
            "own; draw from torch's global generator, or schedules are judged on the images they were learned on"
        )
    return _moved(first.calls, timestep_input)


@dataclass(frozen=True)
class _Seen:
    """Some values of one call: the tensors among its inputs by name, its first stream's, and its output's."""

    shapes: dict[str, list[int]]
    inputs: dict[str, Tensor]
    latents: str
    output: list[Tensor]

    @property
    def noise(self) -> Tensor:
        return self.inputs[self.latents]

    @property
    def batch(self) -> int:
        return self.shapes[self.latents][0]


class _Run:
    """One sampling run of the dense model, each of its calls looked at."""

    def __init__(self, model: nn.Module, stops: bool = False) -> None:
        self.model = model
        self.stops = stops
        self.calls: list[_Seen] = []
        self.name = type(model).__name__
        self._thread = threading.current_thread()

    def sample(self, sampler: Sampler) -> Tensor | None:
        """The final latents, or None if the run was left at its first call."""
        try:
            return sampler(StandIn(self.model, self._call))
        except Enough:
            return None

    def _call(self, args: Any, kwargs: Any) -> Any:
        where = f"call {len(self.calls) + 1} of the sampling run"
        paths, _ = pytree.tree_flatten_with_path(named(bind(self.model, args, kwargs)))
        inputs = {path_name(path): value for path, value in paths if isinstance(value, Tensor)}
        streams = [name for name, value in inputs.items() if value.dim() >= 3 and value.is_floating_point()]
        latents = next(iter(streams), next(iter(inputs), ""))
        for name, value in inputs.items():
            found = not_finite(value)
            if found == "NaN" or (found and name == latents):
                raise InputError(f"{where}: the sampler hands {self.name} {name} with {found} in it")
        if inputs and latents and (not inputs[latents].dim() or not inputs[latents].shape[0]):
            raise InputError(f"{where}: {latents} is {list(inputs[latents].shape)}, a batch of no samples")
        before = {name: value.clone() for name, value in inputs.items()}
        output = self._output(where, args, kwargs, inputs)
        changed = [name for name, value in inputs.items() if not _same(value, before[name])]
        if changed:
            raise InputError(
                f"{where}: {self.name} changes its input {changed[0]} in place, which a reused call would not do: "
                "clone it in forward"
            )
        values = [_some(value) for value in _tensors(output)]
        if not self.calls and not all(map(_close, values, self._again(where, args, kwargs, inputs))):
            raise InputError(
                f"{where}: {self.name} gave two outputs for the same call: it draws random numbers, counts its calls or "
                "keeps what it saw, so none of its calls can stand in for another"
            )
        shapes = {name: list(value.shape) for name, value in inputs.items()}
        self.calls.append(_Seen(shapes, {name: _some(value) for name, value in before.items()}, latents, values))
        if self.stops:
            Enough.leave(self._thread)
        return output

    def _again(self, where: str, args: Any, kwargs: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        return [_some(value) for value in _tensors(self._output(where, args, kwargs, inputs))]

    def _output(self, where: str, args: Any, kwargs: Any, inputs: dict[str, Tensor]) -> Any:
        try:
            output = self.model(*args, **kwargs)
        except LazyCompressError:
            raise
        except Exception as error:
            told = ", ".join(f"{name} {described(value)}" for name, value in inputs.items())
            raise InputError(
                f"{where}: {self.name} raised {type(error).__name__}: {shortened(str(error), 150)}; it was given "
                f"{shortened(told, 150)}{_and(on_meta(self.model))}"
            ) from error
        for value in _tensors(output):
            if value.is_meta:
                raise InputError(f"{where}: {self.name} runs on the meta device{_and(on_meta(self.model))}")
            if found := not_finite(value):
                raise InputError(f"{where}: the output of {self.name} holds {found}")
        return output


def _moved(calls: Sequence[_Seen], timestep_input: str | None) -> frozenset[str]:
    """Patterns of the inputs that are others in most calls than in the most similar call at the timestep before.

    Guidance in two calls has two at each timestep, and an image that follows another one may have another prompt.
    """

    def time(seen: _Seen) -> list[Tensor]:
        return [v for name, v in seen.inputs.items() if name == timestep_input or is_timestep_name(name)]

    before: list[_Seen] = []
    now: list[_Seen] = []
    moved: Counter[str] = Counter()
    compared = 0
    for seen in calls:
        if now and not all(map(_same, time(now[-1]), time(seen))):
            before, now = now, []
        now.append(seen)
        if before:
            others = [
                sorted({pattern(n) for n, v in seen.inputs.items() if not _close(v, b.inputs.get(n, v))})
                for b in before
            ]
            fewest: list[str] = min(others, key=len)
            moved.update(fewest)
            compared += 1
    return frozenset(name for name, count in moved.items() if 2 * count > compared)


def _sampled(model: nn.Module, sampler: Sampler, seed: int) -> _Run:
    run = _Run(model)
    torch.manual_seed(seed)
    image = run.sample(sampler)
    if not run.calls or image is None:
        raise InputError("the sampler returned without calling the model it was given")
    call = run.calls[0]
    batches = sorted({seen.batch for seen in run.calls})
    if len(batches) > 1:
        raise InputError(
            f"the sampler calls {run.name} with batches of {batches} in one run: gates are learned on one size"
        )
    _check_image(image, call.shapes[call.latents], call.latents)
    return run


def _check_image(image: Tensor, shape: Sequence[int], name: str) -> None:
    images, batch = image.shape[0], shape[0]
    if list(image.shape) == list(shape[1:]) or max(images, batch) % min(images, batch):
        raise InputError(
            f"the sampler returned latents {list(image.shape)}, while the model's {name} is {list(shape)}: return them with the "
            "batch, [batch, ...]"
        )
    if found := not_finite(image):
        raise InputError(
            f"the sampler returned latents with {found} in them, though all outputs of the model were finite"
        )


def _compare(name: str, first: _Run, again: _Run) -> None:
    """Say where the second of two runs with the same seed went another way."""
    todo = "draw all noise from torch's global generator, and start each run anew"
    for number, (one, two) in enumerate(zip(first.calls, again.calls, strict=False), start=1):
        where = f"call {number} of the sampling run"
        if one.shapes != two.shapes:
            raise InputError(
                f"{where} had other sizes the second time, with the same seed: {one.shapes}, {two.shapes}; {todo}"
            )
        other = [key for key, value in one.inputs.items() if not _close(value, two.inputs[key])]
        if other:
            raise InputError(f"{where} had another {other[0]} the second time, with the same seed: {todo}")
        if not all(map(_close, one.output, two.output)):
            raise InputError(
                f"{where}: {name} gave another output the second time, for the same inputs: it keeps something from call to "
                "call, so none of its calls can stand in for another"
            )
    if len(first.calls) != len(again.calls):
        raise InputError(
            f"the sampler called {name} {len(first.calls)} times, then {len(again.calls)} times with the same seed: {todo}"
        )


def _tensors(output: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]


def _some(value: Tensor) -> Tensor:
    """Values spread over a tensor, on the CPU."""
    flat = value.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // COMPARED)].cpu().clone()


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and bool(torch.equal(one, two) or (one == two).logical_or(one != one).all())


def _close(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or not one.is_floating_point() or not one.numel():
        return _same(one, two)
    finite = one.isfinite()
    size = one[finite].double().square().mean().sqrt() if bool(finite.any()) else torch.zeros(())
    gap = (
        (one[finite].double() - two[finite].double()).square().mean().sqrt() if bool(finite.any()) else torch.zeros(())
    )
    return bool(gap <= TOLERANCE.get(one.dtype, COARSE) * size)


def _and(text: str) -> str:
    return f"; {text}" if text else ""
