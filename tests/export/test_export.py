"""Exported files against torch: the same decisions, the same images, state of their own."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import openvino as ov
import pytest
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.export.check import start as start_runner
from lazycompress.export.check import verify
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.integrations.digits.model import build_scheduler, digits_sampler, draw_noise
from lazycompress.runtime import LazyModel, wrap
from tests.conftest import make_lively_gates, two_blocks
from tests.export_models import alike, lively, small_dit, small_inputs, small_lazy

BATCH = 4
INPUTS = {
    "hidden_states": torch.randn(2, 1, 8, 8),
    "timestep": torch.tensor([980, 980]),
    "class_labels": torch.tensor([1, 2]),
}


@pytest.fixture(scope="module")
def lazy() -> LazyModel:
    """Two blocks of the bundled DiT with lively gates."""
    return wrap(two_blocks(), (), INPUTS, make_lively_gates)


@pytest.fixture(scope="module")
def small() -> LazyModel:
    """The quickest to export."""
    return small_lazy()


@pytest.fixture(scope="module")
def openvino_folder(lazy: LazyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lazycompress.export(lazy, tmp_path_factory.mktemp("openvino") / "out", format="openvino", telemetry=True)


@pytest.fixture(scope="module")
def onnx_folder(lazy: LazyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lazycompress.export(lazy, tmp_path_factory.mktemp("onnx") / "out", format="onnx", telemetry=True)


@pytest.fixture(params=["openvino", "onnx"])
def start(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Starts a runner of the file, in either format, with a state of its own."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    return partial(OpenVINORunner if request.param == "openvino" else OnnxRunner, folder)


def images(model: Callable[..., object], seed: int, batch: int = BATCH, steps: int = 50) -> Tensor:
    labels = (torch.arange(batch) + seed) % 10
    with torch.no_grad():
        return digits_sampler(draw_noise(batch, seed), labels, steps)(model)


def test_decisions_and_outputs_equal_torch_over_fifty_steps(lazy: LazyModel, start: Callable[[], Any]) -> None:
    fifty_steps(lazy, start())


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_the_whole_bundled_model_equals_torch_over_fifty_steps(format: str, digits: nn.Module, tmp_path: Path) -> None:
    lazy = wrap(digits, (), INPUTS, make_lively_gates)
    folder = lazycompress.export(lazy, tmp_path / "out", format=format, telemetry=True)
    fifty_steps(lazy, OpenVINORunner(folder) if format == "openvino" else OnnxRunner(folder))


def fifty_steps(lazy: LazyModel, runner: Any) -> None:
    """A file is given what a sampling loop in torch gives the model: the same outputs, and the same decisions."""
    lazy.reset()
    scheduler = build_scheduler()
    scheduler.set_timesteps(50)
    labels = torch.arange(BATCH)
    sample = draw_noise(BATCH, 7)
    for step in scheduler.timesteps:
        inputs = {"hidden_states": sample, "timestep": step.repeat(BATCH), "class_labels": labels}
        with torch.no_grad():
            expected = lazy(**inputs).sample
        found = runner(**inputs).sample
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        sample = scheduler.step(expected, step, sample).prev_sample
    times, reused = lazy.usage.heatmap()
    times_in_file, reused_in_file = runner.usage.heatmap()
    assert times == times_in_file
    assert torch.equal(reused, reused_in_file)
    assert 0.2 < reused.mean() < 0.8
    assert ((reused > 0) & (reused < 1)).any(), "samples of one batch decide differently"


def test_two_images_in_a_row_equal_two_fresh_loads(start: Callable[[], Any]) -> None:
    runner = start()
    in_a_row = [images(runner, seed, steps=20) for seed in (1, 2, 1)]
    fresh = [images(start(), seed, steps=20) for seed in (1, 2)]
    assert torch.equal(in_a_row[0], fresh[0])
    assert torch.equal(in_a_row[1], fresh[1])
    assert torch.equal(in_a_row[2], fresh[0])


def test_other_batch_sizes_and_prompts_need_no_reset(lazy: LazyModel, start: Callable[[], Any]) -> None:
    runner = start()
    lazy.reset()
    for seed, batch, steps in ((1, 4, 7), (2, 3, 5), (3, 3, 9), (4, 1, 6), (5, 5, 6)):
        expected, found = images(lazy, seed, batch, steps), images(runner, seed, batch, steps)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert runner.summary().skip_ratio == pytest.approx(lazy.summary().skip_ratio)


def test_an_interrupted_run_does_not_reach_the_next_prompt(start: Callable[[], Any]) -> None:
    runner, fresh = start(), start()
    stopped = {
        "hidden_states": draw_noise(2, 1),
        "timestep": torch.tensor([900, 900]),
        "class_labels": torch.tensor([1, 2]),
    }
    begun = {
        "hidden_states": draw_noise(2, 2),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 3]),
    }
    alone = {name: value[1:] for name, value in begun.items()}
    runner(**stopped)
    after = runner(**begun).sample
    assert torch.allclose(after[1:], fresh(**alone).sample, atol=1e-5)


def test_the_file_holds_ifs_and_state_and_the_originals_names(lazy: LazyModel, openvino_folder: Path) -> None:
    model = ov.Core().read_model(openvino_folder / "openvino_model.xml")
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert kinds.count("If") == len(lazy.branches)
    clock = ["past_timestep", "past_prints", "past_times"]
    # Gates of order 1: a cache per branch, and value and slope of the output.
    assert kinds.count("ReadValue") == kinds.count("Assign") == len(lazy.branches) + len(clock) + 2
    assert [port.get_names() for port in model.inputs] == [{"hidden_states"}, {"timestep"}, {"class_labels"}]
    assert [port.get_names() for port in model.outputs] == [{"sample"}, {"lazy_decisions"}]
    outer = {node.get_type_name() for node in model.get_ordered_ops()}
    assert "ScaledDotProductAttention" not in outer, "attention runs inside the branches only"


@pytest.mark.slow
def test_without_telemetry_there_is_only_the_originals_output(small: LazyModel, tmp_path: Path) -> None:
    folder = lazycompress.export(small, tmp_path / "plain")
    model = ov.Core().read_model(folder / "openvino_model.xml")
    assert [port.get_names() for port in model.outputs] == [{"sample"}]


def test_the_card_says_what_the_file_is(lazy: LazyModel, openvino_folder: Path) -> None:
    card = json.loads((openvino_folder / "lazycompress.json").read_text())
    assert [branch["name"] for branch in card["branches"]] == [branch.name for branch in lazy.branches]
    assert card["timestep"] == "timestep"
    assert card["format"] == "openvino"
    assert card["versions"]["openvino"]


def test_a_folder_that_is_not_ours_is_left_alone(lazy: LazyModel, openvino_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(LazyCompressError, match="is not empty and no export"):
        lazycompress.export(lazy, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "ten years"
    with pytest.raises(LazyCompressError, match="overwrite=True"):
        lazycompress.export(lazy, openvino_folder)


@pytest.mark.parametrize(("format", "expected"), [("tflite", "no export format 'tflite'")])
def test_an_unknown_format_is_one_line(lazy: LazyModel, tmp_path: Path, format: str, expected: str) -> None:
    with pytest.raises(LazyCompressError, match=expected):
        lazycompress.export(lazy, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_line_and_leaves_nothing(lazy: LazyModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LazyCompressError, match="cannot write"):
        lazycompress.export(lazy, tmp_path / "file" / "out")
    if os.getuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(LazyCompressError, match="cannot write"):
            lazycompress.export(lazy, tmp_path / "out")


@pytest.mark.slow
def test_a_failed_export_leaves_no_folder(small: LazyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazycompress.export import openvino

    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(openvino, "write", fail)
    with pytest.raises(RuntimeError):
        lazycompress.export(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Eigenvalues(nn.Module):
    """OpenVINO has no such operation."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_dit()

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        sample: Tensor = self.model(hidden_states, timestep, class_labels).sample
        return sample + torch.linalg.eigvalsh(sample).mean()


