"""`torch.compile`: the same outputs, real skipping, and how often the graph breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazycompress.runtime import LazyModel, wrap
from tests.benchmarks.compiled import STEPS, breaks_of, compile_network, make_gates
from tests.zoo.styles_parts import AdaBlock, ImageDenoiser, image_inputs


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return ImageDenoiser(AdaBlock, depth=2).eval().requires_grad_(False)


def loop(call: Callable[..., Any], batch: int = 2) -> Tensor:
    """What the model gives over one image, [steps, ...]."""
    inputs = image_inputs(batch, 0)
    found = []
    for step, time in enumerate(torch.linspace(950, 50, STEPS)):
        moved = {**inputs, "t": torch.full((batch,), float(time)), "x": inputs["x"] * (1 + 0.2 * step)}
        with torch.no_grad():
            found.append(call(**moved))
    return torch.stack(found)


def first_call(batch: int = 2) -> dict[str, Any]:
    """The arguments of the first call of an image."""
    return {**image_inputs(batch, 0), "t": torch.full((batch,), 950.0)}


def lazy_of(model: nn.Module, static: bool) -> tuple[LazyModel, Tensor, float]:
    """A lazy model, and what it gives and skips without compilation."""
    lazy = wrap(model, (), first_call(), lambda branches: make_gates(branches, static))
    expected = loop(lazy)
    skipped = lazy.summary().skip_ratio
    assert 0.2 < skipped < 0.6
    lazy.reset()
    torch._dynamo.reset()
    return lazy, expected, skipped


def test_a_static_network_is_one_graph(model: nn.Module) -> None:
    lazy, expected, skipped = lazy_of(model, True)
    compile_network(lazy, backend="eager", fullgraph=True)  # raises where the graph breaks
    assert torch.equal(loop(lazy), expected)
    assert lazy.summary().skip_ratio == pytest.approx(skipped)
    three = loop(lazy, batch=3)
    assert torch.equal(loop(lazy), expected)
    assert not torch.isnan(three).any()


def test_what_is_skipped_is_not_executed(model: nn.Module) -> None:
    lazy, _, _ = lazy_of(model, True)
    runs: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for part in graph.modules():
            nodes = part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ()
            if any("scaled_dot" in str(node.target) for node in nodes):
                part.register_forward_pre_hook(lambda *_: runs.append(1))
        return graph

    compile_network(lazy, backend=counting, fullgraph=True)
    loop(lazy)
    reused = lazy.summary().reused
    computed = [1 - share for b, share in zip(lazy.branches, reused, strict=True) if "attention" in b.kind]
    assert len(runs) == round(sum(computed) * STEPS)


def test_a_sample_that_begins_an_image_computes_for_all(model: nn.Module) -> None:
    lazy, expected, skipped = lazy_of(model, True)
    compile_network(lazy, backend="eager", fullgraph=True)
    inputs = image_inputs(2, 0)
    with torch.no_grad():
        lazy(**{**inputs, "t": torch.tensor([950.0, 300.0])})
        lazy(**{**inputs, "t": torch.tensor([850.0, 850.0])})  # the second one starts again
    assert lazy.summary().skip_ratio == 0.0
    lazy.reset()
    assert torch.equal(loop(lazy), expected)
    assert lazy.summary().skip_ratio == pytest.approx(skipped)


@pytest.mark.slow(seconds=14)
@pytest.mark.parametrize("static", [True, False])
def test_the_whole_model_compiles_and_breaks_outside_of_the_network_only(model: nn.Module, static: bool) -> None:
    lazy, expected, skipped = lazy_of(model, static)
    compiled = torch.compile(lazy, backend="eager")
    assert (loop(compiled) - expected).abs().max() < 1e-5
    assert lazy.summary().skip_ratio == pytest.approx(skipped)
    lazy.reset()
    at_branches, outside = breaks_of(lazy, first_call())
    print(f"{'static' if static else 'by sample'}: {at_branches} breaks at branches, {outside} outside")
    assert at_branches == 0 if static else at_branches >= len(lazy.branches)
    assert 0 < outside <= 8
