"""Any sequence of calls, played in a file and in torch: both have to agree on every call."""

from __future__ import annotations

from typing import Any, Protocol

import openvino as ov
import torch
from hypothesis import strategies as st
from torch import Tensor

from lazycompress.export.trace import Granularity
from lazycompress.runtime import LazyModel
from tests.export_models import Reference, small_inputs

TIMES = list(range(980, -1, -20))

#: What may happen next: kind, and numbers to choose with.
events = st.lists(
    st.tuples(
        st.sampled_from(["next", "next", "next", "repeat", "image", "prompt", "one", "batch", "reset", "request"]),
        st.integers(0, 7),
    ),
    min_size=3,
    max_size=14,
)


class File(Protocol):
    """One state of a file that runs."""

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sample, and the decisions [branches, batch]."""

    def reset(self) -> None: ...

    def twin(self) -> File:
        """Another state of the same file."""


class PlainOpenVINO:
    """The plain OpenVINO API: one infer request."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self.compiled = compiled
        self.request = compiled.create_infer_request()

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        results = self.request.infer({name: value.numpy() for name, value in inputs.items()})
        return torch.tensor(results["sample"]), torch.tensor(results["lazy_decisions"])

    def reset(self) -> None:
        self.request.reset_state()

    def twin(self) -> File:
        return PlainOpenVINO(self.compiled)


class Runner:
    """A runner of ours; its statistics tell how many samples of a branch reused."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self.runner.usage.clear()
        sample = self.runner(**inputs).sample
        return sample.clone(), sum(self.runner.usage.reused.values())

    def reset(self) -> None:
        self.runner.reset()

    def twin(self) -> File:
        return Runner(self.runner.twin())


def play(
    file: File, lazy: LazyModel, sequence: list[tuple[str, int]], tolerance: float, decide: Granularity = "sample"
) -> None:
    """Run a sequence in both; every call must agree."""
    form = "flat" if decide == "sample" else "lowered"
    pairs = [(file, Reference(lazy, form, decide))]
    request, reference = pairs[0]
    batch, step, label, seed, last = 2, 0, 0, 0, 0
    for kind, number in [("next", 0), *sequence]:
        if kind == "next":
            step = min(step + 1 + number // 6, len(TIMES) - 1)
            seed += 1
        elif kind == "image":
            step, seed = 0, seed + 10
        elif kind == "prompt":  # a run is left and another one begins, half-way
            label, step = label + 1 + number % 3, min(step + 1 + number, len(TIMES) - 1)
        elif kind == "one":  # the last sample begins another image, the others go on
            last, step = last + 1, min(step + 1, len(TIMES) - 1)
        elif kind == "batch":
            batch, step = 1 + number % 4, min(step + 1, len(TIMES) - 1)
        elif kind == "reset":
            request.reset()
            reference.reset()
        elif kind == "request":
            if len(pairs) < 2:
                pairs.append((file.twin(), Reference(lazy, form, decide)))
            request, reference = pairs[number % len(pairs)]
        inputs = small_inputs(batch, TIMES[step], seed % 3, label, last)
        expected, decisions = reference(**inputs)
        sample, taken = request(inputs)
        assert torch.equal(taken, decisions if taken.dim() == 2 else decisions.sum(dim=1)), (kind, number)
        difference = float((sample - expected).abs().max() / expected.abs().max())
        assert difference < tolerance, (kind, number, difference)
