"""The main job, end to end, on the bundled model: learn gates, export, sample four ways, compare."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import lazycompress

from ...places import DEMO, seal, whole_folder
from ...report import render
from ...runtime import LazyModel
from .classifier import load_classifier
from .data import all_digits
from .figures import image_grid, reuse_heatmap
from .metrics import features, frechet_distance, label_accuracy, mse_per_image
from .model import cycle_labels, digits_sampler, draw_noise, load_bundled

RECIPE = "digits_dit.yaml"
SEED = 2026  # of the noise that is sampled; training draws its own
BATCH = 100


@dataclass(frozen=True)
class Row:
    """One way of sampling: how good, how close to the dense 50 steps, what it cost."""

    name: str
    frechet: float
    accuracy: float
    mse: float
    mse_median: float
    gmacs: float
    macs_ratio: float
    skip_ratio: float
    seconds: float


def run_demo(directory: Path, images: int = 2000, steps: int = 50, *, overwrite: bool = False) -> list[Row]:
    """Run it and write `table.txt`, `table.json`, `samples.png`, `reuse.png`, `gates/` and `openvino/` to `directory`.

    Args:
        directory: where to; written whole or not at all.
        images: of each way of sampling.
        steps: of the dense model.
        overwrite: replace an earlier demo.

    Raises:
        LazyCompressError: the folder is not ours to replace or cannot be written, or the OpenVINO extra is missing.
    """
    with whole_folder(directory, DEMO, overwrite) as folder:
        rows = _run(folder, images, steps)
        seal(folder, DEMO, {})
    print(f"written to {directory}: table.txt, table.json, samples.png, reuse.png, gates/, openvino/")
    return rows


def _run(directory: Path, images: int, steps: int) -> list[Row]:
    from ...export.openvino_runner import OpenVINORunner

    model = load_bundled()
    started = time.perf_counter()
    lazy: LazyModel = lazycompress.apply(model, RECIPE, overrides={"units": "branches"})
    print(lazy.training_report)
    lazycompress.save(lazy, directory / "gates")
    lazycompress.export(lazy, directory / "openvino", format="openvino", telemetry=True)
    runner = OpenVINORunner(directory / "openvino")
    print(f"learned and exported in {time.perf_counter() - started:.0f} s")

    noise, labels = draw_noise(images, SEED), cycle_labels(images)
    sets: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}

    def sample(name: str, denoiser: Any, count: int) -> None:
        before = time.perf_counter()
        sets[name] = _sample(name, denoiser, noise, labels, count)
        seconds[name] = time.perf_counter() - before

    dense, half = f"dense {steps} steps", f"dense {steps // 2} steps"
    in_torch, in_openvino = f"lazy {steps} steps (torch)", f"lazy {steps} steps (OpenVINO)"
    sample(dense, model, steps)
    sample(half, model, steps // 2)
    lazy.reset()
    sample(in_torch, lazy, steps)
    sample(in_openvino, runner, steps)

    per_call = lazy.dense_macs
    summary, from_file = lazy.summary(), runner.summary()
    computed = {
        dense: (1.0, 0.0),
        half: (0.5, 0.0),
        in_torch: (_whole_ratio(lazy, summary.macs_ratio), summary.skip_ratio),
        in_openvino: (_whole_ratio(lazy, from_file.macs_ratio), from_file.skip_ratio),
    }
    classifier = load_classifier()
    real = features(classifier, all_digits().images)
    rows = []
    for name, images_of in sets.items():
        ratio, skip = computed[name]
        errors = mse_per_image(images_of, sets[dense])
        rows.append(
            Row(
                name,
                frechet_distance(features(classifier, images_of), real),
                label_accuracy(classifier, images_of, labels),
                float(errors.mean()),
                float(errors.median()),
                per_call * steps * ratio / 1e9,
                ratio,
                skip,
                seconds[name],
            )
        )
    times, shares = lazy.usage.heatmap()
    reuse_heatmap(directory / "reuse.png", shares, times, [branch.name for branch in lazy.branches])
    image_grid(directory / "samples.png", sets, rows=10, cols=10)
    text = f"{summary}\n\n{_table(rows, images)}\n"
    (directory / "table.txt").write_text(text, encoding="utf-8")
    (directory / "table.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    print(text)
    return rows


def _whole_ratio(lazy: LazyModel, branches_ratio: float) -> float:
    """MACs of the whole model as a share of dense, from the share of the branches' MACs that was computed."""
    in_branches = sum(branch.macs for branch in lazy.branches) / lazy.dense_macs
    return 1.0 - in_branches * (1.0 - branches_ratio)


@torch.no_grad()
def _sample(name: str, denoiser: Callable[..., Any], noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    parts = []
    for first in tqdm(range(0, len(noise), BATCH), desc=name, unit="batch"):
        cut = slice(first, first + BATCH)
        parts.append(digits_sampler(noise[cut], labels[cut], steps)(denoiser))
    return torch.cat(parts)


def _table(rows: list[Row], images: int) -> str:
    table = Table(title=f"{images} images from the same noise")
    for header in ("", "Frechet", "accuracy", "MSE", "median", "GMACs/image", "MACs", "skipped", "seconds"):
        table.add_column(header, justify="left" if not header else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name, f"{row.frechet:.3f}", f"{row.accuracy:.1%}", f"{row.mse:.1e}", f"{row.mse_median:.1e}",
            f"{row.gmacs:.2f}", f"{row.macs_ratio:.2f}", f"{row.skip_ratio:.1%}", f"{row.seconds:.0f}",
        )  # fmt: skip
    return render(table)
