"""Trains the bundled models: ``python -m lazycompress.integrations.digits.train --out DIR``.

First the classifier (seconds), then the DiT (about 20 minutes on two CPU cores), or, with ``--model flow``, the flow model
alone (about 10 minutes). Kill it at any time and go on with
``--resume``: every step draws its batch from the seed and its own number, so a resumed run gives the weights of an
uninterrupted one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from .classifier import DigitClassifier, load_classifier, save_classifier, train_classifier
from .data import Digits, all_digits, train_test_digits
from .flow import FlowDiT, flow_loss, flow_sampler, load_flow, save_flow
from .metrics import features, frechet_distance, label_accuracy
from .model import (
    NULL_CLASS,
    SCHEDULER_CONFIG,
    build_model,
    build_scheduler,
    cycle_labels,
    digits_sampler,
    draw_noise,
    load_model,
    save_model,
)

CHECKPOINT_FILE = "checkpoint.pt"
CHECKPOINT_EVERY = 250
WARMUP_STEPS = 200
PEAK_LR = 1e-3
EMA_DECAY = 0.999
LABEL_DROPOUT = 0.1

_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up to ``PEAK_LR``, then a cosine down to zero at ``steps``."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LR * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def draw_batch(digits: Digits, batch: int, generator: torch.Generator) -> _Batch:
    """Images ``[B, 1, 8, 8]``, labels (a tenth of them dropped) and timesteps (both int64 ``[B]``), and noise."""
    rows = torch.randint(len(digits.labels), (batch,), generator=generator)
    dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
    labels = digits.labels[rows].masked_fill(dropped, NULL_CLASS)
    timesteps = torch.randint(SCHEDULER_CONFIG["num_train_timesteps"], (batch,), generator=generator)
    images = digits.images[rows]
    return images, labels, timesteps, torch.randn(images.shape, generator=generator)


def epsilon_loss(model: nn.Module, scheduler: Any, batch: _Batch) -> torch.Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, arXiv 2006.11239, equation 14): a scalar."""
    images, labels, timesteps, noise = batch
    noisy = scheduler.add_noise(images, noise, timesteps)
    return F.mse_loss(model(hidden_states=noisy, timestep=timesteps, class_labels=labels).sample, noise)


@dataclass(frozen=True)
class Task:
    """What to train: how a model is built, what it minimises on a batch, how it is stored in a folder."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, _Batch], torch.Tensor]
    save: Callable[[nn.Module, Path], None]


def velocity_loss(model: nn.Module, batch: _Batch) -> torch.Tensor:
    """Rectified flow, with the batch's timesteps moved to the middle of their bins as sigmas: a scalar."""
    images, labels, timesteps, noise = batch
    sigma = (timesteps + 0.5) / SCHEDULER_CONFIG["num_train_timesteps"]
    return flow_loss(model, images, labels, noise, sigma)


_scheduler = build_scheduler()
DIT = Task(build_model, lambda model, batch: epsilon_loss(model, _scheduler, batch), save_model)
FLOW = Task(FlowDiT, velocity_loss, lambda model, out: save_flow(model, out / "flow.safetensors"))


