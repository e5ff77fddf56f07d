"""One training loop for every stage: seeded by the step's number, resumable at any time, with a moving average."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lazycompress.errors import LazyCompressError

WARMUP_UPDATES = 100
DECAY_SHARE = 0.2


class CheckpointError(LazyCompressError):
    """A checkpoint does not fit the training that is to go on from it."""


@dataclass(frozen=True)
class Stage:
    """What to train: the loss of one update, and what is worth a look now and then."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, torch.Generator], torch.Tensor]
    """Model, and a generator that only depends on the seed and the update's number -> a scalar."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What a resumed training must have in common with the one before."""
    look: Callable[[nn.Module, int], None] = lambda model, update: None
    """Averaged model, number of updates: draws samples or the like."""


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how."""

    updates: int
    batch: int
    peak_lr: float
    ema_decay: float = 0.999
    look_seconds: float = 300.0
    checkpoint_seconds: float = 120.0

    def learning_rate(self, update: int) -> float:
        """Warm-up, then constant, then linearly to zero over the last fifth: the end may be moved while it is constant.

        Haegele et al. 2024 (arXiv 2405.18392).
        """
        warmup = min(1.0, (update + 1) / WARMUP_UPDATES)
        return self.peak_lr * min(warmup, (self.updates - update) / (DECAY_SHARE * self.updates))


def fit(stage: Stage, schedule: Schedule, out: Path, seed: int, device: torch.device) -> nn.Module:
    """Trains ``stage.model``, or goes on from the checkpoint in ``out``; kill it whenever you like.

    Besides the bar, ``out/NAME-progress.txt`` always holds one line: updates, loss, pictures a second.

    Returns:
        The averaged model, in evaluation mode.

    Raises:
        CheckpointError: the checkpoint was made with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / f"{stage.name}.pt"
    model = stage.model.to(device).train()
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    settings = {"batch": schedule.batch, "seed": seed, **stage.settings}
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if state["settings"] != settings:
            raise CheckpointError(
                f"{checkpoint} was made with {state['settings']}, not with {settings}; use the same, or another --out."
            )
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["update"]

    def save(update: int) -> None:
        state = {
            "settings": settings,
            "update": update,
            "model": model.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        partial = checkpoint.with_suffix(".partial")  # being killed while writing must not cost the old checkpoint
        torch.save(state, partial)
        partial.replace(checkpoint)

    recent: torch.Tensor | None = None
    saved = looked = spoken = started = time.monotonic()
    progress = tqdm(range(first, schedule.updates), initial=first, total=schedule.updates, desc=stage.name, unit="upd")
    for update in progress:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + update)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(update)
        loss = stage.loss(model, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(schedule.ema_decay, (update + 1) / (update + 10))  # forgets the initial weights quickly
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        recent = loss.detach() if recent is None else recent.lerp(loss.detach(), 0.02)

        now, done = time.monotonic(), update + 1
        if now - spoken > 10:
            speed = (done - first) * schedule.batch / (now - started)
            line = f"{stage.name}: {done} updates, loss {recent.item():.4f}, {speed:.1f} pictures/s"
            (out / f"{stage.name}-progress.txt").write_text(line + "\n", encoding="utf-8")
            progress.set_postfix_str(f"loss {recent.item():.4f}, {speed:.0f} pictures/s", refresh=False)
            spoken = now
        if now - saved > schedule.checkpoint_seconds or done == schedule.updates:
            save(done)
            saved = time.monotonic()
        if now - looked > schedule.look_seconds or done == schedule.updates:
            stage.look(averaged, done)
            looked = time.monotonic()
    return averaged


def load_averaged(name: str, model: nn.Module, out: Path) -> tuple[nn.Module, int]:
    """The averaged weights of a stage's checkpoint in ``out``, put into ``model``, and after how many updates.

    Raises:
        CheckpointError: there is no checkpoint of that stage.
    """
    checkpoint = out / f"{name}.pt"
    if not checkpoint.exists():
        raise CheckpointError(f"{checkpoint} is missing; train it first with --stage {name}.")
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model.load_state_dict(state["averaged"])
    return model.eval(), int(state["update"])
