"""Statistics of what was computed and what was reused, as numbers and as a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


class NamedBranch(Protocol):
    """What a table needs to know of a branch."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def macs(self) -> int: ...


@dataclass(frozen=True)
class Summary:
    """Reuse per branch since the last reset. `str()` gives a table.

    Attributes:
        skip_ratio: share of branch runs that were reused, over samples, steps and branches.
        macs_ratio: computed branch MACs as a share of all branch MACs.
        reused: per branch, the share of its runs that were reused.
        calls: of the model.
        dense: those of them that the model itself ran, and no graph.
    """

    branches: Sequence[NamedBranch]
    skip_ratio: float
    macs_ratio: float
    reused: list[float]
    calls: int
    dense: int = 0

    @property
    def runs(self) -> int:
        """What `skip_ratio` is a share of."""
        return self.calls * len(self.branches)

    def __str__(self) -> str:
        total = sum(branch.macs for branch in self.branches)
        table = Table(title=f"{len(self.branches)} branches, {self.calls} calls")
        for header, right in (("branch", False), ("kind", False), ("MMACs", True), ("share", True), ("reused", True)):
            table.add_column(header, justify="right" if right else "left", no_wrap=True)
        for branch, reused in zip(self.branches, self.reused, strict=True):
            table.add_row(
                branch.name, branch.kind, f"{branch.macs / 1e6:.3f}", f"{branch.macs / total:.1%}",
                f"{reused:.1%}",
            )  # fmt: skip
        table.add_section()
        table.add_row(
            "all", "", f"{total / 1e6:.3f}", f"computed {self.macs_ratio:.1%}", f"{self.skip_ratio:.1%}", style="bold"
        )
        if self.dense:
            table.add_row("calls run as they are", "", "", str(self.dense), "")
        return render(table)


def render(table: Table) -> str:
    """A rich table as plain text."""
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(table)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue().rstrip()


@dataclass
class Usage:
    """Decisions since the last reset, per timestep and branch."""

    macs: list[int]
    reused: dict[float, Tensor] = field(default_factory=dict)
    seen: dict[float, int] = field(default_factory=dict)
    calls: int = 0
    dense: int = 0
    dense_samples: int = 0

    def clear(self) -> None:
        self.reused.clear()
        self.seen.clear()
        self.calls = self.dense = self.dense_samples = 0

    def add_dense(self, samples: int) -> None:
        """Count one call of so many samples that the model itself ran."""
        self.calls += 1
        self.dense += 1
        self.dense_samples += samples

    def add(self, timestep: Tensor, lazy: Tensor) -> None:
        """Count one call: timesteps [batch], decisions [branches, batch]."""
        self.calls += 1
        for time in torch.unique(timestep.detach()).tolist():
            of_time = lazy[:, timestep == time]
            self.reused[time] = self.reused.get(time, torch.zeros(len(self.macs))) + of_time.sum(dim=1).cpu()
            self.seen[time] = self.seen.get(time, 0) + of_time.shape[1]

    def heatmap(self) -> tuple[list[float], Tensor]:
        """Timesteps in sampling order, and the share of samples that reused, [timesteps, branches]."""
        times = list(self.reused)
        if not times:
            return [], torch.zeros(0, len(self.macs))
        return times, torch.stack([self.reused[t] / self.seen[t] for t in times])

    def summary(self, branches: Sequence[NamedBranch]) -> Summary:
        runs = sum(self.seen.values()) + self.dense_samples
        reused = sum(self.reused.values(), torch.zeros(len(self.macs)))
        shares = (reused / max(runs, 1)).tolist()
        total = sum(self.macs)
        saved = sum(share * macs for share, macs in zip(shares, self.macs, strict=True))
        mean = sum(shares) / max(len(shares), 1)
        return Summary(branches, mean, 1.0 - saved / max(total, 1), shares, self.calls, self.dense)
