"""Figures as PNG files, drawn with matplotlib's objects directly: no display, no global state."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 150


def labelled_grid(path: Path, rows: Mapping[str, torch.Tensor], columns: Sequence[str]) -> None:
    """Writes pictures as a PNG, a row for each way of making them and a column for each prompt.

    Args:
        path: the file to write.
        rows: title -> pictures ``[N, 3, H, W]`` in ``0..1``.
        columns: N titles; long ones are broken.
    """
    figure = Figure(figsize=(1.1 * len(columns) + 1.6, 1.1 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (title, images) in zip(cells, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(textwrap.fill(title, 16), rotation=0, ha="right", va="center", fontsize=8)
    for axes, title in zip(cells[0], columns, strict=True):
        axes.set_title(textwrap.fill(title, 15), fontsize=7)
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


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, format="png")
