"""What a module engine computed and what it did not, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from ..report import render


@dataclass(frozen=True)
class CallSummary:
    """Reuse of whole calls since the last reset. `str()` gives a table.

    Attributes:
        calls: of the module.
        samples: that these calls had, added up.
        skipped: those of them that were not computed.
        unread: calls that were run as they are, because their samples could not be told apart.
        images: samples that began a new image.
        computed_calls: calls in which the module ran.
    """

    calls: int
    computed_calls: int
    samples: int
    skipped: int
    images: int
    unread: int

    @property
    def skip_ratio(self) -> float:
        """Share of the samples' calls that were not computed."""
        return self.skipped / max(self.samples, 1)

    @property
    def macs_ratio(self) -> float:
        """Computed multiply-accumulates as a share of those of computing everything."""
        return 1.0 - self.skip_ratio

    @property
    def runs(self) -> int:
        """What `skip_ratio` is a share of."""
        return self.samples

    def __str__(self) -> str:
        table = Table(title=f"whole calls, {self.calls} of them, {self.images} images")
        for header in ("", "computed", "skipped", "share"):
            table.add_column(header, justify="right" if header else "left", no_wrap=True)
        rows = (
            ("calls", self.computed_calls, self.calls - self.computed_calls),
            ("all samples", self.samples - self.skipped, self.skipped),
        )
        for name, computed, skipped in rows:
            table.add_row(name, str(computed), str(skipped), f"computed {computed / max(computed + skipped, 1):.1%}")
        if self.unread:
            table.add_row("run as they are", str(self.unread), "", "")
        return render(table)


@dataclass
class CallUsage:
    """Counts since the last reset."""

    calls: int = 0
    computed_calls: int = 0
    samples: int = 0
    skipped: int = 0
    images: int = 0
    unread: int = 0
    _by_time: dict[float, list[int]] = field(default_factory=dict)

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def add(self, times: Sequence[float], computed: Sequence[bool], new: Sequence[bool]) -> None:
        """Count one call: for each sample its timestep, whether it was computed, and whether it began an image."""
        self.calls += 1
        self.computed_calls += any(computed)
        self.samples += len(computed)
        self.skipped += len(computed) - sum(computed)
        self.images += sum(new)
        for time, done in zip(times, computed, strict=True):
            seen = self._by_time.setdefault(time, [0, 0])
            seen[0] += 1
            seen[1] += not done

    def add_dense(self, samples: int, read: bool = True) -> None:
        """Count one call that was run as it is."""
        self.calls += 1
        self.computed_calls += 1
        self.samples += samples
        self.unread += not read

    def skipped_at(self) -> dict[float, float]:
        """Share of the samples that were skipped, by timestep, in the order in which they came."""
        return {time: skipped / seen for time, (seen, skipped) in self._by_time.items()}

    def summary(self) -> CallSummary:
        return CallSummary(self.calls, self.computed_calls, self.samples, self.skipped, self.images, self.unread)
