"""What learning takes on large models: calls, memory and time; measured on DiT-XL/2, counted for models that do not run here.

`python -m tests.benchmarks.learning_scale [--shape XL/2] [--precision f32 bf16] [--steps 10] [--batch 2] [--images 4]`

Measured: random weights, a DDIM loop without guidance; sampling and learning each in a process of its own, whose largest resident
size is read when it ends. What counts are the ratios: learning in dense runs of all its images, and its memory against sampling.

Counted: floating-point operations of one call by torch's FlopCounterMode, on models without memory (the meta device; diffusers'
default configurations, which are those of FLUX.1-dev and Wan 2.1 14B); from them

    calls   = dense runs * images * steps * passes of guidance
    time    = calls * operations of a call / (share of the peak that is reached * peak)
    memory  = of sampling, and steps * passes * elements of an output * bytes of one, on the CPU
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lazycompress.lazy.learn import RUNS
from lazycompress.report import render

from .export_latency import SHAPES
from .page import PAGE_HELP, written

_PROCESS = """
import resource, time
import torch
import lazycompress
from diffusers import DDIMScheduler
from tests.benchmarks.export_latency import SHAPES, build
torch.set_default_dtype(torch.{dtype})
model = build(*SHAPES[{shape!r}])

@torch.no_grad()
def sampler(model):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps({steps})
    x = torch.randn({batch}, 4, 32, 32)
    labels = torch.arange({batch})
    for t in scheduler.timesteps:
        found = model(hidden_states=x, timestep=t.repeat({batch}), class_labels=labels, return_dict=False)[0]
        x = scheduler.step(found[:, :4], t, x).prev_sample
    return x

print("parameters", sum(p.numel() for p in model.parameters()))
sampler(model)
begun = time.perf_counter()
{work}
print("seconds", time.perf_counter() - begun)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""

_LEARN = """
recipe = {"target": 0.5, "units": "calls", "train": {"images": IMAGES}}
print("runs", lazycompress.apply(model, recipe, sampler=sampler, progress=False).training_report.runs)
"""

#: Share of the peak that large transformers reach in practice, and peaks of dense bfloat16 products, by NVIDIA's data sheets.
REACHED = 0.4
PEAKS = {"RTX 4090, 24 GB": 165e12, "H100, 80 GB": 989e12}


@dataclass(frozen=True)
class Large:
    """A model that does not run here.

    Attributes:
        name: as people know it, with the size of its images.
        build: the model, on the device in force.
        inputs: of one call for one image.
        steps, passes: of a run: steps of its sampler, and calls for an image in each.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    steps: int
    passes: int


def flux() -> dict[str, Tensor]:
    """1024 x 1024 pixels: 64 x 64 tokens."""
    return {
        "hidden_states": torch.empty(1, 4096, 64),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768),
        "timestep": torch.empty(1),
        "img_ids": torch.empty(4096, 3),
        "txt_ids": torch.empty(512, 3),
        "guidance": torch.empty(1),
    }


def wan(height: int, width: int) -> Callable[[], dict[str, Tensor]]:
    """81 frames, 21 in the latents."""
    return lambda: {
        "hidden_states": torch.empty(1, 16, 21, height // 8, width // 8),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
    }


LARGE = (
    Large("FLUX.1-dev, 1024x1024", lambda: FluxTransformer2DModel(guidance_embeds=True), flux, 28, 1),
    Large("Wan 2.1 14B, 832x480, 81 frames", WanTransformer3DModel, wan(480, 832), 50, 2),
    Large("Wan 2.1 14B, 1280x720, 81 frames", WanTransformer3DModel, wan(720, 1280), 50, 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="XL/2", choices=list(SHAPES))
    parser.add_argument("--precision", nargs="*", default=["f32", "bf16"], choices=["f32", "bf16"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--images", type=int, default=4, help="`train.images`")
    parser.add_argument("--write", type=Path, help=PAGE_HELP)
    options = parser.parse_args()
    with written(options.write, "learning_scale"):
        for precision in options.precision:
            print(measured(options, precision), flush=True)
        print(render(counted(options.images)), flush=True)


def measured(options: argparse.Namespace, precision: str) -> str:
    """Sampling and learning with one precision, in a line."""
    values = {
        "dtype": {"f32": "float32", "bf16": "bfloat16"}[precision],
        "shape": options.shape,
        "steps": options.steps,
        "batch": options.batch,
    }
    sampling = in_a_process(values, "sampler(model)")
    learning = in_a_process(values, _LEARN.replace("IMAGES", str(options.images)))
    images = -(-options.images // options.batch) * options.batch
    runs = learning["seconds"] / (sampling["seconds"] * images / options.batch)
    return (
        f"{options.shape} {precision}, {sampling['parameters'] / 1e6:.0f} M parameters, {options.steps} steps: an image "
        f"{sampling['seconds'] / options.batch:.1f} s; learning on {images} images {learning['seconds']:.0f} s: calls of "
        f"{learning['runs']:.1f} dense runs, time of {runs:.1f}; peak memory {learning['peak'] / 1e9:.2f} GB, "
        f"{learning['peak'] / sampling['peak']:.3f} of sampling"
    )


def in_a_process(values: Mapping[str, Any], work: str) -> dict[str, float]:
    """What a program of its own printed: parameters, seconds, peak memory in bytes, dense runs.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS.format(**values, work=work)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    lines = [line.split() for line in done.stdout.splitlines()]
    return {
        line[0]: float(line[1]) for line in lines if line[:1] and line[0] in ("parameters", "seconds", "peak", "runs")
    }


def counted(images: int) -> Table:
    """Calls, memory and time of the models that do not run here."""
    table = Table(
        title=f"learning on {images} images, {RUNS:g} dense runs; bfloat16, {REACHED:.0%} of the peak reached"
    )
    for header in ("model", "parameters", "TFLOP a call", "calls", "outputs kept", *PEAKS):
        table.add_column(header, justify="left" if header == "model" else "right")
    for large in LARGE:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = large.build().eval()
            output = model(**large.inputs(), return_dict=False)[0]
        calls = RUNS * images * large.steps * large.passes
        kept = large.steps * large.passes * output.numel() * 2
        operations = counter.get_total_flops()
        times = [calls * operations / (REACHED * peak) / 60 for peak in PEAKS.values()]
        table.add_row(
            large.name,
            f"{sum(p.numel() for p in model.parameters()) / 1e9:.1f} B",
            f"{operations / 1e12:.0f}",
            f"{calls:.0f}",
            f"{kept / 2**20:.0f} MiB",
            *(f"{minutes:.0f} min" if minutes < 600 else f"{minutes / 60:.0f} h" for minutes in times),
        )
    return table


if __name__ == "__main__":
    main()
