"""Programs whose branches are bodies, as OpenVINO takes them: weights are in the bodies, and results are those of torch."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

ov = pytest.importorskip("openvino")

from lazycompress.export.openvino import _decomposed  # noqa: E402
from lazycompress.export.portable import make_portable, select_scatter  # noqa: E402


class Nested(nn.Module):
    """A branch within a branch, whose bodies read weights of their own and a shared one, and join operands in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shared = nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inner = lambda x, y: self.first(torch.cat([x, y], 1))  # noqa: E731
        outer = lambda x, y: torch.cond(y.sum() > 0, inner, lambda x, y: self.second(x), (x, y))  # noqa: E731
        result: Tensor = torch.cond(x.sum() > 0, outer, lambda x, y: self.shared(x) + self.second(y), (x, y))
        return self.shared(result)


def conds(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
                yield part, node


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        batch = torch.export.Dim("batch", min=2, max=9)
        return torch.export.export(
            Nested().requires_grad_(False), (torch.randn(3, 4), torch.randn(3, 4)),
            dynamic_shapes={"x": {0: batch}, "y": {0: batch}}, strict=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def rewritten(program: ExportedProgram) -> fx.GraphModule:
    changed = copy.deepcopy(program)
    make_portable(changed)
    return _decomposed(changed)


def test_no_weight_is_an_operand(rewritten: fx.GraphModule) -> None:
    found = list(conds(rewritten))
    assert len(found) == 2
    for part, node in found:
        operands: Any = node.args[3]
        values = [operator.attrgetter(operand.target)(part) for operand in operands if operand.op == "get_attr"]
        assert not [value for value in values if isinstance(value, Tensor)]


@pytest.mark.parametrize("x", [1.0, -1.0])
@pytest.mark.parametrize("y", [1.0, -1.0])
def test_every_branch_gives_what_it_gave(
    program: ExportedProgram, rewritten: fx.GraphModule, x: float, y: float
) -> None:
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    values = torch.rand(5, 4) * x, torch.rand(5, 4) * y
    expected = program.module()(*values)
    torch.testing.assert_close(rewritten(*values), expected)
    compiled = ov.compile_model(
        ov.convert_model(TorchFXPythonDecoder(rewritten, dynamic_shapes=True)),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    got = torch.from_numpy(compiled([value.numpy() for value in values])[0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("index", [0, 1, -1])
def test_writing_at_one_place_without_an_assignment(dim: int, index: int) -> None:
    value = torch.randn(2, 3, 4)
    part = torch.randn(2, 3, 4).select(dim, 0)
    torch.testing.assert_close(select_scatter(value, part, dim, index), value.select_scatter(part, dim, index))


class Masked(nn.Module):
    """Attention under a mask, within a branch and without one."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attend = lambda x, mask: nn.functional.scaled_dot_product_attention(x, x, x, mask)  # noqa: E731
        result: Tensor = torch.cond(x.sum() > 0, attend, lambda x, mask: x * 1, (x, mask))
        return attend(result, mask)


@pytest.mark.parametrize("sign", [1, -1])
def test_queries_that_attend_to_nothing_get_zeros(sign: int) -> None:
    """As padding does, in a mask of booleans; OpenVINO alone gives NaN, which goes on to everything."""
    x = sign * torch.rand(2, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]]).bool().expand(2, 1, 4, 4).contiguous()
    program = torch.export.export(Masked(), (x, mask), strict=False)
    expected = program.module()(x, mask)
    assert not expected[:, :, 1].any()
    make_portable(program)
    converted = ov.convert_model(torch.export.export(_decomposed(program), (x, mask)))
    compiled = ov.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled((x.numpy(), mask.numpy()))[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Filled(nn.Module):
    """Booleans that are filled in, with either of the two."""

    def forward(self, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return value.masked_fill(mask, True), value.masked_fill(mask, False)


def test_filling_in_booleans_is_logic() -> None:
    """ONNX Runtime has no choice between booleans."""
    value, mask = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    program = torch.export.export(Filled(), (value, mask))
    assert make_portable(program) == 2
    assert not any("masked_fill" in str(node.target) for node in program.graph.nodes)
    found = program.module()(value, mask)
    assert [result.tolist() for result in found] == [[True, True, True, False], [False, False, True, False]]
