"""Programs in a converter's operations compute what they computed before, whichever way they were rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.decomp_utils import CustomDecompTable

from lazycompress.export.decompose import decompose

_library = torch.library.Library("lazycompress_tests", "DEF")  # type: ignore[no-untyped-call]
_library.define("ramp(Tensor x) -> Tensor")
_library.define("half(Tensor x) -> Tensor")
_library.define("walk(Tensor x) -> Tensor")
_library.impl("ramp", lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), "CompositeImplicitAutograd")
_library.impl("half", lambda x: x * torch.tensor(0.5), "CompositeImplicitAutograd")


def _walk(x: Tensor) -> Tensor:
    y = x * 2
    z = y + 1
    y.add_(z)
    y.mul_(3)
    y.copy_(y * z)
    return y + z


_library.impl("walk", _walk, "CompositeImplicitAutograd")
_own: Any = torch.ops.lazycompress_tests


def in_a_branch(x: Tensor) -> Tensor:
    inner: Callable[[Tensor], Tensor] = lambda y: torch.layer_norm(y.reshape(-1, 4), [4]).reshape(y.shape) + 1  # noqa: E731
    result: Tensor = torch.cond(x.sum() > 0, inner, lambda y: torch.einsum("bi,bj->bj", y, y), (x,))
    return result


def writes(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, ::2] = 0
    return y + 1


CASES: dict[str, Callable[[Tensor], Any]] = {
    "a norm": lambda x: torch.layer_norm(x, [4]),
    "a norm of squares": lambda x: nn.functional.rms_norm(x, [4]),
    "a norm of squares with weights": lambda x: nn.functional.rms_norm(x, [4], x[0], 0.5),
    "writing into its own": lambda x: _own.walk(x),
    "one operation in several ways": lambda x: x.softmax(0) + x.softmax(1) + x.repeat(1, 2).softmax(1)[:, :4],
    "several results": lambda x: torch.var_mean(x, dim=1),
    "parts": lambda x: [part * 2 for part in x.chunk(2, dim=1)],
    "an output that is its input": lambda x: (torch.dropout(x, 0.5, False), torch.dropout(x, 0.5, False)),
    "all elements": lambda x: x.reshape(-1).cumsum(0),
    "their number": lambda x: x.sum() / x.numel(),
    "their steps": lambda x: x * x.stride(0),
    "a body": in_a_branch,
    "writing": writes,
    "a number of its own": lambda x: _own.half(x),
    "numbers of its own": lambda x: _own.ramp(x),
}
LEFT = {"writing", "numbers of its own", "their steps"}
"""These are not traced node by node."""


class Model(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(x)


def program_of(compute: Callable[[Tensor], Any]) -> ExportedProgram:
    return torch.export.export(Model(compute), (torch.randn(3, 4),), dynamic_shapes=({0: Dim.AUTO},), strict=False)


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same_for_any_batch(name: str) -> None:
    program = program_of(CASES[name])
    done = decompose(program, CustomDecompTable())  # type: ignore[no-untyped-call]
    run = done.module()
    for batch in (2, 3, 5):
        for x in (torch.randn(batch, 4), torch.ones(batch, 4), -torch.ones(batch, 4)):
            torch.testing.assert_close(run(x), CASES[name](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(CASES) - LEFT))
def test_no_operation_of_the_table_is_left(name: str) -> None:
    table: Any = CustomDecompTable()  # type: ignore[no-untyped-call]
    done = decompose(program_of(CASES[name]), table)
    parts = [part for part in done.graph_module.modules() if isinstance(part, fx.GraphModule)]
    left = {node.target for part in parts for node in part.graph.nodes if node.op == "call_function"}
    assert not {target for target in left if target in table} - {torch.ops.aten.sym_size.int}
    assert torch.ops.aten.sym_numel.default not in left
    assert {node.name for node in done.graph.nodes} >= {spec.arg.name for spec in done.graph_signature.output_specs}


@pytest.mark.parametrize("name", sorted(set(CASES) - LEFT))
def test_nodes_are_traced_alone_unless_they_cannot(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(CASES[name])
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *_: pytest.fail("traced as a whole"))
    assert decompose(program, CustomDecompTable()) is program  # type: ignore[no-untyped-call]
