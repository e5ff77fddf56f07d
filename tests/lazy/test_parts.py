"""Parts of a pipeline that are no modules, as pipelines of other runtimes have them: objects whose calls go to `forward`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

import lazycompress
from lazycompress import InputError
from lazycompress.lazy.attach import attach, detach, handle_of
from lazycompress.lazy.calls import Reader
from lazycompress.lazy.engine import Engine
from lazycompress.plan.plan import even

from .models import STEPS, TIMES, Denoiser


class Answer(OrderedDict[str, Any]):
    """A mapping that pytrees do not know, with an attribute."""

    loaded_by = "somebody"


class Part:
    """Runs a denoiser; counts its runs."""

    def __init__(self) -> None:
        self.inside = Denoiser()
        self.runs = 0

    def forward(self, x: Tensor, timestep: Any, condition: Tensor) -> Answer:
        self.runs += 1
        return Answer(sample=self.inside(x, timestep, condition))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@torch.no_grad()
def run(part: Part) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6)
    condition = torch.ones(2, 5)
    for time in TIMES:
        answer = part(x, torch.full((2,), time), condition=condition)
        assert type(answer) is Answer
        x = x - answer["sample"] / STEPS
    return x


def test_a_part_skips_and_is_afterwards_as_it_was() -> None:
    part = Part()
    dense = run(part)
    part.runs = 0
    handle = attach(part, Engine(Reader.of(part), even(TIMES, 0.5, 1)))  # type: ignore[arg-type]
    assert handle_of(part) is handle
    lazy = run(part)
    assert part.runs == STEPS // 2
    assert handle.summary().skip_ratio == pytest.approx(0.5)
    assert 0 < float((lazy - dense).abs().max()) < 1
    handle.enabled = False
    assert torch.equal(run(part), dense)
    handle.enabled = True
    with pytest.raises(InputError, match=r"Part runs in a file and is not written alone"):
        lazycompress.save(part, "nowhere")  # type: ignore[arg-type]
    detach(part)
    assert handle_of(part) is None
    assert set(vars(part)) == {"inside", "runs"}
    assert torch.equal(run(part), dense)
