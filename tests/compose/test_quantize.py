"""Quantization and weight compression: what the files compute with, what they give, what is refused before any work."""

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
from torch import Tensor, fx, nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.compose import quantize as compose
from lazycompress.compose.quantize import calibration, compress_weights, quantize
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.integrations.digits.model import build_scheduler, digits_sampler, draw_noise
from lazycompress.recipe import IgnoredScope, Quantize, Weights, load_recipe
from lazycompress.runtime import LazyModel, wrap
from tests.compose_files import onnx_matmuls, openvino_matmuls, restored_in_bodies, size_of
from tests.conftest import make_lively_gates, two_blocks

FORMATS = ["openvino", "onnx"]

#: Two blocks, each with q, k, v, out and two layers of an MLP; each branch has a body for all samples and one for some.
LAYERS, BODIES, GATES = 12, 2, 4

INT4 = Weights(mode="int4_sym", group_size=64, ratio=1.0, all_layers=True)


def sampler(model: Any) -> Tensor:
    noise = draw_noise(4, int(torch.randint(0, 10**6, (1,))))
    return digits_sampler(noise, torch.arange(4), 12)(model)


def make(model: nn.Module | None = None) -> LazyModel:
    inputs = {
        "hidden_states": draw_noise(2),
        "timestep": torch.tensor([980, 980]),
        "class_labels": torch.tensor([1, 2]),
    }
    return wrap(model or two_blocks(), (), inputs, make_lively_gates)


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


def test_all_weights_of_branches_are_in_4_bits_and_others_in_8_in_onnx(folder: Callable[[str, str], Path]) -> None:
    stored = onnx_matmuls(folder("int4", "onnx"))
    weights = {key[2]: count for key, count in stored.items() if key[0] == "body" and key[2] != "activation"}
    assert weights == {"INT4": LAYERS * BODIES}
    left = {key[2]: count for key, count in stored.items() if key[0] == "outside"}
    assert set(left) == {"UINT8", "FLOAT"}
    assert left["FLOAT"] == GATES


