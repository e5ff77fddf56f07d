"""An export format: PyTorch's own `.pt2`, which keeps no state. Its runner carries the caches from call to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lazycompress import ExportError
from lazycompress.export.card import FileBranch, Output, fresh_state, tensors_of
from lazycompress.export.trace import TracedModel
from lazycompress.report import Summary, Usage

STATEFUL, ROUNDING = False, 1e-5


def write_traced(
    traced: TracedModel, folder: Path, *, stateful: bool, telemetry: bool, weights: str, stages: Sequence[str]
) -> Mapping[str, Any]:
    if weights != "f32":
        raise ExportError(f"a .pt2 file stores weights as they are; leave out weights={weights!r}")
    graph = traced.program.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        graph.erase_node(node)  # of the samples that compute: where none does, as may be, it does not hold
    torch.export.save(traced.program, folder / "model.pt2")
    return {}


def open_folder(folder: Path, card: Mapping[str, Any]) -> Pt2Runner:
    return Pt2Runner(torch.export.load(folder / "model.pt2").module(), card)


class Pt2Runner:
    def __init__(self, program: Any, card: Mapping[str, Any]) -> None:
        self.program, self.card = program, card
        self.branches = [FileBranch(**branch) for branch in card["branches"]]
        self.usage = Usage([branch.macs for branch in self.branches])
        self.past: list[Any] = []

    def __call__(self, **inputs: Any) -> Output:
        known = tensors_of(inputs, self.card["inputs"])
        given = [known[name] for name in self.card["inputs"]]
        batch = len(known[self.card["latents"]])
        if not self.past or len(self.past[0]) != batch:
            self.past = [torch.from_numpy(fresh_state(entry, batch)) for entry in self.card["state"]]
        with torch.no_grad():
            results = self.program(*given, *self.past)
        count = len(self.card["outputs"])
        self.past = list(results[count:-1])
        if self.card["telemetry"]:
            self.usage.add(known[self.card["timestep"]].float().expand(batch), results[-1])
        return Output(zip(self.card["outputs"], results[:count], strict=True))

    def twin(self) -> Pt2Runner:
        other = Pt2Runner(self.program, self.card)
        other.usage = self.usage
        return other

    def reset(self) -> None:
        self.past = []
        self.usage.clear()

    def summary(self) -> Summary:
        return self.usage.summary(self.branches)
