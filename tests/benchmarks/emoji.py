"""The emoji pipeline with guidance: lazy against fewer steps at equal numbers of calls, and how well pictures find their prompt.

`python -m tests.benchmarks.emoji [--pictures 96] [--seeds 0 1 2] [--targets 0.7 0.5 0.34 0.25]`

One calibration of 32 prompts; the pictures are of other prompts and other noise. Two threads.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import lazycompress
from lazycompress.integrations.emoji.bundle import load_bundled_judge, load_pipeline, prompts
from lazycompress.integrations.emoji.evaluate import generate
from lazycompress.integrations.emoji.metrics import psnr, recall_at
from lazycompress.lazy.attach import handle_of
from lazycompress.report import render

STEPS = 28
GUIDANCE = 4.0
LEARN_ON = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96, help="per seed")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--targets", nargs="*", type=float, default=[0.7, 0.5, 0.34, 0.25])
    options = parser.parse_args()
    torch.set_num_threads(2)
    pipe: Any = load_pipeline()
    judge = load_bundled_judge(pipe.tokenizer)
    names = prompts()
    candidates = sorted({*names.seen, *names.held_out})
    shuffled = torch.randperm(len(names.seen), generator=torch.Generator().manual_seed(0)).tolist()
    learn_on, others = ([names.seen[k] for k in part] for part in (shuffled[:LEARN_ON], shuffled[LEARN_ON:]))
    drawn = others[: options.pictures]

    def draw(steps: int) -> tuple[Tensor, float]:
        started = time.monotonic()
        images = [generate(pipe, drawn, GUIDANCE, steps, seed=1000 + seed) for seed in options.seeds]
        return torch.cat(images), (time.monotonic() - started) / len(options.seeds) / len(drawn)

    table = Table("what", "calls", "PSNR mean", "median", "lowest", "recall at 5", "s a picture")

    def row(what: str, calls: float, images: Tensor, seconds: float) -> None:
        found = recall_at(5, judge, pipe.tokenizer, images, drawn * len(options.seeds), candidates)
        near = psnr(images, dense)
        figures = ["", "", ""] if images is dense else [f"{v:.1f}" for v in (near.mean(), near.median(), near.min())]
        table.add_row(what, f"{calls:.3f}", *figures, f"{found:.3f}", f"{seconds:.3f}")

    dense, seconds = draw(STEPS)
    row(f"dense, {STEPS} steps", 1.0, dense, seconds)
    for target in options.targets:
        steps = int(target * STEPS)
        row(f"{steps} steps", steps / STEPS, *draw(steps))
    call = {
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": 1,
    }
    recipe = {"target": options.targets[0], "pipeline": {"prompts": learn_on, "batch": 8, "call": call}}
    started = time.monotonic()
    lazycompress.apply(pipe, recipe, progress=False)
    table.title = f"Learned in {time.monotonic() - started:.0f} s"
    for target in options.targets:
        if target != options.targets[0]:  # the plan for the first one was tried by learning itself
            lazycompress.set_target(pipe, target)
        computes = handle_of(pipe.transformer).plan.computes
        row(f"lazy, target {target:g}", sum(computes) / len(computes), *draw(STEPS))
    print(render(table))


if __name__ == "__main__":
    main()