@pytest.mark.parametrize("stage", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
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


# -- a limit on the error ------------------------------------------------------------------------------------------------


def test_an_error_above_the_limit_stops_and_leaves_the_model_alone() -> None:
    lazy = make()
    expected = r"quantize\.max_error: .* is \d\.\d+e-\d+, allowed are 1\.00e-09.*fall_back"
    with pytest.raises(LazyCompressError, match=expected) as caught:
        quantize(lazy, sampler, Quantize(subset_size=12, max_error=1e-9))
    assert "\n" not in str(caught.value)
    assert lazy.stages == []
    plain = make()
    run = digits_sampler(draw_noise(2, 3), torch.arange(2), 6)
    with torch.no_grad():
        assert torch.equal(run(lazy), run(plain))


@pytest.mark.slow(seconds=27)
def test_falling_back_leaves_out_the_layers_that_hurt_most() -> None:
    """One layer is made hard to quantize: a huge weight takes the whole range of its channel's activations."""
    model: Any = two_blocks()
    with torch.no_grad():
        layer = model.transformer_blocks[1].ff.net[0].proj
        layer.weight[:, 0] *= 100.0
        layer.weight[:, 1:] += 0.02 * torch.randn(layer.weight[:, 1:].shape, generator=torch.Generator().manual_seed(0))

    def computing() -> LazyModel:
        """No decision hangs on a rounded value: the error is that of the arithmetic."""
        lazy = make(model)
        lazy.set_gates(lazy.gates.like(order=0, static=1))
        return lazy

    free = quantize(computing(), sampler, Quantize(subset_size=12, max_error=1e9))
    assert free.error is not None
    lazy = computing()
    report = quantize(lazy, sampler, Quantize(subset_size=12, max_error=free.error / 2, on_error="fall_back"))
    assert report.error is not None
    assert report.error <= free.error / 2
    assert "transformer_blocks.1.ff.net.0.proj" in report.spared
    assert report.left == sum(".attn" in name or ".ff." in name for name in report.spared)
    assert report.changed == LAYERS - report.left
    assert "left out as they hurt most: " in str(report)


@pytest.mark.slow(seconds=60)
def test_layers_outside_of_branches_are_left_out_by_measurement_too(tmp_path: Path) -> None:
    """The rows of the last projection have ranges far apart after this: 8 bits for each row's range are too few."""
    model: Any = two_blocks()
    with torch.no_grad():
        model.proj_out_2.weight[:, 0] *= 300.0

    def computing() -> LazyModel:
        lazy = make(model)
        lazy.set_gates(lazy.gates.like(order=0, static=1))
        return lazy

    free = quantize(computing(), sampler, Quantize(subset_size=12, max_error=1e9))
    assert free.error is not None
    options = Quantize(subset_size=12, max_error=free.error / 2, on_error="fall_back")
    lazy = computing()
    report = quantize(lazy, sampler, options)
    assert "proj_out_2" in report.spared
    found = openvino_matmuls(lazycompress.export(lazy, tmp_path / "out"))
    # Which others hurt too differs between processors; convolutions are no matmuls.
    layers = dict(model.named_modules())
    outside = [name for name in report.spared if ".attn" not in name and ".ff." not in name]
    assert len(outside) == len(report.spared) - report.left
    left = sum(isinstance(layers[name], nn.Linear) for name in outside)
    assert found["outside", "f32", False] == left, "static gates multiply nothing"


@pytest.mark.slow(seconds=60)
def test_weights_that_hurt_stay_in_8_bits(tmp_path: Path) -> None:
    free = compress_weights(make(), sampler, INT4.model_copy(update={"max_error": 1e9}))
    assert free.error is not None
    options = INT4.model_copy(update={"max_error": free.error / 2, "on_error": "fall_back"})
    lazy = make()
    report = compress_weights(lazy, sampler, options)
    assert report.error is not None
    assert report.error <= free.error / 2
    assert (report.changed, report.left) == (LAYERS, 0)
    found = openvino_matmuls(lazycompress.export(lazy, tmp_path / "out"))
    spared = sum(".attn" in name or ".ff." in name for name in report.spared) * BODIES
    assert {key[1]: count for key, count in found.items() if key[0] == "body"} == {
        "i4": LAYERS * BODIES - spared,
        "u8": spared,
    }


@pytest.mark.slow(seconds=35)
def test_a_limit_that_nothing_keeps_is_one_line() -> None:
    with pytest.raises(LazyCompressError, match=r"with the \d+ of \d+ layers left out.*allowed are 1\.00e-12"):
        quantize(make(), sampler, Quantize(subset_size=4, max_error=1e-12, on_error="fall_back"))


def test_an_ignored_scope_takes_names_of_modules() -> None:
    scope = IgnoredScope(names=["transformer_blocks.0.attn1.to_q"], patterns=[r"transformer_blocks\.1\.ff.*"])
    assert quantize(make(), sampler, Quantize(subset_size=4, ignored_scope=scope)).left == 3


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
    # The whole network is in the body: what is in no branch is as it was.
    narrow = sum(count for key, count in found.items() if key[:2] == ("body", stored[0]))
    assert narrow == LAYERS // 2 * BODIES
    found_in_onnx = onnx_matmuls(lazycompress.export(lazy, tmp_path / "onnx", format="onnx"))
    narrow = sum(count for key, count in found_in_onnx.items() if key[0] == "body" and key[2] == stored[1])
    assert narrow == LAYERS // 2 * BODIES


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


# -- refused before any work ---------------------------------------------------------------------------------------------


def never(model: Any) -> Tensor:
    raise AssertionError("the sampler ran")


INPUTS = {"hidden_states": draw_noise(2), "timestep": torch.tensor([9, 9]), "class_labels": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"quantize": {"presett": "mixed"}}, r"unknown key 'quantize\.presett'; did you mean 'preset'\?"),
        ({"quantize": {"preset": "best"}}, r"key 'quantize\.preset'.*'performance'.*'mixed'.*there was 'best'"),
        ({"weights": {"mode": "int3"}}, r"key 'weights\.mode'.*there was 'int3'"),
        ({"weights": {"mode": "int8_sym", "group_size": 64}}, r"weights\.group_size is an option of the int4 modes"),
        ({"weights": {"mode": "int4_sym", "group_size": 0}}, r"weights\.group_size.*there was 0"),
        ({"order": "quantize_train"}, r"quantize_train needs a quantize section; add one, or leave order out"),
        ({"quantize": {}, "weights": {}}, r"keep one of the sections quantize and weights"),
        (
            {"quantize": {}, "order": "quantize_train", "train": {"enabled": False}},
            r"quantize_train needs train\.enabled: true",
        ),
        ({"order": "train_prune"}, r"key 'order'.*'train_quantize'.*there was 'train_prune'"),
        (
            {"quantize": {"ignored_scope": {"names": ["transformer_blocks.0.attn1.to_p"]}}},
            r"quantize\.ignored_scope\.names: 'transformer_blocks\.0\.attn1\.to_p' matches nothing; did you mean '.*to_.'",
        ),
        (
            {"weights": {"ignored_scope": {"patterns": ["blok.*"]}}},
            r"weights\.ignored_scope\.patterns: 'blok\.\*' matches",
        ),
        ({"quantize": {"ignored_scope": {"patterns": ["("]}}}, r"'\(' is no regular expression"),
        ({"quantize": {"ignored_scope": {"types": ["liner"]}}}, r"no operation type 'liner'; did you mean 'linear'"),
    ],
)
def test_a_wrong_recipe_is_one_line_before_any_work(recipe: dict[str, Any], expected: str) -> None:
    with pytest.raises(LazyCompressError, match=expected) as caught:
        lazycompress.apply(two_blocks(), recipe, example_inputs=INPUTS, sampler=never)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({"quantize": {}}, "quantize"),
        ({"weights": {"mode": "int4_sym", "awq": True}}, r"weights\.awq"),
        ({"weights": {"max_error": 1e-3}}, r"weights\.max_error"),
        ({"prune": {}}, "prune"),
    ],
)
def test_missing_calibration_data_says_what_to_pass(recipe: dict[str, Any], key: str) -> None:
    recipe = {**recipe, "train": {"enabled": False}}
    with pytest.raises(LazyCompressError, match=rf"{key}: there is nothing to calibrate on; pass sampler=, or"):
        lazycompress.apply(two_blocks(), recipe, example_inputs=INPUTS)


def test_a_second_stage_on_the_same_weights_is_one_line(int8: LazyModel) -> None:
    for again in (partial(quantize, int8, never, Quantize()), partial(compress_weights, int8, never, INT4)):
        with pytest.raises(LazyCompressError, match="went through quantize already"):
            again()


def test_a_sampler_with_other_sizes_cannot_calibrate() -> None:
    with pytest.raises(LazyCompressError, match="the sampler calls the model with other sizes"):
        quantize(make(), lambda model: torch.zeros(1, 1, 8, 8), Quantize())


def test_what_nncf_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    nncf = compose.need_nncf("a test")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("not\nthis one")

    monkeypatch.setattr(nncf, "quantize", refuse)
    with pytest.raises(LazyCompressError, match="quantize: NNCF stopped: RuntimeError: not this one"):
        quantize(make(), sampler, Quantize(subset_size=1))
