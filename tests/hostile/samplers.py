"""Samplers that do not do what is asked of them, and some that only look so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lazycompress.errors import InputError
from lazycompress.rehearsal import rehearse
from lazycompress.sampling import first_call

from .harness import Try
from .models import BATCH, STEPS, good, learn, noise, sample, times

LABELS = torch.tensor([0, 1])


def sampler(name: str, make: Callable[[], Any], says: str | None) -> Try:
    """What learning says of it; what is right is only rehearsed, as learning takes seconds."""

    def act(_: Path) -> None:
        made = make()
        if says is None:
            first_call(good(), made)
            rehearse(good(), made)
        else:
            learn(sampler=made)

    return Try(f"sampler: {name}", act, says)


def returns(change: Callable[[Tensor], Any]) -> Callable[[], Any]:
    """A sampler that returns something made of the right latents."""
    return lambda: lambda model: change(sample(model))


def counting(do: Callable[[Any, int], Any]) -> Callable[[], Any]:
    """A sampler that is told how many runs it has made before."""

    def make() -> Any:
        runs = iter(range(10**9))
        return lambda model: do(model, next(runs))

    return make


def at_call(number: int, do: Callable[[], Any]) -> Callable[[], Any]:
    """A sampler that does something before one of its calls."""

    def run(model: Any) -> Tensor:
        x = noise()
        for k in range(STEPS):
            if k == number:
                do()
            x = x - 0.3 * model(x, times(900.0 - 300 * k), LABELS)
        return x

    return lambda: run


def fails(error: BaseException) -> Callable[[], Any]:
    def do() -> None:
        raise error

    return do


def reseeds(model: Any) -> Tensor:
    torch.manual_seed(0)
    return sample(model)


def own_generator(model: Any) -> Tensor:
    return sample(model, torch.randn(BATCH, 3, 4, generator=torch.Generator().manual_seed(0)))


def advancing_generator() -> Any:
    generator = torch.Generator().manual_seed(0)
    return lambda model: sample(model, torch.randn(BATCH, 3, 4, generator=generator))


def from_numpy() -> Any:
    generator = np.random.default_rng(0)
    return lambda model: sample(model, torch.from_numpy(generator.standard_normal((BATCH, 3, 4), dtype=np.float32)))


def noise_of_its_own_later() -> Any:
    generator = torch.Generator().manual_seed(0)

    def run(model: Any) -> Tensor:
        x = noise()
        for k in range(STEPS):
            x = x - 0.3 * model(x, times(900.0 - 300 * k), LABELS) + torch.randn(x.shape, generator=generator)
        return x

    return run


def fixed() -> Any:
    start = torch.ones(BATCH, 3, 4)
    return lambda model: sample(model, start)


def in_a_thread(model: Any) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(sample(model)))
    thread.start()
    thread.join()
    return found[0]


def in_a_pool(model: Any) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(sample, model).result()


def generates(model: Any) -> Iterator[Tensor]:
    yield sample(model)


async def coroutine(model: Any) -> Tensor:
    return sample(model)


def two_sizes(model: Any) -> Tensor:
    first = model(noise(2), times(900.0, 2), LABELS)
    model(noise(3), times(600.0, 3), torch.tensor([0, 1, 2]))
    return noise() - first


def guided(model: Any) -> Tensor:
    """Guidance in one batch."""
    x = noise()
    for k in range(STEPS):
        both = model(torch.cat([x, x]), times(900.0 - 300 * k, 2 * BATCH), torch.tensor([0, 1, 3, 3]))
        plain, other = both.chunk(2)
        x = x - 0.3 * (other + 2 * (plain - other))
    return x


def other_arguments(model: Any) -> Tensor:
    """By position and by name in turn."""
    x = noise()
    for k in range(STEPS):
        t = times(900.0 - 300 * k)
        x = x - 0.3 * (model(x, t, LABELS) if k % 2 else model(x=x, timestep=t, y=LABELS))
    return x


def calls_forward(model: Any) -> Tensor:
    x = noise()
    return x - model.forward(x, times(900.0), LABELS)


def swallows(model: Any) -> Tensor:
    try:
        return sample(model)
    except Exception:
        return noise()


class Callable_:
    """An object that can be called."""

    def __call__(self, model: Any) -> Tensor:
        return sample(model)


class Module(nn.Module):
    def forward(self, model: Any) -> Tensor:
        return sample(model)


def cause_is_the_users_own(_: Path) -> None:
    own = KeyError("my key")
    try:
        learn(sampler=at_call(1, fails(own))())
    except InputError as error:
        if error.__cause__ is not own:
            raise AssertionError(f"the cause is {error.__cause__!r}") from None
        raise


def interrupted(_: Path) -> None:
    try:
        learn(sampler=at_call(1, fails(KeyboardInterrupt()))())
    except KeyboardInterrupt:
        return
    raise AssertionError("the interruption was swallowed")


RESEEDS = "starts from the same noise whatever torch's seed is"
ALONE = "has to take the model, and nothing else that is required"
FINAL = r"it has to return the final latents, a floating-point tensor \[batch, \.\.\.\]"

TRIES = [
    sampler("as it should be", lambda: sample, None),
    sampler("an object that can be called", Callable_, None),
    sampler("a module", Module, None),
    sampler(
        "with more arguments that have defaults", lambda: lambda model, steps=3, *rest, **more: sample(model), None
    ),
    sampler("guidance in one batch", lambda: guided, None),
    sampler("arguments by position and by name in turn", lambda: other_arguments, None),
    sampler("calls forward itself", lambda: calls_forward, None),
    sampler("runs in another thread", lambda: in_a_thread, None),
    sampler("runs in a pool of threads", lambda: in_a_pool, None),
    Try("sampler: learned from in another thread", lambda _: learn(sampler=in_a_thread), None),
    # what it is
    sampler("a number", lambda: 5, "sampler: a callable that takes the model is needed, there was 5"),
    sampler("a word", lambda: "ddim", "sampler: a callable that takes the model is needed, there was 'ddim'"),
    sampler("a tensor", lambda: torch.ones(2, 3, 4), "sampler: a callable that takes the model is needed"),
    sampler("false", lambda: False, "sampler: a callable that takes the model is needed"),
    sampler("an empty list", list, "sampler: a callable that takes the model is needed"),
    sampler("takes two arguments", lambda: lambda model, steps: sample(model), rf"lambda>\(model, steps\) {ALONE}"),
    sampler("takes none", lambda: lambda: noise(), rf"lambda>\(\) {ALONE}"),
    sampler("takes it by name only", lambda: lambda *, model: sample(model), ALONE),
    sampler("a class", lambda: Callable_, ALONE),
    sampler("a builtin", lambda: len, "the sampler raised TypeError"),
    sampler("None", lambda: None, "nothing to learn the gates on: pass sampler="),
    # what it returns
    sampler("returns None", returns(lambda x: None), f"returned NoneType; {FINAL}"),
    sampler("returns a list", returns(list), f"returned list; {FINAL}"),
    sampler("returns a tuple", returns(lambda x: (x,)), f"returned tuple; {FINAL}"),
    sampler("returns a dictionary", returns(lambda x: {"sample": x}), f"returned dict; {FINAL}"),
    sampler("returns numpy", returns(lambda x: x.numpy()), f"returned ndarray; {FINAL}"),
    sampler("returns a number", returns(lambda x: 1.0), f"returned float; {FINAL}"),
    sampler("returns a scalar", returns(lambda x: x.mean()), rf"returned float32 \[\]; {FINAL}"),
    sampler("returns a vector", returns(lambda x: x.flatten()), rf"returned float32 \[24\]; {FINAL}"),
    sampler("returns integers", returns(lambda x: x.long()), f"returned int64 .*; {FINAL}"),
    sampler("returns booleans", returns(lambda x: x > 0), f"returned bool .*; {FINAL}"),
    sampler("returns complex numbers", returns(lambda x: x.to(torch.complex64)), f"returned complex64 .*; {FINAL}"),
    sampler("returns no images", returns(lambda x: x[:0]), f"returned float32 .*; {FINAL}"),
    sampler(
        "returns one image without its batch",
        returns(lambda x: x[0]),
        r"latents \[3, 4\], while .* \[2, 3, 4\]: return",
    ),
    sampler("returns the mean of its images", returns(lambda x: x.mean(0)), r"latents \[3, 4\], while"),
    sampler("returns tokens first", returns(lambda x: x.transpose(0, 1)), r"latents \[3, 2, 4\], while"),
    sampler(
        "returns NaN", returns(lambda x: x * float("nan")), "latents with NaN in them, though all outputs of the model"
    ),
    sampler(
        "returns inf in one place",
        returns(lambda x: x.masked_fill(x == x.max(), torch.inf)),
        "latents with inf in them",
    ),
    sampler("returns the model", lambda: lambda model: model, f"returned StandIn; {FINAL}|without calling"),
    sampler("is a generator function", lambda: generates, "returned generator: it is a generator function, use return"),
    sampler("is a coroutine function", lambda: coroutine, f"returned coroutine.*; {FINAL}"),
    # how it calls
    sampler("never calls the model", lambda: lambda model: noise(), "returned without calling the model"),
    sampler(
        "calls without arguments",
        lambda: lambda model: model(),
        "do not fit Tiny.forward: missing a required argument",
    ),
    sampler(
        "calls with one argument less",
        lambda: lambda model: model(noise(), times(9.0)),
        "missing a required argument: 'y'",
    ),
    sampler("calls with an unknown argument", lambda: lambda model: model(z=noise()), "do not fit Tiny.forward"),
    sampler(
        "hands numpy", lambda: lambda model: model(noise().numpy(), times(9.0), LABELS), "Tiny|without a floating-point"
    ),
    sampler(
        "hands NaN as latents", lambda: lambda model: sample(model, noise() * torch.nan), "hands Tiny x with NaN in it"
    ),
    sampler(
        "hands inf as latents", lambda: lambda model: sample(model, noise() * torch.inf), "hands Tiny x with (inf|NaN)"
    ),
    sampler(
        "hands NaN as timestep",
        lambda: lambda model: model(noise(), times(torch.nan), LABELS),
        "hands Tiny timestep with NaN",
    ),
    sampler(
        "hands other channels",
        lambda: lambda model: sample(model, torch.randn(2, 3, 5)),
        "call 1 .*Tiny raised RuntimeError",
    ),
    sampler(
        "hands another dtype", lambda: lambda model: model(noise().half(), times(9.0), LABELS), "call 1 .*Tiny raised"
    ),
    sampler(
        "hands more labels than images",
        lambda: lambda model: model(noise(), times(9.0), torch.zeros(3).long()),
        "Tiny raised",
    ),
    sampler("two batch sizes in one run", lambda: two_sizes, r"with batches of \[2, 3\] in one run"),
    sampler("without gradients", lambda: torch.no_grad()(sample), None),
    # what it draws
    sampler("sets torch's seed", lambda: reseeds, RESEEDS),
    sampler("a generator of its own, made anew", lambda: own_generator, RESEEDS),
    sampler("noise made once", fixed, RESEEDS),
    sampler(
        "a generator of its own that goes on", advancing_generator, "had another x the second time, with the same seed"
    ),
    sampler("a generator of numpy's", from_numpy, "call 1 .* had another x the second time"),
    sampler("noise of its own in later steps", noise_of_its_own_later, "call 2 .* had another x the second time"),
    sampler(
        "another batch each run",
        counting(lambda model, run: sample(model, noise(1 + run % 3))),
        "other sizes the second time",
    ),
    sampler(
        "another number of calls each run",
        counting(lambda model, run: sample(model, steps=2 + run % 3)),
        r"called Tiny \d times, then \d times with the same seed",
    ),
    sampler(
        "other labels each run",
        counting(lambda model, run: noise() - model(noise(), times(9.0), torch.tensor([0, run % 4]))),
        "had another y the second time",
    ),
    sampler(
        "other timesteps each run",
        counting(lambda model, run: noise() - model(noise(), times(900.0 - run), LABELS)),
        "had another timestep the second time",
    ),
    sampler(
        "a number of calls drawn from torch's noise",
        lambda: lambda model: sample(model, steps=2 + int(torch.randint(0, 5, ()))),
        "all make the same calls|gates need a fixed number",
    ),
    # what it raises
    sampler(
        "raises before its first call",
        at_call(0, fails(ValueError("no\nway"))),
        "the sampler raised ValueError: no way",
    ),
    sampler("raises midway", at_call(1, fails(RuntimeError("boom"))), "the sampler raised RuntimeError: boom"),
    sampler("raises at its end", returns(lambda x: x[99]), "the sampler raised IndexError"),
    sampler("raises StopIteration", at_call(1, fails(StopIteration())), "the sampler raised StopIteration"),
    sampler(
        "raises with a very long message", at_call(1, fails(OSError("x" * 10_000))), "the sampler raised OSError: xxx"
    ),
    sampler("calls itself for ever", lambda: lambda model: endless(model), "the sampler raised RecursionError"),
    sampler("swallows what is raised", lambda: swallows, None),
    Try(
        "sampler: raises what comes through as the cause",
        cause_is_the_users_own,
        "the sampler raised KeyError: 'my key'",
    ),
    Try("sampler: interrupted by its user", interrupted, None),
]


def endless(model: Any) -> Tensor:
    return endless(model)
