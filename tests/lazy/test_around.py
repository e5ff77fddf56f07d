"""What stands around a module, put there before or after it became lazy: offloading moves nothing where nothing is computed, and
compiled modules skip their share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lazycompress
from lazycompress.integrations.diffusers import set_policy
from lazycompress.lazy.attach import attach, detach, handle_of
from lazycompress.lazy.calls import Reader
from lazycompress.lazy.engine import Engine
from lazycompress.plan.plan import even

from ..pipelines import PIPELINES, make_sd3
from .models import STEPS, TIMES, Denoiser, last, noise, prompt, steps
from .samples import learn, sample


class Moves:
    """Counts what is moved, by the copies that torch makes of weights and by calls of `to`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        module_to, tensor_to = nn.Module.to, Tensor.to

        def of_module(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return module_to(this, *args, **kwargs)

        def of_tensor(this: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += isinstance(this, nn.Parameter)
            return tensor_to(this, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "to", of_module)
        monkeypatch.setattr(Tensor, "to", of_tensor)


def by_model(module: nn.Module) -> None:
    accelerate.cpu_offload_with_hook(module, "cpu")


def in_sequence(module: nn.Module) -> None:
    accelerate.cpu_offload(module, "cpu")


def by_group(kind: str) -> Callable[[nn.Module], None]:
    def offload(module: nn.Module) -> None:
        here = torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(module, onload_device=here, offload_device=here, offload_type=kind, **blocks)

    return offload


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "offload",
    [by_model, in_sequence, by_group("leaf_level"), by_group("block_level")],
    ids=["model", "sequential", "leaves", "blocks"],
)
def test_a_skipped_call_moves_nothing(offload: Any, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    dense = sample(pipe, call)
    if first:
        offload(pipe.transformer)
    learn(pipe, call)
    if not first:
        offload(pipe.transformer)
    set_policy(pipe, "compute")
    assert torch.equal(sample(pipe, call), dense)
    set_policy(pipe, "learned")
    entered: list[int] = []
    ran = pipe.transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        entered.append(1)
        return ran(*args, **kwargs)

    pipe.transformer.forward = forward  # outermost of what moves weights
    lazycompress.reset(pipe)
    learned = sample(pipe, call)
    assert len(entered) == STEPS_OF_PIPE // 2
    assert lazycompress.summary(pipe).skip_ratio == pytest.approx(0.5)
    assert not torch.equal(learned, dense)
    pipe.transformer.forward = ran

    handle = handle_of(pipe.transformer)
    assert handle is not None
    x, time = torch.randn(2, 8, 8, 8), torch.tensor([1000.0, 1000.0])
    given = {"encoder_hidden_states": torch.randn(2, 12, 64), "pooled_projections": torch.randn(2, 64)}
    with torch.no_grad(), lazycompress.image(pipe.transformer, TIMES):
        set_policy(pipe, "reuse")
        pipe.transformer(x, timestep=time, **given)
        moves = Moves(monkeypatch)
        pipe.transformer(x + 0.01, timestep=time - 100, **given)
        assert handle.summary().computed_calls < handle.summary().calls
        assert moves.count == 0


STEPS_OF_PIPE = 8


def test_hooks_that_are_taken_off_take_nothing_along() -> None:
    pipe, call = make_sd3(), PIPELINES["sd3"].call
    _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    learn(pipe, call)
    learned = sample(pipe, call)
    hook.remove()
    assert torch.equal(sample(pipe, call), learned)
    _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    assert torch.equal(sample(pipe, call), learned)
    hook.remove()
    assert torch.equal(sample(pipe, call), learned)
    module = pipe.transformer
    detach(module)
    assert "_call_impl" not in vars(module)


def lazy_denoiser() -> Denoiser:
    model = Denoiser().eval()
    attach(model, Engine(Reader.of(model), even(TIMES, 0.5)))
    return model


def compiled_outside(model: Denoiser) -> Any:
    return torch.compile(model, backend="eager")


def compiled_inside(model: Denoiser) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("compiles", [compiled_outside, compiled_inside])
def test_a_compiled_module_keeps_its_share_of_skips(compiles: Callable[[Denoiser], Any], first: bool) -> None:
    torch._dynamo.reset()
    expected = last(steps(lazy_denoiser(), noise(0), prompt(0)))
    model = Denoiser().eval()
    called: Any = model
    if first:
        called = compiles(model)
    attach(model, Engine(Reader.of(model), even(TIMES, 0.5)))
    if not first:
        called = compiles(model)
    handle = handle_of(called)
    assert handle is not None
    for seed in range(3):
        found = last(steps(called, noise(seed), prompt(0)))
        if seed == 0:
            assert torch.allclose(found, expected, atol=1e-5)
    assert handle.summary().skip_ratio == pytest.approx(0.5)
    assert handle.summary().images == 3
    torch._dynamo.reset()


def test_only_the_module_is_compiled_and_only_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = lazy_denoiser()
    called = torch.compile(model, backend=counter)
    for seed in range(3):
        last(steps(called, noise(seed), prompt(0)))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_host_reads_device_values_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lazy_denoiser()
    reads: list[int] = []
    ran = Tensor.tolist

    def tolist(this: Tensor) -> Any:
        reads.append(this.numel())
        return ran(this)

    def refuse(*_: Any) -> Any:
        raise AssertionError("read")

    x, condition = noise(0), prompt(0)
    monkeypatch.setattr(Tensor, "tolist", tolist)
    for name in ("item", "__bool__", "__float__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    with lazycompress.image(model, TIMES), torch.no_grad():
        for now in TIMES:
            reads.clear()
            x = x - 0.1 * model(x, torch.full((1,), now), condition)
            assert len(reads) == 1
            assert reads[0] <= 8
    assert STEPS == 10
