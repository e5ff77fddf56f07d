"""A forecast: along the line through the last two outputs, but half as far."""

from __future__ import annotations

from collections.abc import Sequence

points = 2


def weights(times: Sequence[float], at: float) -> list[float]:
    if len(times) == 1:
        return [1.0]
    step = 0.5 * (at - times[0]) / (times[0] - times[1])
    return [1.0 + step, -step]
