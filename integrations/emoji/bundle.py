"""The trained pipeline as a folder: diffusers' own layout, the judge and the lists of prompts beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from ...errors import ExportError
from .judge import Judge, load_judge, save_judge
from .model import WEIGHTS_DIR

PROMPTS_FILE = "prompts.json"
_PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")


class Prompts(NamedTuple):
    """The prompts of the data."""

    seen: list[str]
    held_out: list[str]
    """Combinations of words that training never saw, though each word occurred with others."""


def save_pipeline(pipeline: StableDiffusion3Pipeline, judge: Judge, prompts: Prompts, folder: Path) -> None:
    """Writes everything in half precision, into a folder that is new or empty.

    ``StableDiffusion3Pipeline.from_pretrained(folder)`` and ``OVDiffusionPipeline.from_pretrained(folder, export=True)``
    read the folder too.

    Raises:
        ExportError: something is there already.
    """
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ExportError(f"{folder} is there already and is left alone: move it away, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        partial = Path(beside) / "new"
        _write(pipeline, judge, prompts, partial)
        partial.replace(folder)


def _write(pipeline: StableDiffusion3Pipeline, judge: Judge, prompts: Prompts, folder: Path) -> None:
    half: Any = copy.copy(pipeline)
    for name in _PARTS:
        setattr(half, name, copy.deepcopy(getattr(pipeline, name)).to("cpu", torch.float16))
    half.save_pretrained(folder)
    save_judge(judge, folder)
    (folder / PROMPTS_FILE).write_text(json.dumps(prompts._asdict(), indent=0), encoding="utf-8")


def load_pipeline(folder: Path = WEIGHTS_DIR, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """The bundled pipeline, or the one in ``folder``, on the CPU, without a bar.

    Ask it for ``max_sequence_length=1``: its third text encoder is silent, and its zero tokens (256 by default) only
    cost time.

    Raises:
        OSError: ``folder`` holds no pipeline.
    """
    pipeline = cast(Any, StableDiffusion3Pipeline).from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return cast(StableDiffusion3Pipeline, pipeline)


def load_bundled_judge(tokenizer: CLIPTokenizer, folder: Path = WEIGHTS_DIR) -> Judge:
    """The judge beside the pipeline in ``folder``, which reads prompts with that pipeline's tokenizer."""
    return load_judge(folder, cast(int, tokenizer.pad_token_id))


def prompts(folder: Path = WEIGHTS_DIR) -> Prompts:
    """The prompts the bundled pipeline was trained on, and those held out: for calibration and for measuring.

    Raises:
        FileNotFoundError: ``folder`` holds no bundle.
    """
    return Prompts(**json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8")))
