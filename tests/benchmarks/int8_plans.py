"""Plans for 8-bit denoisers: learned from the 8-bit model's own outputs, or from those of the model in float32.

`python -m tests.benchmarks.int8_plans [--targets 0.5 0.34] [--seeds 0 1 2] [--images 48]`

The bundled pipeline in OpenVINO, its transformer with 8-bit weights and activations (NNCF, with ranges from a real run). A
forecast adds up several outputs, and so the noise of activations: by the square root of 5 where it goes along a line, of 19 along
a parabola. Errors are those of pictures to the dense ones of the same 8-bit model, from noise and prompts that nothing was
learned on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
from optimum.intel import OVDiffusionPipeline
from rich.table import Table
from torch import Tensor

import lazycompress
from lazycompress.integrations.emoji.bundle import prompts
from lazycompress.integrations.emoji.evaluate import generate
from lazycompress.integrations.emoji.metrics import psnr
from lazycompress.integrations.emoji.model import WEIGHTS_DIR
from lazycompress.lazy.attach import handle_of
from lazycompress.plan.plan import Plan
from lazycompress.report import render

from .page import PAGE_HELP, written

STEPS = 28
CALL = {"height": 32, "width": 32, "num_inference_steps": STEPS, "guidance_scale": 4.0, "max_sequence_length": 1}

_EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", type=float, default=[0.5, 0.34])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--write", type=Path, help=PAGE_HELP)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, written(options.write, "int8_plans"):
        folders = {"float32": Path(made) / "float32", "8 bits": Path(made) / "int8"}
        dense = OVDiffusionPipeline.from_pretrained(WEIGHTS_DIR, export=True, compile=False)
        dense.save_pretrained(folders["float32"])
        quantized(folders["float32"], folders["8 bits"])
        print(render(compare(folders, options.targets, options.seeds, options.images)))


def opened(folder: Path) -> Any:
    pipe = OVDiffusionPipeline.from_pretrained(folder, ov_config=_EXACT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quantized(source: Path, target: Path) -> None:
    """The pipeline with 8-bit weights and activations in its transformer."""
    pipe = opened(source)
    calls: list[dict[str, Any]] = []
    pipe.transformer.compile()
    request = pipe.transformer.request

    def recorded(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append({name: value.copy() if hasattr(value, "copy") else value for name, value in inputs.items()})
        return request(inputs, *args, **kwargs)

    pipe.transformer.request = recorded
    _ = generate(pipe, prompts().seen[7::300], steps=STEPS, seed=11)
    pipe.transformer.request = request
    pipe.transformer.model = nncf.quantize(
        ov.Core().read_model(next((source / "transformer").glob("*.xml"))), nncf.Dataset(calls),
        model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calls),
    )  # fmt: skip
    pipe.save_pretrained(target)


def learned(folder: Path, target: float, seed: int) -> Plan:
    pipe = opened(folder)
    seen = prompts().seen[seed::240][:16]
    recipe = {"target": target, "train": {"seed": seed}}
    lazycompress.apply(pipe, recipe, call_kwargs={**CALL, "prompt": seen}, progress=False)
    lazy = handle_of(pipe.transformer)
    assert lazy is not None, "apply put it there"
    return lazy.plan


def compare(folders: dict[str, Path], targets: list[float], seeds: list[int], images: int) -> Table:
    """Errors of the 8-bit pipeline under plans from both."""
    table = Table(title=f"{images} pictures a seed, PSNR to the dense 8-bit ones in dB")
    for header in ("target", "learned on", "seed", "order", "mean", "median", "lowest"):
        table.add_column(header, justify="left" if header == "learned on" else "right")
    drawn = prompts().seen[5 :: max(1, len(prompts().seen) // images)][:images]
    eight = opened(folders["8 bits"])
    for seed in seeds:
        dense = generate(eight, drawn, steps=STEPS, seed=1000 + seed)
        for target in targets:
            for name, folder in folders.items():
                plan = learned(folder, target, seed)
                found = followed(folders["8 bits"], plan, drawn, 1000 + seed)
                near = psnr(found, dense)
                cells = [f"{near.mean():.1f}", f"{near.median():.1f}", f"{near.min():.1f}"]
                table.add_row(f"{target}", name, f"{seed}", f"{plan.order}", *cells)
    return table


def followed(folder: Path, plan: Plan, drawn: list[str], seed: int) -> Tensor:
    """Pictures of a pipeline whose transformer is wrapped with a plan."""
    with tempfile.TemporaryDirectory() as place:
        lazycompress.wrap(folder, plan, Path(place) / "lazy")
        return generate(opened(Path(place) / "lazy"), drawn, steps=STEPS, seed=seed)


if __name__ == "__main__":
    main()
