"""Error to the dense images against computed MACs: lazy against fewer steps, on the bundled model.

`python -m tests.benchmarks.quality [--seeds 3] [--images 1000]`

One training run at 0.5 gives the whole frontier by moving the threshold; a training run at each target is the second row.
"""

from __future__ import annotations

import argparse

import torch
from rich.table import Table
from torch import Tensor

import lazycompress
from lazycompress.integrations.digits.classifier import load_classifier
from lazycompress.integrations.digits.data import all_digits
from lazycompress.integrations.digits.metrics import features, frechet_distance, mse_per_image
from lazycompress.integrations.digits.model import cycle_labels, digits_sampler, draw_noise, load_bundled
from lazycompress.report import render

TARGETS = (0.7, 0.5, 0.35, 0.25)
STEPS = 50


@torch.no_grad()
def sample(model: object, noise: Tensor, steps: int) -> Tensor:
    pairs = zip(noise.split(250), cycle_labels(len(noise)).split(250), strict=True)
    return torch.cat([digits_sampler(x, y, steps)(model) for x, y in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    model, classifier = load_bundled(), load_classifier()
    real = features(classifier, all_digits().images)
    table = Table(title=f"{options.images} fresh images, DDIM {STEPS} steps")
    for header in ("method", "seed", "target", "MACs", "mean MSE", "median", "99 %", "Frechet / dense"):
        table.add_column(header, justify="right")
    for seed in range(options.seeds):
        noise = draw_noise(options.images, 10_000 + seed)
        dense = sample(model, noise, STEPS)
        of_dense = frechet_distance(features(classifier, dense), real)

        def row(
            method: str,
            target: float,
            ratio: float,
            images: Tensor,
            seed: int = seed,
            dense: Tensor = dense,
            base: float = of_dense,
        ) -> None:
            errors = mse_per_image(images, dense)
            frechet = frechet_distance(features(classifier, images), real) / base
            table.add_row(
                method, str(seed), f"{target}", f"{ratio:.3f}", f"{errors.mean():.1e}", f"{errors.median():.1e}",
                f"{errors.quantile(0.99):.1e}", f"{frechet:.3f}",
            )  # fmt: skip

        shared = lazycompress.apply(model, "digits_dit.yaml", overrides={"train.seed": seed})
        for target in TARGETS:
            fewer = max(1, round(STEPS * target))
            row("fewer steps", target, fewer / STEPS, sample(model, noise, fewer))
            shared.set_target(target)
            shared.reset()
            images = sample(shared, noise, STEPS)
            row("threshold moved", target, shared.summary().macs_ratio, images)
            own = lazycompress.apply(model, "digits_dit.yaml", overrides={"train.seed": seed, "target": target})
            images = sample(own, noise, STEPS)
            row("trained", target, own.summary().macs_ratio, images)
        print(render(table), flush=True)


if __name__ == "__main__":
    main()
