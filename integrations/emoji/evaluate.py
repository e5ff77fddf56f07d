"""Puts a trained pipeline together, measures it and, with ``--save``, bundles it.

``python -m lazycompress.integrations.emoji.evaluate --out DIR`` reads the checkpoints of ``train --out DIR``; without
``--out`` it measures the bundled pipeline on pictures kept in ``--data``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusion3Pipeline
from tqdm import tqdm

from ...errors import ExportError
from .bundle import Prompts, load_bundled_judge, load_pipeline, save_pipeline
from .data import Pictures, load_pictures, split, to_bytes
from .grid import save_grid
from .judge import Judge
from .metrics import frechet_distance, picture_features, psnr, recall_at
from .model import TextToVelocity, assemble, build_autoencoder, build_tokenizer
from .stages import load_averaged
from .train import encode_pictures


class Trained(NamedTuple):
    """A pipeline, who judges it, and how long its denoiser was trained."""

    pipeline: StableDiffusion3Pipeline
    judge: Judge
    updates: int | None


def build_pipeline(checkpoints: Path, train: Pictures) -> Trained:
    """The pipeline of the averaged weights in a training folder.

    Raises:
        CheckpointError: a stage has no checkpoint there.
    """
    tokenizer = build_tokenizer(train.prompts)
    autoencoder, _ = load_averaged("autoencoder", build_autoencoder(), checkpoints)
    encode_pictures(autoencoder, train)  # for its shift and scale
    parts = TextToVelocity(tokenizer)
    _, updates = load_averaged("denoiser", parts, checkpoints)
    judge = Judge(len(tokenizer), tokenizer.pad_token_id)
    load_averaged("classifier", judge, checkpoints)
    return Trained(assemble(autoencoder, tokenizer, parts), judge, updates)


def draw_prompts(pictures: Pictures, n: int, seed: int = 0) -> list[str]:
    """``n`` of the pictures' prompts, drawn with their weights, without repetition."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(pictures.weights, min(n, len(pictures.prompts)), generator=generator)
    return list(dict.fromkeys(pictures.prompts[row] for row in rows))


def generate(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    guidance: float = 4.0,
    steps: int = 28,
    seed: int = 0,
    batch: int = 16,
    title: str = "",
) -> torch.Tensor:
    """Pictures ``[N, 3, 32, 32]`` in ``0..1``; the noise of each only depends on the seed and its place.

    The bar has the title, or says guidance and steps.
    """
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))

    def parts() -> Iterator[torch.Tensor]:
        said = title or f"guidance {guidance:g}, {steps} steps"
        for start in tqdm(range(0, len(prompts), batch), desc=said, unit="batch"):
            call: Any = pipeline
            yield call(
                list(prompts[start : start + batch]),
                height=32,
                width=32,
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=1,
                latents=noise[start : start + batch],
                output_type="pt",
            ).images

    return torch.cat(list(parts()))


def real_pictures(pictures: Pictures, prompts: Sequence[str]) -> torch.Tensor:
    """The first picture of each prompt: ``[N, 3, 32, 32]`` in ``0..1``.

    Raises:
        ValueError: a prompt has no picture.
    """
    rows = [pictures.prompts.index(prompt) for prompt in prompts]
    return pictures.images[rows].float() / 255


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lazycompress.integrations.emoji.evaluate", description=__doc__)
    parser.add_argument("--out", type=Path, help="the folder that training wrote; without it, the bundled weights")
    parser.add_argument("--data", type=Path, help="where the pictures are kept; by default OUT/data")
    parser.add_argument("--pictures", type=int, default=256, help="how many to draw")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--grid", type=Path, help="where to write samples beside real pictures, as PNG")
    parser.add_argument("--save", type=Path, help="write the pipeline, in half precision, into this folder")
    options = parser.parse_args(arguments)
    if options.data is None and options.out is None:
        parser.error("--data or --out says where the pictures are kept")
    pictures = load_pictures(options.data or options.out / "data")
    train, outside = split(pictures)
    pipeline: Any
    if options.out is None:
        pipeline = load_pipeline()
        judge, updates = load_bundled_judge(pipeline.tokenizer), None
    else:
        pipeline, judge, updates = build_pipeline(options.out, train)
    if options.save is not None:
        names = Prompts(sorted(set(train.prompts)), sorted(set(outside.prompts)))
        try:
            save_pipeline(pipeline, judge, names, options.save)
        except ExportError as error:
            parser.error(str(error))
        pipeline = load_pipeline(options.save)  # judged as stored
        judge = load_bundled_judge(pipeline.tokenizer, options.save)
    if updates is not None:
        print(f"denoiser after {updates} updates")

    candidates = sorted(set(pictures.prompts))
    all_features = picture_features(judge, pictures.images.float() / 255)

    def report(title: str, images: torch.Tensor, prompts: Sequence[str]) -> None:
        first, fifth = (recall_at(k, judge, pipeline.tokenizer, images, prompts, candidates) for k in (1, 5))
        distance = frechet_distance(picture_features(judge, images), all_features)
        print(f"{title}: {len(images)} pictures, recall at 1 {first:.3f}, at 5 {fifth:.3f}, Frechet {distance:.3f}")

    prompts, unseen = draw_prompts(train, options.pictures), draw_prompts(outside, options.pictures)
    real, real_unseen = real_pictures(pictures, prompts), real_pictures(pictures, unseen)
    report("real", real, prompts)
    report("real, held out", real_unseen, unseen)
    started = time.monotonic()
    dense = generate(pipeline, prompts, steps=options.steps)
    print(f"{(time.monotonic() - started) / len(prompts):.3f} s a picture")
    report("guidance 4", dense, prompts)
    report("guidance 4, held out", generate(pipeline, unseen, steps=options.steps), unseen)
    report("guidance 1", generate(pipeline, prompts, guidance=1.0, steps=options.steps), prompts)
    fewer = generate(pipeline, prompts, steps=options.steps // 2)
    report("guidance 4, half the steps", fewer, prompts)
    print(f"half the steps against all: PSNR {psnr(fewer, dense).mean():.2f} dB")
    if options.grid is not None:
        pairs = torch.stack([real, dense], 1).flatten(0, 1)[:128]
        save_grid(to_bytes(pairs * 2 - 1), options.grid, columns=16)


if __name__ == "__main__":
    main()
