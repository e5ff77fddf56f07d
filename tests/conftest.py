"""What every test may use: one thread a process, the bundled model, gates that decide differently by sample and step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of NumPy, and of the processes that tests start

import pytest
import torch
from torch import nn

from lazycompress.gates import Gates
from lazycompress.graph.branch import Branch
from lazycompress.integrations.digits.model import load_bundled
from tests.slices import Slice, choose

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", default="", metavar="K/N", help="run part K of N, which take about the same time each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share something of their module go to one slice."""
    if config.getoption("slice"):
        kept = choose(items, Slice.parse(config.getoption("slice")))
        left = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept


@pytest.fixture(scope="session")
def digits() -> nn.Module:
    """The bundled DiT; tests must not change it."""
    return load_bundled()


def two_blocks() -> nn.Module:
    """The bundled DiT without its last four blocks: trained weights, and quick to capture and to export."""
    model: Any = load_bundled()
    model.transformer_blocks = model.transformer_blocks[:2]
    return model  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def short() -> nn.Module:
    """Two blocks of the bundled DiT, where its images do not matter; tests must not change it."""
    return two_blocks()


def make_lively_gates(branches: list[Branch]) -> Gates:
    """Gates whose scores depend on sample, step and branch, about half of them above the threshold."""
    gates = Gates([b.name for b in branches], [b.width for b in branches], torch.linspace(0, 980, 50))
    gates.order.fill_(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gates.bias.copy_(torch.randn(gates.bias.shape, generator=generator) * 3)
        for weight in gates.weights:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return gates


@pytest.fixture
def lively_gates() -> Callable[[list[Branch]], Gates]:
    return make_lively_gates
