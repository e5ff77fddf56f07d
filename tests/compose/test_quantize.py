"""Quantization and weight compression: what the files compute with, and what they give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.compose.quantize import calibration, compress_weights, quantize
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.integrations.digits.model import build_scheduler, digits_sampler, draw_noise
from lazycompress.recipe import Quantize, Weights
from lazycompress.recipe_loading import load_recipe
from lazycompress.runtime import LazyModel
from tests.compose_files import onnx_matmuls, openvino_matmuls, restored_in_bodies, size_of
from tests.conftest import two_blocks

from .stages import BODIES, GATES, INT4, LAYERS, make, never, sampler

FORMATS = ["openvino", "onnx"]


@pytest.fixture(scope="module")
def int8() -> LazyModel:
    lazy = make()
    report = quantize(lazy, sampler, Quantize(subset_size=12))
    assert (report.changed, report.left) == (LAYERS, 0)
    return lazy


@pytest.fixture(scope="module")
def int4() -> LazyModel:
    lazy = make()
    report = compress_weights(lazy, None, INT4)
    assert (report.changed, report.left) == (LAYERS, 0)
    return lazy


@pytest.fixture(scope="module")
def folder(int8: LazyModel, int4: LazyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Exports a model once: `folder("int8", "onnx")`."""
    models = {"f32": make(), "int8": int8, "int4": int4}
    done: dict[tuple[str, str], Path] = {}

    def export(stage: str, format: str) -> Path:
        if (stage, format) not in done:
            place = tmp_path_factory.mktemp("compose") / f"{stage}_{format}"
            done[stage, format] = lazycompress.export(models[stage], place, format=format, telemetry=True)
        return done[stage, format]

    return export


def start(folder: Path, format: str) -> Any:
    return OpenVINORunner(folder) if format == "openvino" else OnnxRunner(folder)


# -- what the files compute with -----------------------------------------------------------------------------------------


def test_all_matmuls_of_branches_are_in_8_bits_in_openvino(folder: Callable[[str, str], Path]) -> None:
    found = openvino_matmuls(folder("int8", "openvino"))
    in_bodies = {key[1:]: count for key, count in found.items() if key[0] == "body"}
    assert in_bodies == {("i8", True): LAYERS * BODIES}
    outside = {key[1:]: count for key, count in found.items() if key[0] == "outside"}
    assert set(outside) == {("u8", False), ("f32", False)}, "all other layers store their weights in 8 bits"
    assert outside[("f32", False)] == GATES, "gates stay in floating point"


@pytest.mark.slow(seconds=30)
def test_all_matmuls_of_branches_are_in_8_bits_in_onnx(folder: Callable[[str, str], Path]) -> None:
    found = onnx_matmuls(folder("int8", "onnx"))
    in_bodies = {key[1:]: count for key, count in found.items() if key[0] == "body"}
    attention = 2 * 2 * BODIES
    assert in_bodies == {("MatMulIntegerToFloat", "INT8"): LAYERS * BODIES, ("MatMul", "activation"): attention}
    outside = {key[2]: count for key, count in found.items() if key[0] == "outside"}
    assert set(outside) == {"UINT8", "FLOAT"}
    assert outside["FLOAT"] == GATES


@pytest.mark.slow(seconds=30)
def test_all_weights_of_branches_are_in_4_bits_and_others_in_8_in_openvino(folder: Callable[[str, str], Path]) -> None:
    found = openvino_matmuls(folder("int4", "openvino"))
    assert {key[1:]: count for key, count in found.items() if key[0] == "body"} == {("i4", False): LAYERS * BODIES}
    outside = {key[1:]: count for key, count in found.items() if key[0] == "outside"}
    assert outside[("f32", False)] == GATES, "gates stay in floating point"
    assert set(outside) == {("u8", False), ("f32", False)}


@pytest.mark.slow(seconds=15)
def test_all_weights_of_branches_are_in_4_bits_and_others_in_8_in_onnx(folder: Callable[[str, str], Path]) -> None:
    stored = onnx_matmuls(folder("int4", "onnx"))
    weights = {key[2]: count for key, count in stored.items() if key[0] == "body" and key[2] != "activation"}
    assert weights == {"INT4": LAYERS * BODIES}
    left = {key[2]: count for key, count in stored.items() if key[0] == "outside"}
    assert set(left) == {"UINT8", "FLOAT"}
    assert left["FLOAT"] == GATES


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("stage", ["int8", "int4"])
def test_weights_are_restored_once_and_not_in_each_call(stage: str, folder: Callable[[str, str], Path]) -> None:
    """ONNX Runtime computes what the main graph makes of constants alone when it loads the file, and no more then."""
    place = folder(stage, "onnx")
    assert restored_in_bodies(place) == []
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(place.parent / f"{stage}_loaded.onnx")
    ort.InferenceSession(str(place / "model.onnx"), options)
    loaded = onnx.load(options.optimized_model_filepath)
    assert not [node.name for node in loaded.graph.node if node.name.startswith("restored")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "inside", "outside"), [("int8_sym", "i8", "i8"), ("int8_asym", "u8", "u8"), ("int4_asym", "u4", "u8")]
)
def test_other_ways_to_store_weights(mode: str, inside: str, outside: str, tmp_path: Path) -> None:
    model: Any = two_blocks()
    model.transformer_blocks = model.transformer_blocks[:1]
    lazy = make(model)
    four = {"group_size": 64, "ratio": 1.0, "all_layers": True} if "4" in mode else {}
    compress_weights(lazy, None, Weights.model_validate({"mode": mode} | four))
    found = openvino_matmuls(lazycompress.export(lazy, tmp_path / mode))
    assert {key[1] for key in found if key[0] == "body"} == {inside}
    assert {key[1] for key in found if key[0] == "outside"} == {outside, "f32"}


