"""What each stage cost and what it bought: one row a stage, one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from ..report import render


@dataclass(frozen=True)
class StageRow:
    """A model after one more stage, compared with the dense float32 one.

    Attributes:
        stage: what was done last.
        mean: mean over images of the mean squared error to the dense float32 images.
        median: the median of it.
        frechet: Frechet distance to real images, or None.
        size: bytes on disk, weights and gates.
        macs: computed multiply-accumulates over a whole run, as a share of the dense model's.
        latency: seconds of one sampling run.
    """

    stage: str
    mean: float
    median: float
    frechet: float | None
    size: int
    macs: float
    latency: float


def accuracy_table(rows: Sequence[StageRow], title: str = "what each stage cost and bought") -> str:
    """The rows as a table in plain text; the first one is the dense float32 model that the others are compared with."""
    table = Table(title=title)
    headers = ("stage", "MSE, mean", "median", "Frechet", "to dense", "MB", "share", "MACs", "latency, ms", "faster")
    for header in headers:
        table.add_column(header, justify="left" if header == "stage" else "right", no_wrap=True)
    for row in rows:
        first = rows[0]
        known = row.frechet is not None and first.frechet is not None
        table.add_row(
            row.stage, _error(row.mean), _error(row.median),
            "" if row.frechet is None else f"{row.frechet:.2f}",
            f"{row.frechet / first.frechet:.3f}" if known and row.frechet and first.frechet else "",
            f"{row.size / 1e6:.2f}", f"{row.size / max(first.size, 1):.3f}", f"{row.macs:.3f}",
            f"{1e3 * row.latency:.0f}", f"{first.latency / max(row.latency, 1e-9):.2f}x",
        )  # fmt: skip
    return render(table)


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
