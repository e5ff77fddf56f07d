"""A lazy model in use: budgets, policies, copies, calls."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lazycompress
from lazycompress.runtime import LazyModel
from lazycompress.train.trainer import TrainReport

from .harness import Try
from .models import BATCH, CHANNELS, LEARN, TOKENS, good, learn, sample, times

LABELS = torch.tensor([0, 1])
X = torch.ones(BATCH, TOKENS, CHANNELS)


@functools.cache
def shared() -> LazyModel:
    """One lazy model for all tries of this module, which leave its gates and its policy as they were."""
    lazy: LazyModel = learn(recipe={**LEARN, "units": "branches"})
    return lazy


def use(name: str, act: Callable[[LazyModel], object], says: str | None) -> Try:
    def on_shared(_: Path) -> None:
        lazy = shared()
        lazy.reset()
        gates = copy.deepcopy(lazy.gates.state_dict())
        try:
            with torch.no_grad():
                act(lazy)
        finally:
            lazy.gates.load_state_dict(gates)
            lazy.policy = "learned"

    return Try(f"use: {name}", on_shared, says)


def target(value: Any, says: str | None, **more: Any) -> Try:
    text = ", ".join([repr(value), *(f"{key}={value!r}" for key, value in more.items())]).replace("\n", " ")
    return use(f"set_target({text})", lambda lazy: lazy.set_target(value, **more), says)


def policy(value: Any, says: str | None) -> Try:
    return use(f"policy = {value!r}", lambda lazy: setattr(lazy, "policy", value), says)


def call(name: str, make: Callable[[LazyModel], object], says: str | None) -> Try:
    return use(f"call, {name}", make, says)


def same(one: LazyModel, two: LazyModel) -> None:
    """Both give the same images, and reuse as much."""
    start = torch.ones(BATCH, TOKENS, CHANNELS)
    one.reset()
    two.reset()
    images = [sample(lazy, start) for lazy in (one, two)]
    if not torch.equal(*images) or one.summary().skip_ratio != two.summary().skip_ratio or one.policy != two.policy:
        raise AssertionError("the copy is another model")
    if not str(two.training_report).startswith("learned in"):
        raise AssertionError("the report is lost")


def pickled(lazy: LazyModel) -> None:
    same(lazy, pickle.loads(pickle.dumps(lazy)))


def saved(lazy: LazyModel) -> None:
    buffer = io.BytesIO()
    torch.save(lazy, buffer)
    buffer.seek(0)
    same(lazy, torch.load(buffer, weights_only=False))


def copied(lazy: LazyModel) -> None:
    other = copy.deepcopy(lazy)
    same(lazy, other)
    with torch.no_grad():
        other.model.leave.weight.zero_()
    if float(lazy.model.leave.weight.abs().max()) == 0:
        raise AssertionError("the copy shares its weights")


def copied_after_a_stage(lazy: LazyModel) -> None:
    lazy.stages.append("quantize")
    try:
        copy.deepcopy(lazy)
    finally:
        lazy.stages.clear()


def relative(lazy: LazyModel) -> None:
    report: TrainReport = lazy.training_report
    if not 0 <= report.relative < 1 or " of the latents' variance" not in str(report):
        raise AssertionError(str(report))


def diverging(lazy: LazyModel) -> None:
    from lazycompress.train.runs import Judged

    TrainReport.of(0.5, Judged(torch.tensor([1.0, torch.inf]), 1.0), macs_ratio=0.5, forwards=1.0, seconds=1.0)


def at_another_size(lazy: LazyModel) -> None:
    if lazy(torch.ones(3, 5, CHANNELS), times(900.0, 3), torch.tensor([0, 1, 2])).shape != (3, 5, CHANNELS):
        raise AssertionError


def in_threads(lazy: LazyModel) -> None:
    threads = [threading.Thread(target=lambda: sample(lazy, X)) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()


def constant_times(model: Any) -> Tensor:
    x = torch.randn(BATCH, TOKENS, CHANNELS)
    for _ in range(3):
        x = x - 0.3 * model(x, times(500.0), LABELS)
    return x


def moving_labels(model: Any) -> Tensor:
    x = torch.randn(BATCH, TOKENS, CHANNELS)
    for k in range(3):
        x = x - 0.3 * model(x, times(900.0 - 300 * k), (LABELS + k) % 4)
    return x


def zigzag(model: Any) -> Tensor:
    x = torch.randn(BATCH, TOKENS, CHANNELS)
    for time in (900.0, 300.0, 600.0, 100.0):
        x = x - 0.3 * model(x, times(time), LABELS)
    return x


def recipe(name: str, sampling: dict[str, Any], says: str | None, **more: Any) -> Try:
    """A recipe whose own sampler is at fault."""

    def act(_: Path) -> None:
        own = {"latents": [TOKENS, CHANNELS], "steps": 3, "batch": 2, "latents_input": "x", **sampling}
        own.setdefault("conditions", {"y": {"kind": "integers", "high": 4}})
        whole = {"target": 0.7, "train": {"effort": 0.1}, **more, "sampling": own}
        lazycompress.apply(good(), whole, progress=False)

    return Try(f"apply-recipe: {name}", act, says)


def condition(name: str, says: str | None, **fields: Any) -> Try:
    return recipe(name, {"conditions": {"y": {"kind": "integers", "high": 4, **fields}}}, says)


SHARE = r"target: a share in \(0, 1\] is needed, there was "
TIMES = "timesteps: "

TRIES = [
    target(0.8, None),
    target(1, None),
    target(np.float32(0.75), None),
    target("half", SHARE + "'half'"),
    target("0.5", SHARE + "'0.5'"),
    target(None, SHARE + "None"),
    target(True, SHARE + "True"),
    target(0, SHARE + "0"),
    target(-1, SHARE + "-1"),
    target(2, SHARE + "2"),
    target(float("nan"), SHARE + "nan"),
    target(float("inf"), SHARE + "inf"),
    target([0.5], SHARE),
    target({}, SHARE),
    target(1 + 1j, SHARE),
    target(0.01, "allow 0.[0-9]+ at least"),
    target(10**400, SHARE),
    target(0.8, None, timesteps=[900, 600, 300]),
    target(0.8, TIMES + "a tensor or a list of numbers", timesteps="fifty"),
    target(0.8, TIMES + "a tensor or a list of numbers", timesteps=[None]),
    target(0.8, TIMES + "finite numbers", timesteps=[]),
    target(0.8, TIMES + "finite numbers", timesteps=[float("nan")]),
    target(0.8, TIMES + "finite numbers", timesteps=[True, False]),
    target(0.8, TIMES + "those of one image rise or fall", timesteps=[900, 300, 600]),
    target(0.8, TIMES, timesteps={"steps": 50}),
    use("expected_macs_ratio of no timesteps", lambda lazy: lazy.expected_macs_ratio(torch.zeros(0)), TIMES),
    use("expected_macs_ratio of a word", lambda lazy: lazy.expected_macs_ratio("x"), TIMES),  # type: ignore[arg-type]
    policy("compute", None),
    policy("reuse", None),
    policy("lazy", "policy: there is no 'lazy'; use 'learned', 'compute' or 'reuse'"),
    policy("", "policy: there is no ''"),
    policy("COMPUTE", "policy: there is no 'COMPUTE'"),
    policy(None, "policy: there is no None"),
    policy(5, "policy: there is no 5"),
    policy(True, "policy: there is no True"),
    policy(["compute"], "policy: there is no "),
    policy(b"compute", "policy: there is no b'compute'"),
    policy("x" * 10_000, "policy: there is no 'xxx"),
    use("policy = an array", lambda lazy: setattr(lazy, "policy", np.array(["compute"])), "policy: there is no array"),
    use("deepcopy", copied, None),
    use("pickle", pickled, None),
    use("torch.save", saved, None),
    use("deepcopy after quantization", copied_after_a_stage, "went through quantize cannot be copied or pickled"),
    use("a report that says the error relative to the image", relative, None),
    use("a report of images that are not finite", diverging, "no longer finite; raise target"),
    use("a summary before any call", lambda lazy: str(lazy.summary()), None),
    use("the context before any call", lambda lazy: lazy.context, "has not been called since its last reset"),
    use("the state before any call", lambda lazy: lazy.context, "has not been called since its last reset"),
    use(
        "locate of the lazy model's own model",
        lambda lazy: lazycompress.locate(lazy.model, (X, times(9.0), LABELS)),
        None,
    ),
    call("as it should be", lambda lazy: lazy(X, times(900.0), LABELS), None),
    call("by name", lambda lazy: lazy(timestep=times(900.0), y=LABELS, x=X), None),
    call("at another size", at_another_size, None),
    call("in threads, one after the other", in_threads, None),
    call("a batch of one", lambda lazy: lazy(X[:1], times(900.0, 1), LABELS[:1]), None),
    call("twice the same", lambda lazy: [lazy(X, times(900.0), LABELS) for _ in range(2)], None),
    call("a batch of none", lambda lazy: lazy(X[:0], times(900.0, 0), LABELS[:0]), "was called with x.*no samples"),
    call("no tokens", lambda lazy: lazy(X[:, :0], times(900.0), LABELS), None),
    call(
        "no arguments",
        lambda lazy: lazy(),
        "do not fit Tiny.forward: missing a required argument: 'x'; its parameters are x,",
    ),
    call("one argument less", lambda lazy: lazy(X, times(900.0)), "missing a required argument: 'y'"),
    call("one argument more", lambda lazy: lazy(X, times(900.0), LABELS, X), "too many positional arguments"),
    call("an unknown argument", lambda lazy: lazy(X, times(900.0), LABELS, z=X), "unexpected keyword argument 'z'"),
    call("an argument twice", lambda lazy: lazy(X, times(900.0), LABELS, y=LABELS), "multiple values for argument 'y'"),
    call("None as latents", lambda lazy: lazy(None, times(900.0), LABELS), "without a floating-point tensor of rank 3"),
    call(
        "numpy as latents",
        lambda lazy: lazy(X.numpy(), times(900.0), LABELS),
        "without a floating-point tensor of rank 3",
    ),
    call(
        "integers as latents",
        lambda lazy: lazy(X.long(), times(900.0), LABELS),
        "without a floating-point tensor of rank 3",
    ),
    call(
        "latents without batch",
        lambda lazy: lazy(X[0], times(900.0), LABELS),
        "without a floating-point tensor of rank 3",
    ),
    call("other channels", lambda lazy: lazy(X[..., :3], times(900.0), LABELS), "torch.export cannot capture Tiny"),
    call(
        "another dtype",
        lambda lazy: lazy(X.double(), times(900.0), LABELS),
        "Tiny cannot be called so: .*Double and Float; it was given x float64",
    ),
    call(
        "labels out of range",
        lambda lazy: lazy(X, times(900.0), LABELS + 98),
        "cannot be called so: .*y int64.* from 98 to 99",
    ),
    call("words as timestep", lambda lazy: lazy(X, "now", LABELS), "."),
    call("None as timestep", lambda lazy: lazy(X, None, LABELS), "."),
    call("labels for another batch", lambda lazy: lazy(X, times(900.0), torch.zeros(5).long()), "."),
    call("a timestep for another batch", lambda lazy: lazy(X, times(900.0, 5), LABELS), "."),
    Try(
        "use: a timestep that does not move",
        lambda _: learn(sampler=constant_times),
        "what is taken for the timestep was 500, 500, 500",
    ),
    Try(
        "use: labels that move",
        lambda _: learn(sampler=moving_labels),
        None,  # what moves within an image does not tell images apart
    ),
    Try("use: timesteps to and fro", lambda _: learn(sampler=zigzag), "neither rise nor fall|goes on|guards leave"),
    Try(
        "use: one step",
        lambda _: learn(sampler=lambda model: sample(model, steps=1)),
        "there is no call to reuse|calls the model once",
    ),
    Try(
        "use: another argument as timestep",
        lambda _: learn(recipe={"timestep_input": "when", "train": {"effort": 0.1}}),
        "no input is called 'when'; there are timestep, y",
    ),
    Try(
        "use: the latents as timestep",
        lambda _: learn(recipe={"timestep_input": "x", "train": {"effort": 0.1}}),
        "no input is called 'x'; there are timestep, y",
    ),
    Try(
        "use: example inputs of another model",
        lambda _: lazycompress.apply(good(), {"train": {"enabled": False}}, example_inputs={"z": X}),
        "do not fit Tiny.forward",
    ),
    Try(
        "use: example inputs of no mapping",
        lambda _: lazycompress.apply(good(), {"train": {"enabled": False}}, example_inputs=5),
        ".",
    ),  # type: ignore[arg-type]
    Try(
        "use: example inputs without samples",
        lambda _: lazycompress.locate(good(), (X[:0], times(9.0, 0), LABELS[:0])),
        "no samples",
    ),
    # recipes with a sampler of their own
    recipe("as it should be", {}, None),
    recipe("much effort for few steps, longest reuse", {}, None, guards={"max_reuse": 10**9}),
    recipe(
        "latents that no memory holds",
        {"latents": [1_000_000, 1_000_000]},
        r"sampling: x \[2, 1000000, 1000000\] .* need .* of memory, .* free",
    ),
    recipe(
        "a condition that no memory holds",
        {"conditions": {"y": {"shape": [100_000, 100_000, 100]}}},
        r"sampling: y .* of memory",
    ),
    recipe("a batch that no memory holds", {"batch": 2**31 - 1, "latents": [1000, 1000]}, "lower sampling.batch"),
    recipe("latents of a vector", {"latents": [12]}, "shapes cannot be multiplied.*x float32"),
    recipe("latents of other channels", {"latents": [3, 7]}, "call 1 .* Tiny raised RuntimeError.*x float32"),
    recipe("an unknown scheduler", {"scheduler": "DDIM"}, "diffusers has no 'DDIM'; it has"),
    recipe("a scheduler that is none", {"scheduler": "SchedulerMixin"}, "diffusers has no 'SchedulerMixin'"),
    recipe("an unknown option", {"scheduler_config": {"steps": "x", 5: 1}}, "scheduler_config"),
    recipe(
        "an unknown schedule of betas",
        {"scheduler_config": {"beta_schedule": "cubic"}},
        "does not fit DDIMScheduler with 3 steps: NotImpl",
    ),
    recipe(
        "a negative number of timesteps",
        {"scheduler_config": {"num_train_timesteps": -5}},
        "does not fit DDIMScheduler",
    ),
    recipe(
        "timesteps that no memory holds",
        {"scheduler_config": {"num_train_timesteps": 10**13}},
        "does not fit DDIMScheduler",
    ),
    recipe(
        "more steps than there are",
        {"scheduler_config": {"num_train_timesteps": 2}},
        "does not fit DDIMScheduler with 3 steps",
    ),
    recipe("an argument that the model lacks", {"constants": {"z": 1}}, "unexpected keyword argument 'z'"),
    recipe("an argument that is missing", {"conditions": {}}, "missing a required argument: 'y'"),
    recipe("another name for the latents", {"latents_input": "z"}, "do not fit Tiny.forward"),
    condition("labels out of range", "call 1 .* Tiny raised IndexError: index out of range.*y int64", low=50, high=60),
    condition("negative labels", "Tiny raised IndexError", low=-9, high=-1),
    condition("labels of a type that is none", "sampling.conditions.y: torch has no dtype 'load'", dtype="load"),
    condition("labels of a type that takes none", "sampling.conditions.y: torch makes no such values", dtype="qint8"),
    condition("labels as floats", "Tiny raised RuntimeError|Expected tensor|raised", dtype="float32"),
    condition("labels with a size too much", "Tiny raised|raised", shape=[2]),
    condition(
        "constant labels that overflow",
        "sampling.conditions.y: torch makes no such values|raised",
        kind="constant",
        value=1e300,
        dtype="int8",
    ),
    recipe("too little to reuse", {}, "target 0.05: the first of 3 calls computes always", target=0.05),
    recipe("a branch that is not there", {}, "guards.exclude: 'attn9' matches none", guards={"exclude": ["attn9"]}),
    recipe("a kind that is not there", {}, "no branch is of kind 'conv'", guards={"kind_targets": {"conv": 0.5}}),
    recipe("every branch left out", {}, "the guards leave at most 0%", guards={"exclude": ["re:.*"]}),
    recipe("more warm-up than steps", {}, "leaves 2 of 3 calls to compute, and 3 have to", guards={"warmup_steps": 99}),
    recipe("a pattern that is none", {}, "is not a regular expression", guards={"exclude": ["re:("]}),
]
