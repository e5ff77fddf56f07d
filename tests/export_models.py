"""Models, gates and loops that the tests of exported files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from lazycompress.export.trace import Granularity, granularity
from lazycompress.gates import Gates
from lazycompress.graph.branch import Branch
from lazycompress.runtime import LazyModel, wrap

from .zoo.specimen import randomise


def small_dit() -> nn.Module:
    """A DiT with two branches, 16 tokens of width 32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        )  # fmt: skip
        return randomise(model)


def small_inputs(batch: int, timestep: int, seed: int = 0, label: int = 0, last: int = 0) -> dict[str, Tensor]:
    """One call of `small_dit`; `last` is added to the last sample's label."""
    noise = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(batch) + label
    labels[-1] += last
    labels = labels % 10
    return {"hidden_states": noise, "timestep": torch.full((batch,), timestep), "class_labels": labels}


def lively(times: Tensor, spread: float = 0.3, order: int = 1) -> Callable[[list[Branch]], Gates]:
    """Gates that decide differently by branch, step, and (with a spread) sample; about half reuse.

    Without a spread they are static: no stream is read for a score.
    """

    def make(branches: list[Branch]) -> Gates:
        direction = -1 if times[0] < times[-1] else 1
        gates = Gates([b.name for b in branches], [b.width for b in branches], times, direction)
        gates.order.fill_(order)
        gates.static.fill_(int(spread == 0))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            gates.bias.copy_(torch.randn(gates.bias.shape, generator=generator) * 3)
            for weight in gates.weights:
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
        return gates

    return make


def alike(times: Tensor, order: int = 2) -> Callable[[list[Branch]], Gates]:
    """Static gates that decide all branches alike, as training makes them; about half of the steps reuse."""

    def make(branches: list[Branch]) -> Gates:
        gates = lively(times, 0.0, order)(branches)
        with torch.no_grad():
            row = torch.where(gates.bias[0] > 0, 2.0, -2.0)
            gates.bias.copy_(row.expand_as(gates.bias))
        return gates

    return make


def small_lazy(spread: float = 0.3, order: int = 1) -> LazyModel:
    """`small_dit` with lively gates over 50 timesteps, 980 to 0."""
    return wrap(small_dit(), (), small_inputs(2, 980), lively(torch.arange(980, -1, -20).float(), spread, order))


class Reference:
    """The flat graph, or the lowered one, in torch, with a state of its own that goes on from any call to any other."""

    def __init__(self, lazy: LazyModel, form: str, decide: Granularity = "sample") -> None:
        self.lazy, self.form, self.decide = lazy, form, decide
        self.state: list[Tensor] | None = None
        self.batch = -1

    def reset(self) -> None:
        self.batch = -1

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        from lazycompress.graph.call import take_apart

        call = take_apart(self.lazy.model, (), inputs)
        graph = getattr(self.lazy.program(call), self.form)
        if call.batch != self.batch:
            self.state = [spec.fresh(call.batch, torch.device("cpu")) for spec in graph.state]
            self.batch = call.batch
        assert self.state is not None
        with torch.no_grad(), granularity(graph, self.decide):
            results = graph.graph_module(*call.tensors, torch.tensor(float(self.lazy.gates.threshold)), *self.state)
        self.state = list(results[graph.outputs : -1])
        return results[0], results[-1].to(torch.float32)


def tensors_only(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a file takes of a call."""
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def loop(times: Tensor, start: Tensor, seed: int = 5) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents that drift along a path, with their timesteps: what every way of running is given, step by step."""
    drift = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    for number, time in enumerate(times):
        yield start + 0.02 * number * drift, time
