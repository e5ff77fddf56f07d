"""Writes a page that samples in the browser, dense beside lazy: `python examples/web/make.py OUT`.

`OUT` then holds static files for any server, such as `python -m http.server --directory OUT`. Node's `npm` is needed, for
onnxruntime-web.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import lazycompress
from lazycompress.integrations.digits.flow import FlowDiT, flow_sampler, load_flow
from lazycompress.integrations.digits.model import cycle_labels, draw_noise
from lazycompress.plan.learn import learn_plan
from lazycompress.plan.plan import Plan

HERE = Path(__file__).parent
PAGE = ("index.html", "style.css", "page.js", "sampling.js")

#: Of onnxruntime-web: the backend for WebAssembly alone.
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")

#: Where npm installs: kept, so that the next time is quick. `build/` is no part of the repository.
PACKAGES = HERE.parent.parent / "build" / "web"

IMAGES = 10


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (default: 50)")
    parser.add_argument("--target", type=float, default=0.34, help="share of the steps to compute (default: 0.34)")
    parser.add_argument("--seed", type=int, default=0, help="of the first noise (default: 0)")
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="folder to install npm packages in")
    options = parser.parse_args(arguments)
    try:
        make(options.out, options.steps, options.target, options.seed, options.packages)
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"written to {options.out}: python -m http.server --directory {options.out}")


def make(out: Path, steps: int = 50, target: float = 0.34, seed: int = 0, packages: Path = PACKAGES) -> None:
    """Write the page with all that it needs; files that are there are replaced."""
    runtime = install(packages) / "onnxruntime-web" / "dist"
    out.mkdir(parents=True, exist_ok=True)
    model = load_flow()
    dense = out / "dense" / "denoiser.onnx"
    dense.parent.mkdir(exist_ok=True)
    export(model, dense)
    plan = learn(model, steps, target)
    # JavaScript's runtimes do not know inputs with defaults, so the first call is handed zeros.
    lazycompress.wrap(dense, plan, out / "lazy", past_defaults=False, overwrite=True)
    card = json.loads((out / "lazy" / "lazycompress.json").read_text(encoding="utf-8"))
    (out / "table.json").write_text(json.dumps(table(plan, steps, seed, card)), encoding="utf-8")
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)
    (out / "ort").mkdir(exist_ok=True)
    for name in RUNTIME:
        shutil.copyfile(runtime / name, out / "ort" / name)


def install(packages: Path, development: bool = False) -> Path:
    """What `package.json` names, from npm, where it is not there yet; the folder with the packages.

    Args:
        packages: the folder to install in.
        development: what only `node.js` needs, too.

    Raises:
        RuntimeError: npm is missing, or says why it cannot.
    """
    wanted = json.loads((HERE / "package.json").read_text(encoding="utf-8"))
    versions = wanted["dependencies"] | (wanted["devDependencies"] if development else {})
    found = packages / "node_modules"
    if all(_version(found / name) == version for name, version in versions.items()):
        return found
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is needed, for onnxruntime-web: install Node.js")
    packages.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(HERE / "package.json", packages / "package.json")
    # Scripts of packages are not run: onnxruntime-node's would fetch what a GPU needs.
    flags = ["--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]
    command = [npm, "install", *flags, "--include=dev" if development else "--omit=dev"]
    done = subprocess.run(command, cwd=packages, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return found


def _version(package: Path) -> str | None:
    """Of a package that is installed."""
    try:
        found: str = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    except FileNotFoundError:
        return None
    return found


def export(model: FlowDiT, path: Path) -> None:
    """The dense model as one ONNX file, for any number of images at a time."""
    example = (draw_noise(2), torch.full((2,), 500.0), cycle_labels(2))
    batch = torch.export.Dim("batch", min=1, max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the three inputs share the name of their first dimension, which is meant
        program = torch.onnx.export(
            model, example, dynamo=True, verbose=False, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
            input_names=["hidden_states", "timestep", "class_labels"], output_names=["velocity"],
        )  # fmt: skip
    assert program is not None
    made = program.model_proto
    for node in made.graph.node:
        del node.metadata_props[:]  # where in whose files it comes from, which is no visitor's business
    onnx.save(made, path)


def learn(model: FlowDiT, steps: int, target: float) -> Plan:
    """A plan for the sampler, learned in its own calls: seconds."""

    def sampler(denoise: Any) -> Tensor:
        return flow_sampler(torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,)), steps)(denoise)

    def read(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> float:
        return float(named["timestep"][0])

    learned = learn_plan(model, sampler, target, read=read)
    print(learned.report)
    return learned.plan


def table(plan: Plan, steps: int, seed: int, card: Mapping[str, Any]) -> dict[str, Any]:
    """What the page knows of the sampler: see `sample` in sampling.js."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler()  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(steps)
    noise = draw_noise(IMAGES, seed)
    columns, widths = list(card["clock"]), list(card["clock"].values())
    return {
        "files": {"dense": "dense/denoiser.onnx", "lazy": "lazy/denoiser.onnx"},
        "timesteps": scheduler.timesteps.tolist(),
        "sizes": scheduler.sigmas.diff().tolist(),  # of the Euler steps
        "computes": list(plan.computes),  # what the plan says; the page shows what the file does
        "clock": {"computed": sum(widths[: columns.index("computed")])},
        "shape": list(noise.shape),
        "labels": cycle_labels(IMAGES).tolist(),
        "noise": noise.flatten().tolist(),
    }


if __name__ == "__main__":
    main()