@pytest.mark.slow
def test_a_conversion_that_fails_leaves_logging_as_it_was(tmp_path: Path) -> None:
    lazy = wrap(Eigenvalues(), (), small_inputs(2, 900), lively(torch.arange(1000)))
    before = logging.root.level, list(logging.root.filters), list(logging.root.handlers)
    with pytest.raises(LazyCompressError, match=r"eigvalsh|linalg"):
        lazycompress.export(lazy, tmp_path / "out")
    assert (logging.root.level, logging.root.filters, logging.root.handlers) == before
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import sys
import torch, lazycompress
from tests.export_models import small_lazy
torch.set_num_threads(1)
lazy = small_lazy()
print("ready", flush=True)
lazycompress.export(lazy, sys.argv[1], format=sys.argv[2], telemetry=True)
"""


@pytest.mark.slow(seconds=120)
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_a_killed_export_leaves_no_folder_that_loads(format: str, tmp_path: Path) -> None:
    """Killed as soon as each further file is there, until an export gets through."""
    target, seen = tmp_path / "out", -1
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", _KILLED, str(target), format], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while process.poll() is None and len([*tmp_path.glob(".out.*/new/*")]) <= seen:
            time.sleep(0.001)
        seen = len([*tmp_path.glob(".out.*/new/*")])
        process.kill()
        finished = process.wait() == 0
        for left in tmp_path.glob(".out.*/new"):
            if (left / "lazycompress.json").exists():  # killed after its last file, before the folder got its name
                assert verify(left).ok
            else:
                with pytest.raises(LazyCompressError):
                    start_runner(left)
            shutil.rmtree(left)
        if finished:
            break
        assert not target.exists()
    assert finished, "it got through in the end"
    assert verify(target).ok


def test_a_call_without_an_input_names_it(start: Callable[[], Any]) -> None:
    runner = start()
    with pytest.raises(LazyCompressError, match="missing: class_labels"):
        runner(hidden_states=torch.zeros(1, 1, 8, 8), timestep=torch.tensor([1]))


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LazyCompressError, match=r"holds no openvino_model\.xml"):
        OpenVINORunner(tmp_path)
    with pytest.raises(LazyCompressError, match=r"holds no model\.onnx"):
        OnnxRunner(tmp_path)


def test_whole_calls_hold_the_network_once(tmp_path: Path) -> None:
    """In one body for whichever samples compute: a second one would double time to export, to load, and memory to run in."""
    lazy = wrap(small_dit(), (), small_inputs(2, 980), alike(torch.arange(980, -1, -20).float()))
    folder = lazycompress.export(lazy, tmp_path / "out", format="onnx")
    attentions = str(onnx.load(folder / "model.onnx").graph).count('op_type: "Softmax"')
    assert attentions == len(lazy.model.transformer_blocks) == 1


def test_the_onnx_file_checks_and_runs_in_openvino_too(lazy: LazyModel, onnx_folder: Path) -> None:
    model = onnx.load(onnx_folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "If" for node in model.graph.node) == len(lazy.branches)
    names = [i.name for i in model.graph.input]
    assert names[:3] == ["hidden_states", "timestep", "class_labels"]
    assert all(name.startswith("past_") for name in names[3:])
    assert model.graph.output[0].name == "sample"
    card = json.loads((onnx_folder / "lazycompress.json").read_text())
    assert card["opset"] == next(entry.version for entry in model.opset_import if entry.domain == "")
    assert card["ir"] == model.ir_version
    compiled = ov.Core().compile_model(onnx_folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = {
        "hidden_states": draw_noise(2, 3),
        "timestep": torch.tensor([900, 900]),
        "class_labels": torch.tensor([4, 5]),
    }
    state = {
        entry["name"]: torch.full([2 if size == -1 else size for size in entry["shape"]], entry["fill"])
        for entry in card["state"]
    }
    found = compiled({name: value.numpy() for name, value in {**inputs, **state}.items()})["sample"]
    lazy.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), lazy(**inputs).sample, rtol=0, atol=1e-4)


def test_saved_gates_load_into_an_equal_model(short: nn.Module, lazy: LazyModel, tmp_path: Path) -> None:
    lazycompress.save(lazy, tmp_path / "gates")
    loaded = lazycompress.load(short, tmp_path / "gates")
    lazy.reset()
    assert torch.equal(images(loaded, 3, steps=8), images(lazy, 3, steps=8))
    assert torch.equal(loaded.usage.heatmap()[1], lazy.usage.heatmap()[1])
    assert sorted(p.name for p in (tmp_path / "gates").iterdir()) == ["gates.json", "gates.safetensors"]


def test_gates_that_are_not_there_are_one_line(digits: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(LazyCompressError, match=r"gates\.safetensors is missing"):
        lazycompress.load(digits, tmp_path)
