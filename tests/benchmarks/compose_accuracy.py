"""What each stage costs and buys on the bundled digits DiT: error, Frechet distance, size on disk, MACs, latency.

`python -m tests.benchmarks.compose_accuracy [--images 2000] [--effort 1.0] [--rows lazy int8 ...]`

Everything is exported to OpenVINO and sampled from the file: DDIM, 50 steps, the same noise for every row. The first row is the
dense float32 model, exported as it is. Gates that are learned before quantization are learned once, for all rows that use them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openvino as ov
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress.compose.quantize import compress_weights, quantize
from lazycompress.compose.report import StageRow, accuracy_table
from lazycompress.export.check import CHECK_FILE
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.integrations.digits.classifier import load_classifier
from lazycompress.integrations.digits.data import all_digits
from lazycompress.integrations.digits.metrics import features, frechet_distance, mse_per_image
from lazycompress.integrations.digits.model import cycle_labels, digits_sampler, draw_noise, load_bundled
from lazycompress.recipe import Quantize
from lazycompress.recipe_loading import load_recipe
from lazycompress.runtime import LazyModel
from lazycompress.sampling import Sampler, build_sampler, first_call

from .page import PAGE_HELP, written

STEPS, BATCH, SEED = 50, 100, 2026


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--rows", nargs="+", default=[], help="only those whose name contains one of these")
    parser.add_argument("--write", type=Path, help=PAGE_HELP)
    options = parser.parse_args()
    with written(options.write, "compose_accuracy"):
        run(options)


def run(options: argparse.Namespace) -> None:
    model = load_bundled()
    dense_macs = lazycompress.apply(model, {"train": {"enabled": False}}, example_inputs=example()).dense_macs
    sampling = load_recipe("digits_dit.yaml").sampling
    assert sampling is not None
    makers = stages(model, build_sampler(sampling), options.effort)
    reference: Tensor | None = None
    rows: list[StageRow] = []
    classifier = load_classifier()
    real = features(classifier, all_digits().images)
    with tempfile.TemporaryDirectory() as name:
        for label, make in makers.items():
            if rows and options.rows and not any(word in label for word in options.rows):
                continue
            started = time.perf_counter()
            lazy = make()
            folder = Path(name) / label.replace(" ", "_").replace(",", "")
            runner: Any
            if lazy is None:
                runner, macs = dense_file(model, folder), 1.0
            else:
                lazycompress.export(lazy, folder, format="openvino", telemetry=True)
                runner, macs = OpenVINORunner(folder), share_of_macs(lazy, dense_macs)
                note(label, lazy, runner)
            images, seconds = sample(runner, options.images)
            reference = images if reference is None else reference
            error = mse_per_image(images, reference)
            size = sum(path.stat().st_size for path in folder.iterdir() if path.name != CHECK_FILE)
            rows.append(
                StageRow(
                    label, float(error.mean()), float(error.median()),
                    frechet_distance(features(classifier, images), real), size, macs, seconds,
                )
            )  # fmt: skip
            print(f"{label}: mean error {rows[-1].mean:.1e}, {time.perf_counter() - started:.0f} s in all", flush=True)
    print(accuracy_table(rows, f"{options.images} images, {STEPS} steps, batches of {BATCH}, OpenVINO"))


def stages(model: nn.Module, sampler: Sampler, effort: float) -> dict[str, Callable[[], LazyModel | None]]:
    """What makes each row's model; None is the dense one."""
    learned: list[LazyModel] = []

    def apply(recipe: str, **overrides: Any) -> LazyModel:
        lazy: LazyModel = lazycompress.apply(
            model,
            recipe,
            sampler=sampler,
            overrides={"units": "branches", "train.effort": effort, **overrides},
            progress=False,
        )
        return lazy

    def lazy() -> LazyModel:
        """A new lazy model with the gates that were learned once, on the model as it is."""
        if not learned:
            learned.append(apply("lazy_dit.yaml"))
        known = learned[0]
        again = LazyModel(model, known.example, known.gates)
        again.recipe = known.recipe
        return again

    def quantized() -> LazyModel:
        again, section = lazy(), load_recipe("lazy_dit_int8.yaml").quantize
        assert section is not None
        again.reports.append(quantize(again, sampler, section))
        return again

    def compressed() -> LazyModel:
        again, section = lazy(), load_recipe("lazy_dit_int4.yaml").weights
        assert section is not None
        again.reports.append(compress_weights(again, sampler, section.model_copy(update={"max_error": 1.0})))
        return again

    def only_quantized() -> LazyModel:
        plain = lazycompress.apply(model, {"train": {"enabled": False}}, example_inputs=first_call(model, sampler))
        plain.reports.append(quantize(plain, sampler, Quantize()))
        return plain  # type: ignore[no-any-return]

    return {
        "dense f32": lambda: None,
        "lazy": lazy,
        "int8": only_quantized,
        "lazy, then int8": quantized,
        "int8, then lazy": lambda: apply("lazy_dit_int8.yaml", order="quantize_train"),
        "lazy, then int4": compressed,
        "pruned, lazy, int8": lambda: apply("lazy_dit_pruned_int8.yaml"),
    }


