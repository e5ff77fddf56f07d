"""One run of the user's loop, with something else in the model's place; every run of planning is one of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..sampling import Sampler
from .forecasts import Order, forecast, forecast_of
from .outputs import first_of, with_first
from .plan import Plan, stream_of


class Reading(NamedTuple):
    """What a call of the model says about itself: its timestep, and the stream it belongs to (see `Plan`)."""

    timestep: float
    stream: int = 0


#: `read(args, kwargs)` of one call of the model: its timestep, or that and its stream.
Read = Callable[[tuple[Any, ...], Mapping[str, Any]], float | Reading]

#: The model's forward: a module, a bound method, an OpenVINO request, an ONNX session.
Denoise = Callable[..., Any]

#: What answers the call of this number, made with these arguments.
Answer = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


def play(sampler: Sampler, denoise: Denoise, answer: Answer, seed: int) -> Tensor:
    """The final latents of one run whose calls are answered by `answer`; the noise is that of the seed.

    Without gradients. Torch's generators are at the end as they were before.

    Raises:
        InputError: the sampler gave no tensor.
    """
    with torch.no_grad(), noise_of(seed):
        final = sampler(_Stand(denoise, answer))
    if not isinstance(final, Tensor):
        raise InputError(f"the sampler returned {type(final).__name__}: it has to return the final latents, a tensor")
    return final.detach()


@contextmanager
def noise_of(seed: int) -> Iterator[None]:
    """Within the block, torch's generators begin at a seed; at its end they are as they were before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def reading_of(read: Read, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reading:
    """What a call says about itself."""
    found = read(args, kwargs)
    return found if isinstance(found, Reading) else Reading(float(found))


def finite(output: Any, call: int, timestep: float) -> Tensor:
    """The first tensor of an output.

    Raises:
        InputError: not all of it is finite.
    """
    value = first_of(output)
    if not bool(torch.isfinite(value).all()):
        raise InputError(
            f"the model's output is not finite at call {call + 1} (timestep {timestep:g}): it has to run without "
            "overflow before it can be planned; try another precision"
        )
    return value


class Dense:
    """Computes every call.

    Attributes:
        calls: that were computed.
        advance: is told of each.
    """

    def __init__(self, denoise: Denoise, read: Read) -> None:
        self._denoise, self._read = denoise, read
        self.calls = 0
        self.advance: Callable[[int], object] = lambda count: None

    def __call__(self, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self._denoise(*args, **kwargs)
        _ = finite(output, call, reading_of(self._read, args, kwargs).timestep)
        self.calls += 1
        self.advance(1)
        return output


class Followed:
    """Follows a plan: computes, or forecasts from what it computed before in the same stream; counts what it computes."""

    def __init__(self, denoise: Denoise, plan: Plan) -> None:
        self._denoise, self._plan = denoise, plan
        self._streams = {stream: stream_of(plan, stream) for stream in set(plan.streams)}
        self._past: dict[int, list[tuple[float, Any]]] = {}
        self.calls = 0

    def __call__(self, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = self._plan
        if call >= len(plan.timesteps):
            raise InputError(f"the plan is for {len(plan.timesteps)} calls of an image, and the sampler makes more")
        past, timestep = self._past.setdefault(plan.streams[call], []), plan.timesteps[call]
        if not plan.computes[call]:
            return combined(past, self._streams[plan.streams[call]].forecast([t for t, _ in past], timestep))
        output = self._denoise(*args, **kwargs)
        _ = finite(output, call, timestep)
        kept = forecast_of(plan.order).points - 1
        past[:] = [(t, y) for t, y in past if t != timestep][-kept:] if kept else []
        past.append((timestep, output))
        self.calls += 1
        return output


def forecast_output(past: Sequence[tuple[float, Any]], timestep: float, order: Order) -> Any:
    """The forecast of an output from earlier ones (timestep, output), oldest first."""
    return combined(past, forecast([t for t, _ in past], timestep, order))


def combined(past: Sequence[tuple[float, Any]], weights: Sequence[tuple[int, float]]) -> Any:
    """An output of weights of earlier ones, by their positions; second outputs are the last's."""
    value = first_of(past[-1][1])
    exact = torch.promote_types(value.dtype, torch.float32)
    terms = [weight * first_of(past[k][1]).to(exact) for k, weight in weights]
    return with_first(past[-1][1], torch.stack(terms).sum(dim=0).to(value.dtype))


class _Stand(nn.Module):
    """Stands in the model's place: has its attributes, counts its calls and hands them on."""

    def __init__(self, denoise: Denoise, answer: Answer) -> None:
        super().__init__()
        # Kept out of torch's registries: a stand owns no parameter.
        self.__dict__["_denoise"], self.__dict__["_answer"] = denoise, answer
        self._call = -1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._call += 1
        return self._answer(self._call, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_denoise"], name)
