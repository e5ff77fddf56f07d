"""Figures as PNG files, drawn with matplotlib's objects directly: no display, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 150
_GAP = 1  # pixels of background between two cells


def image_grid(path: Path, sets: Mapping[str, torch.Tensor], rows: int, cols: int) -> None:
    """Writes a PNG with sets of images side by side: image ``i`` of every set is in the same cell of its panel.

    Args:
        path: the file to write; its folder is made.
        sets: title -> images ``[N, 1, H, W]`` in ``[-1, 1]`` (clamped); the first ``rows * cols`` of them are drawn.
        rows: cells from top to bottom.
        cols: cells from left to right.

    Raises:
        ValueError: there is no set, ``rows`` or ``cols`` is below 1, or a set has too few images or another shape.
    """
    if not sets or rows < 1 or cols < 1:
        raise ValueError(f"Nothing to draw: {len(sets)} sets in {rows} x {cols} cells.")
    panel_width = max(0.36 * cols, 0.09 * max(map(len, sets))) + 0.3  # no narrower than its title
    figure = Figure(figsize=(len(sets) * panel_width, 0.36 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, (title, images) in zip(panels, sets.items(), strict=True):
        axes.imshow(_tile(title, images, rows, cols), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    _save(figure, path)


def reuse_heatmap(
    path: Path,
    decisions: np.ndarray | torch.Tensor,
    timesteps: Sequence[float],
    branch_names: Sequence[str],
    title: str = "Share of samples that reuse the previous step's output",
) -> None:
    """Writes a PNG heat map of which branch reuses at which step: time runs to the right, depth downwards.

    Args:
        path: the file to write; its folder is made.
        decisions: ``[steps, branches]``, the share of samples that reused: 0 (all computed) .. 1 (all reused).
        timesteps: one per step, in the order of sampling.
        branch_names: one per branch, in the order of the model.
        title: above the map; the overall share is added to it.

    Raises:
        ValueError: the lengths do not fit, or a share is outside 0..1.
    """
    shares = np.asarray(decisions, dtype=np.float64)
    if shares.shape != (len(timesteps), len(branch_names)) or not shares.size:
        raise ValueError(
            f"Expected decisions [{len(timesteps)} steps, {len(branch_names)} branches], got {list(shares.shape)}."
        )
    if not (shares.min() >= 0 and shares.max() <= 1):
        raise ValueError(f"Shares are in 0..1, these are in {shares.min()}..{shares.max()}.")
    steps, branches = shares.shape
    longest_name = max(map(len, branch_names))
    width = min(max(0.17 * steps, 4.5), 12) + 0.075 * longest_name + 1.2
    figure = Figure(figsize=(width, 0.22 * branches + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares.T, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    stride = max(1, round(steps / 17))  # more labels than that overlap
    shown = range(0, steps, stride)
    axes.set_xticks(list(shown), [f"{float(timesteps[i]):g}" for i in shown], fontsize=8, rotation=45)
    axes.set_yticks(range(branches), list(branch_names), fontsize=8)
    axes.set_xlabel("timestep (sampling runs to the right)")
    axes.set_ylabel("branch")
    axes.set_title(f"{title}\noverall {shares.mean():.1%}", fontsize=10)
    figure.colorbar(image, ax=axes, label="reused")
    _save(figure, path)


def _tile(title: str, images: torch.Tensor, rows: int, cols: int) -> np.ndarray:
    """One picture ``[rows * (H + gap) - gap, cols * (W + gap) - gap]`` out of ``rows * cols`` images."""
    if images.ndim != 4 or images.shape[1] != 1 or len(images) < rows * cols:
        raise ValueError(f"{title!r}: expected at least {rows * cols} images [N, 1, H, W], got {list(images.shape)}.")
    height, width = images.shape[2:]
    cells = images[: rows * cols, 0].detach().float().clamp(-1, 1).cpu()
    # NaN is drawn in the figure's background colour, so that black images keep a visible border.
    padded = torch.full((rows, cols, height + _GAP, width + _GAP), float("nan"))
    padded[:, :, :height, :width] = cells.reshape(rows, cols, height, width)
    picture = padded.permute(0, 2, 1, 3).reshape(rows * (height + _GAP), cols * (width + _GAP))
    return picture[:-_GAP, :-_GAP].numpy()


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, format="png")