def share_of_macs(lazy: LazyModel, dense_macs: int) -> float:
    """Computed MACs of a whole run as a share of the dense model's."""
    in_branches = sum(branch.macs for branch in lazy.branches)
    computed = lazy.dense_macs - in_branches * (1.0 - lazy.expected_macs_ratio())
    return computed / dense_macs


def note(label: str, lazy: LazyModel, runner: OpenVINORunner) -> None:
    """Print what the stages said, and how torch and the file agree on one batch."""
    for report in [lazy.training_report, *lazy.reports]:
        if report is not None:
            print(f"{label}: {report}")
    labels, noise = cycle_labels(20), draw_noise(20, 1)
    lazy.reset()
    with torch.no_grad():
        expected = digits_sampler(noise, labels, STEPS)(lazy)
        found = digits_sampler(noise, labels, STEPS)(runner)
    ours, theirs = lazy.usage.heatmap()[1], runner.usage.heatmap()[1]
    print(
        f"{label}: torch and OpenVINO agree in {1 - float((ours - theirs).abs().mean()):.2%} of the decisions, mean squared "
        f"difference of their images {float(mse_per_image(found, expected).mean()):.1e}"
    )
    runner.reset()


def sample(runner: Any, images: int) -> tuple[Tensor, float]:
    """Images from the same noise each time, and seconds of one sampling run."""
    noise, labels = draw_noise(images, SEED), cycle_labels(images)
    parts, times = [], []
    for first in range(0, images, BATCH):
        cut = slice(first, first + BATCH)
        before = time.perf_counter()
        parts.append(digits_sampler(noise[cut], labels[cut], STEPS)(runner))
        times.append(time.perf_counter() - before)
    return torch.cat(parts), min(times)


def example() -> dict[str, Tensor]:
    """One call of the model."""
    labels = torch.tensor([1, 2])
    return {"hidden_states": draw_noise(2), "timestep": torch.tensor([500, 500]), "class_labels": labels}


def dense_file(model: nn.Module, folder: Path) -> Callable[..., Any]:
    """The dense model, exported as it is and loaded again."""
    dynamic = {name: {0: torch.export.Dim.AUTO} for name in example()}
    folder.mkdir()
    path = folder / "openvino_model.xml"
    converted = ov.convert_model(torch.export.export(model, (), example(), dynamic_shapes=dynamic))
    ov.save_model(converted, path, compress_to_fp16=False)
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def run(**inputs: Tensor) -> Any:
        found = request.infer([value.contiguous().numpy() for value in inputs.values()])
        return SimpleNamespace(sample=torch.from_numpy(next(iter(found.values())).copy()))

    return run


if __name__ == "__main__":
    main()