@pytest.mark.slow(seconds=50)
def test_files_are_as_small_as_their_weights(folder: Callable[[str, str], Path]) -> None:
    for format in FORMATS:
        sizes = {stage: size_of(folder(stage, format)) for stage in ("f32", "int8", "int4")}
        # A graph of 4 branches weighs as much as a good part of 0.7 million weights.
        structure = size_of(folder("f32", format)) - 4 * sum(p.numel() for p in two_blocks().parameters())
        in_branches = 2 * 12 * 128**2
        assert sizes["f32"] - sizes["int8"] > 0.75 * 3 * in_branches, format
        assert (sizes["int4"] - structure) < 0.28 * (sizes["f32"] - structure), format


# -- what they give ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "format"),
    [
        ("int8", "openvino"),
        ("int4", "onnx"),
        pytest.param("int8", "onnx", marks=pytest.mark.slow),
        pytest.param("int4", "openvino", marks=pytest.mark.slow),
    ],
)
def test_torch_and_file_decide_alike(
    stage: str, format: str, request: pytest.FixtureRequest, folder: Callable[[str, str], Path]
) -> None:
    lazy: LazyModel = request.getfixturevalue(stage)
    lazy.reset()
    runner = start(folder(stage, format), format)
    scheduler = build_scheduler()
    scheduler.set_timesteps(50)
    sample, labels = draw_noise(8, 7), torch.arange(8)
    for step in scheduler.timesteps:
        inputs = {"hidden_states": sample, "timestep": step.repeat(8), "class_labels": labels}
        with torch.no_grad():
            expected = lazy(**inputs).sample
        found = runner(**inputs).sample
        assert float((found - expected).square().mean()) < 1e-3 * float(expected.square().mean())
        sample = scheduler.step(expected, step, sample).prev_sample
    reused, in_file = lazy.usage.heatmap()[1], runner.usage.heatmap()[1]
    assert float((reused - in_file).abs().mean()) <= 0.005
    assert 0.2 < float(reused.mean()) < 0.8
    assert ((reused > 0) & (reused < 1)).any(), "samples of one batch decide differently"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"preset": "performance"}, {"smooth_quant_alpha": 0.5}], ids=str)
