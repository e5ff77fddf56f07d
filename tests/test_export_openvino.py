"""The OpenVINO file against torch: the same decisions, the same images, state of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.gate import Gates
from lazycompress.integrations.digits.model import build_scheduler, digits_sampler, draw_noise
from lazycompress.runtime import LazyModel, wrap

ov = pytest.importorskip("openvino")
from lazycompress.export.openvino_runner import OpenVINORunner  # noqa: E402

BATCH = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LazyModel, Path]]:
    """The bundled DiT with lively gates, and its file with telemetry."""
    from lazycompress.integrations.digits.model import load_bundled

    def make(branches: list[lazycompress.Branch]) -> Gates:
        gates = Gates([b.name for b in branches], [b.width for b in branches], torch.linspace(0, 980, 50))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            gates.bias.copy_(torch.randn(gates.bias.shape, generator=generator) * 3)
            for weight in gates.weights:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        return gates

    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.tensor([980, 980]),
        "class_labels": torch.tensor([1, 2]),
    }
    lazy = wrap(load_bundled(), (), inputs, make)
    folder = lazycompress.export(lazy, tmp_path_factory.mktemp("export") / "out", format="openvino", telemetry=True)
    yield lazy, folder


def images(model: Callable[..., object], seed: int, batch: int = BATCH, steps: int = 50) -> Tensor:
    labels = (torch.arange(batch) + seed) % 10
    with torch.no_grad():
        return digits_sampler(draw_noise(batch, seed), labels, steps)(model)


def test_decisions_and_outputs_equal_torch_over_fifty_steps(exported: tuple[LazyModel, Path]) -> None:
    lazy, folder = exported
    lazy.reset()
    runner = OpenVINORunner(folder)
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


def test_two_images_in_a_row_equal_two_fresh_loads(exported: tuple[LazyModel, Path]) -> None:
    _, folder = exported
    runner = OpenVINORunner(folder)
    in_a_row = [images(runner, seed, steps=20) for seed in (1, 2, 1)]
    fresh = [images(OpenVINORunner(folder), seed, steps=20) for seed in (1, 2)]
    assert torch.equal(in_a_row[0], fresh[0])
    assert torch.equal(in_a_row[1], fresh[1])
    assert torch.equal(in_a_row[2], fresh[0])


def test_other_batch_sizes_and_prompts_need_no_reset(exported: tuple[LazyModel, Path]) -> None:
    lazy, folder = exported
    runner = OpenVINORunner(folder)
    lazy.reset()
    for seed, batch, steps in ((1, 4, 7), (2, 3, 5), (3, 3, 9), (4, 1, 6), (5, 5, 6)):
        expected, found = images(lazy, seed, batch, steps), images(runner, seed, batch, steps)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert runner.summary().skip_ratio == pytest.approx(lazy.summary().skip_ratio)


def test_an_interrupted_run_does_not_reach_the_next_prompt(exported: tuple[LazyModel, Path]) -> None:
    _, folder = exported
    runner, fresh = OpenVINORunner(folder), OpenVINORunner(folder)
    stopped = {"hidden_states": draw_noise(2, 1), "timestep": torch.tensor([900, 900]), "class_labels": torch.tensor([1, 2])}
    begun = {"hidden_states": draw_noise(2, 2), "timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([1, 3])}
    alone = {name: value[1:] for name, value in begun.items()}
    runner(**stopped)
    after = runner(**begun).sample
    assert torch.allclose(after[1:], fresh(**alone).sample, atol=1e-5)


def test_the_file_holds_ifs_and_state_and_the_originals_names(exported: tuple[LazyModel, Path]) -> None:
    lazy, folder = exported
    model = ov.Core().read_model(folder / "openvino_model.xml")
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert kinds.count("If") == len(lazy.branches)
    assert kinds.count("ReadValue") == kinds.count("Assign") == len(lazy.branches) + 2
    assert [port.get_names() for port in model.inputs] == [{"hidden_states"}, {"timestep"}, {"class_labels"}]
    assert [port.get_names() for port in model.outputs] == [{"sample"}, {"lazy_decisions"}]
    outer = {node.get_type_name() for node in model.get_ordered_ops()}
    assert "ScaledDotProductAttention" not in outer, "attention runs inside the branches only"


def test_without_telemetry_there_is_only_the_originals_output(exported: tuple[LazyModel, Path], tmp_path: Path) -> None:
    lazy, _ = exported
    folder = lazycompress.export(lazy, tmp_path / "plain")
    model = ov.Core().read_model(folder / "openvino_model.xml")
    assert [port.get_names() for port in model.outputs] == [{"sample"}]


def test_the_card_says_what_the_file_is(exported: tuple[LazyModel, Path]) -> None:
    lazy, folder = exported
    card = json.loads((folder / "lazycompress.json").read_text())
    assert [branch["name"] for branch in card["branches"]] == [branch.name for branch in lazy.branches]
    assert card["timestep"] == "timestep"
    assert card["format"] == "openvino"
    assert card["versions"]["openvino"]


def test_a_folder_that_is_not_ours_is_left_alone(exported: tuple[LazyModel, Path], tmp_path: Path) -> None:
    lazy, folder = exported
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(LazyCompressError, match="is not empty and no export"):
        lazycompress.export(lazy, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "ten years"
    with pytest.raises(LazyCompressError, match="overwrite=True"):
        lazycompress.export(lazy, folder)


@pytest.mark.parametrize(("format", "expected"), [("tflite", "no export format 'tflite'")])
def test_an_unknown_format_is_one_line(exported: tuple[LazyModel, Path], tmp_path: Path, format: str, expected: str) -> None:
    lazy, _ = exported
    with pytest.raises(LazyCompressError, match=expected):
        lazycompress.export(lazy, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_line_and_leaves_nothing(exported: tuple[LazyModel, Path], tmp_path: Path) -> None:
    lazy, _ = exported
    (tmp_path / "file").write_text("")
    with pytest.raises(LazyCompressError, match="cannot write"):
        lazycompress.export(lazy, tmp_path / "file" / "out")
    if os.getuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(LazyCompressError, match="cannot write"):
            lazycompress.export(lazy, tmp_path / "out")


def test_a_failed_export_leaves_no_folder(
    exported: tuple[LazyModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lazycompress.export import openvino

    lazy, _ = exported

    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(openvino, "write", fail)
    with pytest.raises(RuntimeError):
        lazycompress.export(lazy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_call_without_an_input_names_it(exported: tuple[LazyModel, Path]) -> None:
    runner = OpenVINORunner(exported[1])
    with pytest.raises(LazyCompressError, match="missing: class_labels"):
        runner(hidden_states=torch.zeros(1, 1, 8, 8), timestep=torch.tensor([1]))


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LazyCompressError, match=r"holds no openvino_model\.xml"):
        OpenVINORunner(tmp_path)


def test_saved_gates_load_into_an_equal_model(digits: nn.Module, exported: tuple[LazyModel, Path], tmp_path: Path) -> None:
    lazy, _ = exported
    lazycompress.save(lazy, tmp_path / "gates")
    loaded = lazycompress.load(digits, tmp_path / "gates")
    lazy.reset()
    assert torch.equal(images(loaded, 3, steps=8), images(lazy, 3, steps=8))
    assert torch.equal(loaded.usage.heatmap()[1], lazy.usage.heatmap()[1])
    assert sorted(p.name for p in (tmp_path / "gates").iterdir()) == ["gates.json", "gates.safetensors"]


def test_gates_that_are_not_there_are_one_line(digits: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(LazyCompressError, match=r"gates\.safetensors is missing"):
        lazycompress.load(digits, tmp_path)
