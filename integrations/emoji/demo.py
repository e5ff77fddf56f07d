"""The main job, end to end, on the bundled pipeline: learn, export, draw the same pictures in several ways, compare."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from rich.table import Table
from torch import Tensor

import lazycompress

from ...errors import MissingExtraError
from ...lazy.attach import handle_of
from ...places import DEMO, seal, whole_folder
from ...report import render
from .bundle import load_bundled_judge, load_pipeline, prompts
from .evaluate import generate
from .figures import labelled_grid, reuse_heatmap
from .metrics import psnr, recall_at
from .model import WEIGHTS_DIR

#: Ten dense runs of learning in place of fifteen: the pictures are as close (50.1 dB and 49.9 dB).
RECIPE = {"target": 0.5, "train": {"effort": 0.85}}
GUIDANCE = 4.0
SEED = 2026  # of the noise that pictures are drawn from; learning draws its own

#: Prompts that are learned with; the pictures are of others.
LEARN_ON = 16

#: Pictures in the figure.
SHOWN = 8

#: As exact as torch, on machines that would compute in bfloat16 by themselves.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@dataclass(frozen=True)
class Row:
    """One way of drawing: what it cost, how close to the dense pictures, whether they find their prompts.

    Attributes:
        name: what was done.
        calls: of the denoiser that were computed, as a share of the dense ones.
        psnr, psnr_lowest: to the dense pictures, in dB: mean and lowest; infinite for these themselves.
        recall: share of the pictures whose prompt is among the five that the judge finds closest.
        seconds: for one picture, text encoders and decoder included.
    """

    name: str
    calls: float
    psnr: float
    psnr_lowest: float
    recall: float
    seconds: float


def run_demo(directory: Path, images: int = 48, steps: int = 28, *, overwrite: bool = False) -> list[Row]:
    """Run it and write `table.txt`, `table.json`, `samples.png`, `reuse.png`, `plan/`, `openvino/` and `openvino_int8/`.

    Args:
        directory: where to; written whole or not at all.
        images: of each way of drawing.
        steps: of the dense pipeline.
        overwrite: replace an earlier demo.

    Raises:
        LazyCompressError: the folder is not ours to replace or cannot be written, or the optimum extra is missing.
    """
    with whole_folder(directory, DEMO, overwrite) as folder, _quiet():
        rows = _run(folder, images, steps)
        seal(folder, DEMO, {})
    print(f"written to {directory}: table.txt, table.json, samples.png, reuse.png, plan/, openvino/, openvino_int8/")
    return rows


def _run(folder: Path, images: int, steps: int) -> list[Row]:
    try:
        from optimum.intel import OVDiffusionPipeline, OVWeightQuantizationConfig
    except ImportError as error:
        raise MissingExtraError("optimum-intel", "optimum", "the demo") from error
    pipe: Any = load_pipeline()
    learn_on, drawn = _drawn(images)
    pictures: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}

    def draw(name: str, pipeline: Any, count: int = steps) -> None:
        started = time.perf_counter()
        pictures[name] = generate(pipeline, drawn, GUIDANCE, count, SEED, title=name)
        seconds[name] = (time.perf_counter() - started) / len(drawn)

    def opened(place: Path) -> Any:
        runs = OVDiffusionPipeline.from_pretrained(place, ov_config=_EXACT)
        runs.set_progress_bar_config(disable=True)
        runs.compile()
        return runs

    dense, fewer = f"{steps} steps", f"{steps // 2} steps"
    draw(dense, pipe)
    draw(fewer, pipe, steps // 2)
    started = time.perf_counter()
    lazycompress.apply(pipe, RECIPE, call_kwargs=_call(steps, learn_on))
    lazy = handle_of(pipe.transformer)
    assert lazy is not None, "apply put it there"
    print(f"learned in {time.perf_counter() - started:.0f} s: {lazy.training_report}")
    draw("lazy (torch)", pipe)
    summary = lazycompress.summary(pipe)
    lazycompress.save(pipe.transformer, folder / "plan")
    started = time.perf_counter()
    lazycompress.export(pipe, folder / "openvino", format="openvino")
    print(f"exported in {time.perf_counter() - started:.0f} s")
    draw("lazy (OpenVINO)", opened(folder / "openvino"))
    with tempfile.TemporaryDirectory() as place:
        eight = OVWeightQuantizationConfig(bits=8)
        OVDiffusionPipeline.from_pretrained(
            WEIGHTS_DIR, export=True, compile=False, quantization_config=eight
        ).save_pretrained(place)
        lazycompress.wrap(place, lazy.plan, folder / "openvino_int8")
        draw("8-bit weights (OpenVINO)", opened(Path(place)))
    draw("8-bit weights, lazy (OpenVINO)", opened(folder / "openvino_int8"))

    judge, candidates = load_bundled_judge(pipe.tokenizer), sorted({*prompts().seen, *prompts().held_out})
    computed = {dense: 1.0, fewer: steps // 2 / steps, "8-bit weights (OpenVINO)": 1.0}
    rows = []
    for name, found in pictures.items():
        near = psnr(found, pictures[dense])
        recall = recall_at(5, judge, pipe.tokenizer, found, drawn, candidates)
        share = computed.get(name, lazy.plan.share)
        rows.append(Row(name, share, float(near.mean()), float(near.min()), recall, seconds[name]))
    shown = {name: found[:SHOWN] for name, found in pictures.items()}
    labelled_grid(folder / "samples.png", shown, drawn[:SHOWN])
    skipped = torch.tensor([[not computes] for computes in lazy.plan.computes], dtype=torch.float64)
    reuse_heatmap(folder / "reuse.png", skipped, lazy.plan.timesteps, ["transformer"], "Calls that are skipped")
    text = f"{summary}\n\n{_table(rows, len(drawn))}\n"
    (folder / "table.txt").write_text(text, encoding="utf-8")
    (folder / "table.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    print(text)
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what converters say of tracing, and tokenizers of the third text encoder's prompts, which it answers zeros."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


def _drawn(images: int) -> tuple[list[str], list[str]]:
    """Prompts to learn with, and others to draw: as many as images are wanted, or as there are."""
    seen = prompts().seen
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(SEED)).tolist()
    shuffled = [seen[k] for k in order]
    return shuffled[:LEARN_ON], shuffled[LEARN_ON : LEARN_ON + images]


def _call(steps: int, learn_on: list[str]) -> dict[str, Any]:
    """What the pipeline is called with while it is learned."""
    size = {"height": 32, "width": 32, "max_sequence_length": 1}
    return {"prompt": learn_on, "num_inference_steps": steps, "guidance_scale": GUIDANCE, **size}


def _table(rows: list[Row], images: int) -> str:
    table = Table(title=f"{images} pictures of the same prompts from the same noise")
    for header in ("", "calls", "PSNR", "lowest", "recall at 5", "s a picture"):
        table.add_column(header, justify="left" if not header else "right", no_wrap=True)
    for row in rows:
        near = ["", ""] if row.psnr == float("inf") else [f"{row.psnr:.1f} dB", f"{row.psnr_lowest:.1f} dB"]
        table.add_row(row.name, f"{row.calls:.0%}", *near, f"{row.recall:.1%}", f"{row.seconds:.3f}")
    return render(table)