def test_other_ways_to_quantize_are_integers_in_onnx_too(options: dict[str, Any], tmp_path: Path) -> None:
    model: Any = two_blocks()
    model.transformer_blocks = model.transformer_blocks[:1]
    lazy = make(model)
    quantize(lazy, sampler, Quantize(subset_size=6, **options))
    path = lazycompress.export(lazy, tmp_path / "out", format="onnx", weights="f16")
    in_bodies = {key[1:]: count for key, count in onnx_matmuls(path).items() if key[0] == "body"}
    assert in_bodies == {("MatMulIntegerToFloat", "INT8"): LAYERS // 2 * BODIES, ("MatMul", "activation"): 2 * BODIES}
    runner = start(path, "onnx")
    lazy.reset()
    for time in (900, 800, 700):
        inputs = {
            "hidden_states": draw_noise(4, time),
            "timestep": torch.full((4,), time),
            "class_labels": torch.arange(4),
        }
        with torch.no_grad():
            expected = lazy(**inputs).sample
        assert float((runner(**inputs).sample - expected).square().mean()) < 1e-3 * float(expected.square().mean())


@pytest.mark.parametrize("stage", ["int8", "int4"])
def test_the_error_is_small_and_not_zero(stage: str, request: pytest.FixtureRequest) -> None:
    lazy: LazyModel = request.getfixturevalue(stage)
    plain = make(lazy.model)
    run = digits_sampler(draw_noise(4, 3), torch.arange(4), 12)
    with torch.no_grad():
        expected = run(plain)
        lazy.reset()
        found = run(lazy)
    assert 1e-9 < float((found - expected).square().mean()) < 1e-2 * float(expected.square().mean())


def test_values_are_rounded_next_to_the_layer_that_reads_them(int8: LazyModel) -> None:
    """Not right after attention, to be moved then: rounding would be part of OpenVINO's kernel, and make it slow."""

    def reader(node: fx.Node) -> str:
        """What reads a value, behind operations that only move it."""
        target = str(next(iter(node.users)).target)
        moves = any(move in target for move in ("transpose", "permute", "reshape", "view", "aten.to."))
        return f"moved {reader(next(iter(node.users)))}" if moves else target

    nodes = int8.program(int8.example).flat.graph_module.graph.nodes
    readers = Counter(reader(node) for node in nodes if "dequantize_per_tensor" in str(node.target))
    assert readers["aten.linear.default"] > 0
    assert "linear" not in " ".join(name for name in readers if name.startswith("moved"))


def test_any_batch_size_can_follow(int8: LazyModel) -> None:
    int8.reset()
    with torch.no_grad():
        both = digits_sampler(draw_noise(3, 3), torch.arange(3), 6)(int8)
        int8.reset()
        alone = digits_sampler(draw_noise(3, 3)[1:2], torch.arange(3)[1:2], 6)(int8)
    torch.testing.assert_close(both[1:2], alone, rtol=0, atol=2e-2)


# -- calibration ---------------------------------------------------------------------------------------------------------


def test_calibration_sees_all_timesteps_in_one_sampling_run() -> None:
    runs: list[int] = []

    def counted(model: Any) -> Tensor:
        runs.append(1)
        return sampler(model)

    lazy = make()
    quantize(lazy, counted, Quantize(subset_size=50))
    assert runs == [1], "one pass, however many branches there are"
    data = calibration(make(), sampler, 6, 0)
    scheduler = build_scheduler()
    scheduler.set_timesteps(12)
    times = scheduler.timesteps.tolist()
    assert [int(call[1][0]) for call in data] == [times[k] for k in (0, 2, 4, 7, 9, 11)]
    caches = [call[4] for call in data]
    assert not any(torch.equal(a, b) for a, b in pairwise(caches)), "caches as they really are"


def test_a_second_stage_on_the_same_weights_is_one_line(int8: LazyModel) -> None:
    for again in (partial(quantize, int8, never, Quantize()), partial(compress_weights, int8, never, INT4)):
        with pytest.raises(LazyCompressError, match="went through quantize already"):
            again()


# -- whole recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow(seconds=80)
@pytest.mark.parametrize("recipe", ["lazy_dit_int8.yaml", "lazy_dit_int4.yaml", "lazy_dit_pruned_int8.yaml"])
def test_shipped_recipes_run_and_export_to_both_formats(recipe: str, tmp_path: Path) -> None:
    model: Any = two_blocks()
    model.transformer_blocks = model.transformer_blocks[:1]
    own = {"target": 0.7, "train.effort": 0.2}
    own |= {"prune.finetune_steps": 3} if load_recipe(recipe).prune is not None else {}
    lazy = lazycompress.apply(model, recipe, sampler=sampler, overrides=own, progress=False)
    assert lazy.stages == (["weights"] if "int4" in recipe else ["quantize"])
    assert lazy.training_report.macs_ratio <= 0.7
    assert [report.stage for report in lazy.reports] == (["prune", "quantize"] if "pruned" in recipe else lazy.stages)
    stored = ("i4", "INT4") if "int4" in recipe else ("i8", "INT8")
    found = openvino_matmuls(lazycompress.export(lazy, tmp_path / "openvino", format="openvino"))
    # The whole network is in one body, once: what is in no branch is as it was.
    narrow = sum(count for key, count in found.items() if key[:2] == ("body", stored[0]))
    assert narrow == LAYERS // 2
    found_in_onnx = onnx_matmuls(lazycompress.export(lazy, tmp_path / "onnx", format="onnx"))
    narrow = sum(count for key, count in found_in_onnx.items() if key[0] == "body" and key[2] == stored[1])
    assert narrow == LAYERS // 2


@pytest.mark.parametrize("stage", ["int8", "int4"])
def test_gates_that_move_afterwards_are_those_of_the_graph(stage: str, request: pytest.FixtureRequest) -> None:
    lazy: LazyModel = request.getfixturevalue(stage)
    before = lazy.gates.bias.detach().clone()
    run = digits_sampler(draw_noise(2, 3), torch.arange(2), 6)
    shares = []
    for bias in (-100.0, 100.0):
        with torch.no_grad():
            lazy.gates.bias.fill_(bias)
            lazy.reset()
            run(lazy)
        shares.append(lazy.summary().skip_ratio)
    with torch.no_grad():
        lazy.gates.bias.copy_(before)
    assert shares[0] == 0
    assert shares[1] > 0.5


@pytest.mark.slow(seconds=16)
def test_gates_can_be_learned_on_the_quantized_model() -> None:
    own = {"target": 0.7, "train.effort": 0.2, "order": "quantize_train"}
    lazy = lazycompress.apply(two_blocks(), "lazy_dit_int8.yaml", sampler=sampler, overrides=own, progress=False)
    assert lazy.stages == ["quantize"]
    assert lazy.training_report.macs_ratio <= 0.7
    assert lazy.training_report.error > 0
    with torch.no_grad():
        sampler(lazy)
    assert lazy.summary().skip_ratio > 0
    assert all(p.dtype is torch.float32 for p in lazy.gates.parameters())
