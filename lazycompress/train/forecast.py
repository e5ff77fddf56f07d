"""What reuse gives, as a weighted sum of earlier computations: training prices forecasts and makes them by this rule."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]


def forecast_weights(times: Floats, computed: Steps, lazy: Steps, order: int) -> list[tuple[Floats, Steps]]:
    """The polynomial through the last computations, at steps that reuse: weights and steps of each of its points.

    Lagrange's form: through the last `order + 1` computations, or as many as there are. Every step in `lazy` has one before.

    Returns:
        The last computation, the one before it, and so on: weights [lazy], steps [lazy]. A point that there is none of weighs
        nothing.
    """
    last = np.searchsorted(computed, lazy, side="right") - 1
    points = [computed[np.maximum(last - k, 0)] for k in range(order + 1)]
    found = []
    for i, point in enumerate(points):
        weights = (last >= i).astype(np.float64)
        for j, other in enumerate(points):
            if i != j:
                use = (last >= j) & (last >= i)
                gap = np.where(use, times[point] - times[other], 1.0)
                weights *= np.where(use, (times[lazy] - times[other]) / gap, 1.0)
        found.append((weights, point))
    return found