def train(task: Task, digits: Digits, steps: int, batch: int, seed: int, out: Path, resume: bool) -> nn.Module:
    """Trains a new model, or goes on from the checkpoint in ``out``; writes the averaged weights there as it goes.

    Returns:
        The averaged (EMA) model, float32.

    Raises:
        ValueError: the checkpoint was made with other settings.
    """
    settings = {"steps": steps, "batch": batch, "seed": seed}
    checkpoint = out / CHECKPOINT_FILE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, averaged = task.build(), task.build()
    averaged.load_state_dict(model.state_dict())
    averaged.requires_grad_(False)
    # diffusers gives every block a label embedding of its own, and in training mode each drops labels independently of
    # the others: hardly a sample would be unconditional as a whole. They are kept quiet, and draw_batch drops labels.
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    first = 0
    if resume and checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(f"{checkpoint} was made with {state['settings']}, not with {settings}.")
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    recent = float("nan")
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="training", unit="step", mininterval=2)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = task.loss(model, draw_batch(digits, batch, generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))  # forgets the initial weights quickly
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        recent = loss.item() if math.isnan(recent) else 0.98 * recent + 0.02 * loss.item()
        progress.set_postfix(loss=f"{recent:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = {
                "settings": settings,
                "step": step + 1,
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            partial = checkpoint.with_suffix(".partial")  # being killed while writing must not cost the old checkpoint
            torch.save(state, partial)
            partial.replace(checkpoint)
            task.save(averaged, out)
    return averaged


@torch.no_grad()
def evaluation_loss(model: nn.Module, digits: Digits, repeats: int = 8, seed: int = 1) -> float:
    """Mean epsilon loss over ``digits`` with their labels, over ``repeats`` fixed draws of timesteps and noise."""
    generator = torch.Generator().manual_seed(seed)
    scheduler = build_scheduler()
    losses = []
    for _ in range(repeats):
        timesteps = torch.randint(SCHEDULER_CONFIG["num_train_timesteps"], digits.labels.shape, generator=generator)
        noise = torch.randn(digits.images.shape, generator=generator)
        losses.append(epsilon_loss(model, scheduler, (digits.images, digits.labels, timesteps, noise)).item())
    return sum(losses) / repeats


@torch.no_grad()
def sample_quality(
    model: nn.Module, classifier: DigitClassifier, n: int = 2000, steps: int = 50, batch: int = 250
) -> tuple[float, float]:
    """Label accuracy of ``n`` conditional DDIM samples (no guidance), and their Frechet distance to all real digits."""
    noise, labels = draw_noise(n), cycle_labels(n)
    parts = [
        digits_sampler(x, y, steps)(model)
        for x, y in tqdm(
            zip(torch.split(noise, batch), torch.split(labels, batch), strict=True),
            total=math.ceil(n / batch),
            desc=f"sampling, {steps} steps",
            unit="batch",
        )
    ]
    images = torch.cat(parts)
    real = features(classifier, all_digits().images)
    return label_accuracy(classifier, images, labels), frechet_distance(features(classifier, images), real)


@torch.no_grad()
def _report_flow(model: nn.Module) -> None:
    """Quality of 2,000 conditional samples, judged by the bundled classifier."""
    classifier, noise, labels = load_classifier(), draw_noise(2000), cycle_labels(2000)
    real = features(classifier, all_digits().images)
    for steps in (50, 25):
        pairs = zip(torch.split(noise, 250), torch.split(labels, 250), strict=True)
        images = torch.cat([flow_sampler(x, y, steps)(model) for x, y in pairs])
        accuracy = label_accuracy(classifier, images, labels)
        distance = frechet_distance(features(classifier, images), real)
        print(
            f"flow: 2000 samples, Euler {steps} steps: label accuracy {accuracy:.4f}, Frechet distance {distance:.3f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lazycompress.integrations.digits.train", description=__doc__)
    parser.add_argument("--model", choices=["dit", "flow"], default="dit", help="which one")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits-weights"), help="where weights and checkpoint go")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    options = parser.parse_args(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    digits, test = train_test_digits()
    if options.model == "flow":
        train(FLOW, digits, options.steps, options.batch, options.seed, out, options.resume)
        _report_flow(load_flow(out / "flow.safetensors"))
        return
    save_classifier(train_classifier(digits, seed=options.seed), out)
    classifier = load_classifier(out)
    accuracy = label_accuracy(classifier, test.images, test.labels)
    print(f"classifier: accuracy on {len(test.labels)} held-out digits {accuracy:.4f}", flush=True)

    train(DIT, digits, options.steps, options.batch, options.seed, out, options.resume)
    stored = load_model(out)  # judged as stored: after the round trip through float16
    print(f"DiT: epsilon loss on the training digits {evaluation_loss(stored, digits):.4f}")
    print(f"DiT: epsilon loss on the held-out digits {evaluation_loss(stored, test):.4f}")
    for steps in (50, 25):
        accuracy, distance = sample_quality(stored, classifier, steps=steps)
        print(f"DiT: 2000 samples, DDIM {steps} steps: label accuracy {accuracy:.4f}, Frechet distance {distance:.3f}")
    floor = frechet_distance(features(classifier, digits.images), features(classifier, test.images))
    print(f"for comparison: Frechet distance between the training and the held-out digits {floor:.3f}")


if __name__ == "__main__":
    main()
