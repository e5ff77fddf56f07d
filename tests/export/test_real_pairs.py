"""Complex numbers within a program become pairs of real ones, and nothing that is given changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from lazycompress.errors import ExportError
from lazycompress.export.portable import make_portable
from lazycompress.export.real_pairs import to_real_pairs


def pairs_of(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def back(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten(-2)


def in_branches(x: Tensor, angles: Tensor) -> Tensor:
    turned = lambda x, a: back(pairs_of(x) * a)  # noqa: E731
    result: Tensor = torch.cond(x.sum() > 0, turned, lambda x, a: x * torch.view_as_real(a).sum(), (x, angles))
    return result


def complex_from_a_branch(x: Tensor, angles: Tensor) -> Tensor:
    chosen = torch.cond(x.sum() > 0, lambda a: (a * a).unsqueeze(0), lambda a: a.unsqueeze(0) + a, (angles,))
    return back(pairs_of(x) * chosen)


def in_parts(x: Tensor, angles: Tensor) -> Tensor:
    first, second = angles.split([1, 3], -1)
    joined = torch.cat([second, first.expand(-1, 1), first], -1)[:, 1:]
    return back(pairs_of(x) * joined.transpose(0, 1).reshape(-1, 6).flatten().view(6, 4)[None].permute(0, 1, 2))


#: Of x, float32 [batch, 6, 8], and a buffer of angles, complex64 [6, 4].
CASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "rotary positions": lambda x, a: back(pairs_of(x) * a.unsqueeze(0)),
    "a product with real numbers": lambda x, a: back(a * x[:1, :, :4] * 2.0 + pairs_of(x)),
    "polar": lambda x, a: back(pairs_of(x) * torch.polar(torch.ones_like(x[..., :4]), x[..., :4])),
    "real, imaginary, conjugate": lambda x, a: (pairs_of(x).conj() * a).real + torch.complex(x, -x).imag[..., :4],
    "chosen positions": lambda x, a: back(pairs_of(x) * a[torch.tensor([5, 4, 3, 2, 1, 0])]),
    "gathered": lambda x, a: back(pairs_of(x) * a.gather(0, torch.arange(24).reshape(6, 4) % 6)),
    "other precision": lambda x, a: back(pairs_of(x) * a.to(torch.complex128).to(torch.complex64)),
    "from real numbers and back": lambda x, a: (pairs_of(x) * x[..., :4].to(torch.complex64) * a).to(torch.float32),
    "several results": lambda x, a: [part.real for part in (pairs_of(x) * a).unbind(-1)],
    "moved": in_parts,
    "in branches": in_branches,
    "from a branch": complex_from_a_branch,
}


class Model(nn.Module):
    angles: Tensor

    def __init__(self, compute: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.compute = compute
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("angles", torch.polar(torch.ones(6, 4), torch.randn(6, 4, generator=generator)))

    def forward(self, x: Tensor) -> Any:
        return self.compute(x, self.angles)


def program_of(compute: Callable[[Tensor, Tensor], Any]) -> ExportedProgram:
    program = torch.export.export(
        Model(compute), (torch.randn(3, 6, 8),), dynamic_shapes=({0: Dim.AUTO},), strict=False
    )
    make_portable(program)
    return program


def complex_values(program: ExportedProgram) -> list[str]:
    parts = [part for part in program.graph_module.modules() if isinstance(part, fx.GraphModule)]
    return [
        node.name
        for part in parts
        for node in part.graph.nodes
        if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(node.meta.get("val")))
    ]


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("name", CASES)
def test_the_same_without_complex_numbers(name: str) -> None:
    reference = program_of(CASES[name]).module()
    program = program_of(CASES[name])
    assert complex_values(program)
    model = to_real_pairs(program).module()
    assert not complex_values(program)
    assert not [name for name, value in program.state_dict.items() if value.is_complex()]
    for batch in (2, 3, 5):
        for x in (torch.rand(batch, 6, 8), -torch.rand(batch, 6, 8)):
            torch.testing.assert_close(model(x), reference(x))


def test_a_program_without_is_left_alone() -> None:
    program = program_of(lambda x, a: x * 2)
    before = str(program.graph)
    assert str(to_real_pairs(program).graph) == before


def test_an_unknown_way_is_one_line() -> None:
    with pytest.raises(ExportError, match=r"aten\.mul") as caught:
        to_real_pairs(program_of(lambda x, a: back(pairs_of(x) * a * 2j)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "compute", [lambda x, a: torch.fft.fft(x).real, lambda x, a: pairs_of(x) * a], ids=["no rule", "given"]
)
def test_a_program_that_cannot_is_left_alone(compute: Callable[[Tensor, Tensor], Any]) -> None:
    program = program_of(compute)
    to_real_pairs(program)
    x = torch.randn(3, 6, 8)
    torch.testing.assert_close(program.module()(x), Model(compute)(x))
