"""State of exported files: any sequence of calls gives what torch gives, in f32 and in bf16, alone and in parallel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.errors import ExportError
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.export.trace import Granularity
from lazycompress.runtime import LazyModel, wrap
from tests.export_models import Reference, alike, small_dit, small_inputs, small_lazy

from .sequences import TIMES, File, PlainOpenVINO, Runner, events, play

SLOW = pytest.mark.slow(seconds=15)


@pytest.fixture(scope="module")
def lazy() -> LazyModel:
    """Decisions by branch, step and sample; lines through the last two computations."""
    return small_lazy()


@pytest.fixture(scope="module")
def steady() -> LazyModel:
    """Gates as training makes them: static, each score far from the threshold."""
    lazy = small_lazy(spread=0.0)
    with torch.no_grad():
        lazy.gates.bias.copy_(torch.where(lazy.gates.bias > 0, 2.0, -2.0))
    return lazy


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a model once with the same options."""
    done: dict[Any, Path] = {}

    def export(
        lazy: LazyModel, format: str = "openvino", stateful: bool = True, decide: Granularity = "sample"
    ) -> Path:
        key = lazy, format, stateful, decide
        if key not in done:
            out = tmp_path_factory.mktemp("state") / "out"
            done[key] = lazycompress.export(lazy, out, format, telemetry=True, stateful=stateful, decide=decide)
        return done[key]

    return export


@pytest.fixture(scope="module")
def compiled(lazy: LazyModel, export: Callable[..., Path]) -> ov.CompiledModel:
    return compile_model(export(lazy), "f32")


@pytest.fixture(scope="module")
def compiled_bf16(steady: LazyModel, export: Callable[..., Path]) -> ov.CompiledModel:
    return compile_model(export(steady), "bf16")


def compile_model(folder: Path, precision: str) -> ov.CompiledModel:
    path = folder / "openvino_model.xml"
    return ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1})


@settings(max_examples=60, deadline=None)
@given(events)
def test_any_sequence_of_calls_equals_torch(lazy: LazyModel, compiled: ov.CompiledModel, sequence: Any) -> None:
    play(PlainOpenVINO(compiled), lazy, sequence, 1e-4)


@pytest.mark.slow(seconds=15)
@settings(max_examples=40, deadline=None)
@given(events)
def test_with_bf16_the_decisions_are_the_same(
    steady: LazyModel, compiled_bf16: ov.CompiledModel, sequence: Any
) -> None:
    play(PlainOpenVINO(compiled_bf16), steady, sequence, 6e-2)


@pytest.fixture(scope="module")
def onnx_runner(lazy: LazyModel, export: Callable[..., Path]) -> OnnxRunner:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return OnnxRunner(export(lazy, format="onnx"), options)


@pytest.mark.slow(seconds=15)
@settings(max_examples=40, deadline=None)
@given(events)
def test_any_sequence_of_calls_equals_torch_in_onnx(lazy: LazyModel, onnx_runner: OnnxRunner, sequence: Any) -> None:
    play(Runner(onnx_runner.twin()), lazy, sequence, 1e-4)


@pytest.fixture(scope="module")
def together() -> LazyModel:
    """Gates that decide all branches alike: the file has one branch, and no caches."""
    return wrap(small_dit(), (), small_inputs(2, 980), alike(torch.tensor(TIMES).float()))


@pytest.fixture(
    scope="module",
    params=[
        "openvino",
        pytest.param("openvino bf16", marks=SLOW),
        pytest.param("openvino explicit", marks=SLOW),
        pytest.param("onnx", marks=SLOW),
    ],
)
def together_file(
    request: pytest.FixtureRequest, together: LazyModel, export: Callable[..., Path]
) -> tuple[Callable[[], File], float]:
    """Makes a new state of a file; and how far its outputs may be off."""
    form, *how = request.param.split()
    folder = export(together, format=form, stateful="explicit" not in how)
    if form == "openvino" and "explicit" not in how:
        compiled = compile_model(folder, "bf16" if how else "f32")
        return lambda: PlainOpenVINO(compiled), 6e-2 if how else 1e-4
    runner = OpenVINORunner(folder) if form == "openvino" else OnnxRunner(folder)
    return lambda: Runner(runner.twin()), 1e-4


@settings(max_examples=40, deadline=None)
@given(events)
def test_any_sequence_of_calls_equals_torch_where_all_branches_decide_alike(
    together: LazyModel, together_file: tuple[Callable[[], File], float], sequence: Any
) -> None:
    play(together_file[0](), together, sequence, together_file[1])


def test_where_all_branches_decide_alike_there_is_one_branch_and_no_cache(
    together: LazyModel, export: Callable[..., Path]
) -> None:
    assert together.gates.together
    model = ov.Core().read_model(export(together) / "openvino_model.xml")
    outer = Counter(node.get_type_name() for node in model.get_ordered_ops())
    assert outer["If"] == 1
    assert outer["MatMul"] + outer["ScaledDotProductAttention"] < 3, "the network is in the branch"
    states = {sink.get_variable_id() for sink in model.get_sinks()}
    clock = {"past_timestep", "past_prints", "past_times"}
    assert states == clock | {"past_output_0", "past_slope_0", "past_curve_0"}


def test_in_torch_one_branch_gives_what_each_by_itself_gives(together: LazyModel) -> None:
    outputs = []
    for apart in (nullcontext, together.programs.each_branch):
        together.reset()
        calls = [small_inputs(3, time, number, last=number // 7) for number, time in enumerate(TIMES)]
        with torch.no_grad(), apart():
            outputs.append(torch.stack([together(**call).sample for call in calls]))
        outputs.append(together.usage.heatmap()[1])
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=1e-5)
    assert torch.equal(outputs[1], outputs[3])
    assert 0.2 < float(outputs[1].mean()) < 0.8


def test_an_image_that_went_wrong_does_not_reach_the_next(
    together_file: tuple[Callable[[], File], float],
) -> None:
    file = together_file[0]()

    def image() -> list[Tensor]:
        return [file(small_inputs(2, time, seed))[0] for seed, time in enumerate(TIMES[:20])]

    fresh = image()
    for time in (400, 380, 360, 340):
        file(small_inputs(2, time) | {"hidden_states": torch.full((2, 1, 8, 8), float("nan"))})
    assert all(torch.equal(a, b) for a, b in zip(image(), fresh, strict=True))


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("gates", ["together", "steady"])
def test_forecasts_lose_no_digits_under_a_bf16_hint(
    gates: str, request: pytest.FixtureRequest, export: Callable[..., Path]
) -> None:
    """Twenty calls further, the output is on the parabola through the file's own last three computed outputs."""
    lazy = wrap(small_dit(), (), small_inputs(2, 980), alike(torch.tensor(TIMES).float()))
    with torch.no_grad():
        lazy.gates.bias.fill_(10.0)
        lazy.gates.bias[:, -3:] = -10.0  # the first three calls compute
        if gates == "steady":
            lazy.gates.bias[0] += 1.0
    assert lazy.gates.together == (gates == "together")
    file = PlainOpenVINO(compile_model(export(lazy), "bf16"))
    calls = [file(small_inputs(2, time, seed)) for seed, time in enumerate(TIMES[:23])]
    assert [int(taken.sum()) for _, taken in calls] == [0] * 3 + [4] * 20
    x = np.array(TIMES[:23], dtype=float)
    computed = [sample.double().numpy() for sample, _ in calls[:3]]
    for k in range(3, 23):
        weights = [np.prod([(x[k] - x[j]) / (x[i] - x[j]) for j in range(3) if j != i]) for i in range(3)]
        expected = sum(weight * value for weight, value in zip(weights, computed, strict=True))
        found = calls[k][0].double().numpy()
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("gates", ["lazy", "together"])
def test_what_is_kept_has_the_shape_of_its_state(
    gates: str, request: pytest.FixtureRequest, export: Callable[..., Path]
) -> None:
    """Else the plugin copies every state in every call."""
    model = ov.Core().read_model(export(request.getfixturevalue(gates)) / "openvino_model.xml")
    shapes = {
        n.get_variable_id(): n.get_output_partial_shape(0)
        for n in model.get_ordered_ops()
        if n.get_type_name() == "ReadValue"
    }
    for sink in model.get_sinks():
        assert sink.get_input_partial_shape(0) == shapes[sink.get_variable_id()], sink.get_variable_id()


@pytest.mark.slow(seconds=30)
def test_a_file_of_one_branch_that_cannot_be_made_has_a_branch_for_each_gate(
    together: LazyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lazycompress.export import onnx

    plain = onnx.convert

    def convert(traced: Any, **options: Any) -> Any:
        if not any(spec.kind == "cache" for spec in traced.state):
            raise ExportError("not in one piece")
        return plain(traced, **options)

    monkeypatch.setattr(onnx, "convert", convert)
    runner = OnnxRunner(lazycompress.export(together, tmp_path / "out", format="onnx", telemetry=True))
    assert "with an If for each branch, not one: not in one piece" in caplog.text
    play(Runner(runner), together, [("next", 0)] * 8, 1e-4)


@pytest.fixture(scope="module")
def explicit_runner(lazy: LazyModel, export: Callable[..., Path]) -> OpenVINORunner:
    return OpenVINORunner(export(lazy, stateful=False), config={"INFERENCE_NUM_THREADS": 1})


@pytest.mark.slow(seconds=15)
@settings(max_examples=30, deadline=None)
@given(events)
def test_any_sequence_of_calls_equals_torch_with_explicit_caches(
    lazy: LazyModel, explicit_runner: OpenVINORunner, sequence: Any
) -> None:
    play(Runner(explicit_runner.twin()), lazy, sequence, 1e-4)


@pytest.fixture(scope="module", params=["openvino", pytest.param("onnx", marks=SLOW)])
def whole_batch_runner(request: pytest.FixtureRequest, lazy: LazyModel, export: Callable[..., Path]) -> Any:
    folder = export(lazy, format=request.param, decide="batch")
    return OpenVINORunner(folder) if request.param == "openvino" else OnnxRunner(folder)


@SLOW
@settings(max_examples=25, deadline=None)
@given(events)
def test_any_sequence_of_calls_equals_torch_with_one_decision_a_batch(
    lazy: LazyModel, whole_batch_runner: Any, sequence: Any
) -> None:
    play(Runner(whole_batch_runner.twin()), lazy, sequence, 1e-4, "batch")


def test_one_decision_a_batch_is_one_for_all_of_its_samples(lazy: LazyModel, whole_batch_runner: Any) -> None:
    file, reference = Runner(whole_batch_runner.twin()), Reference(lazy, "flat")
    alone_mixed = together = 0
    for time in TIMES[:12]:
        inputs = small_inputs(4, time)
        _, counts = file(inputs)
        assert set(counts.tolist()) <= {0.0, 4.0}
        together += int(counts.sum())
        alone_mixed += int(((reference(**inputs)[1].mean(dim=1) % 1) > 0).sum())
    assert together > 0
    assert alone_mixed > 0, "samples that decide for themselves differ on these calls"


@SLOW
def test_another_size_is_refused(onnx_runner: OnnxRunner, explicit_runner: OpenVINORunner) -> None:
    """A file made for one size does not return another one's numbers."""
    inputs = small_inputs(2, 980) | {"hidden_states": torch.zeros(2, 1, 16, 16)}
    for file in (Runner(onnx_runner.twin()), Runner(explicit_runner.twin())):
        with pytest.raises(LazyCompressError, match=r"input hidden_states: the dimensions \[2, 1, 16, 16\] are not"):
            file(inputs)
        sample, _ = file(small_inputs(2, 960))
        assert sample.shape == (2, 1, 8, 8), "and still runs"


@SLOW
def test_gates_and_clock_compute_in_f32_under_a_bf16_hint(steady: LazyModel, compiled_bf16: ov.CompiledModel) -> None:
    """Each gate interpolates its table in a product of its own, outside of the branches."""
    nodes = compiled_bf16.get_runtime_model().get_ordered_ops()
    kinds = Counter(
        (str(node.get_rt_info()["layerType"].value), str(node.get_rt_info()["runtimePrecision"].value))
        for node in nodes
        if "layerType" in node.get_rt_info()
    )
    print(kinds)
    assert kinds["FullyConnected", "bf16"] > 0, "the plugin computes in bf16"


@SLOW
def test_timesteps_one_apart_count_under_a_bf16_hint(steady: LazyModel, compiled_bf16: ov.CompiledModel) -> None:
    request, reference = PlainOpenVINO(compiled_bf16), Reference(steady, "flat")
    for time in range(999, 960, -1):
        inputs = small_inputs(2, time)
        assert torch.equal(request(inputs)[1], reference(**inputs)[1])


def test_requests_in_parallel_keep_their_own_state(lazy: LazyModel, compiled: ov.CompiledModel) -> None:
    def image(request: ov.InferRequest, number: int) -> np.ndarray[Any, Any]:
        outputs = []
        for time in TIMES[::5]:
            inputs = small_inputs(1 + number, time, number, number)
            request.start_async({name: value.numpy() for name, value in inputs.items()})
            request.wait()
            outputs.append(request.get_tensor("sample").data.copy())
        return np.stack(outputs)

    alone = [image(compiled.create_infer_request(), number) for number in range(4)]
    requests = [compiled.create_infer_request() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(image, requests, range(4)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_async_calls_of_two_requests_in_turn(lazy: LazyModel, compiled: ov.CompiledModel) -> None:
    requests = [compiled.create_infer_request() for _ in range(2)]
    references = [Reference(lazy, "flat") for _ in range(2)]
    for time in TIMES[:12]:
        calls = [small_inputs(2, time, seed, label=seed) for seed in range(2)]
        for request, inputs in zip(requests, calls, strict=True):
            request.start_async({name: value.numpy() for name, value in inputs.items()})
        for request, inputs, reference in zip(requests, calls, references, strict=True):
            request.wait()
            expected = reference(**inputs)[0].numpy()
            np.testing.assert_allclose(request.get_tensor("sample").data, expected, rtol=0, atol=1e-4)


@SLOW
def test_onnx_runners_in_parallel_keep_their_own_state(onnx_runner: OnnxRunner) -> None:
    def image(runner: OnnxRunner, number: int) -> Tensor:
        return torch.stack([runner(**small_inputs(1 + number, t, number, number)).sample for t in TIMES[::5]])

    alone = [image(onnx_runner.twin(), number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(image, [onnx_runner.twin() for _ in range(4)], range(4)))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_explicit_caches_are_inputs_and_outputs(lazy: LazyModel, export: Callable[..., Path]) -> None:
    folder = export(lazy, stateful=False)
    model = ov.Core().read_model(folder / "openvino_model.xml")
    clock = ["past_timestep", "past_prints", "past_times"]
    state = [*clock, "past_0_0", "past_1_0", "past_output_0", "past_slope_0"]
    assert [port.get_any_name() for port in model.inputs] == ["hidden_states", "timestep", "class_labels", *state]
    present = [name.replace("past", "present", 1) for name in state]
    assert [port.get_any_name() for port in model.outputs] == ["sample", *present, "lazy_decisions"]
    assert not any(node.get_type_name() in ("ReadValue", "Assign") for node in model.get_ordered_ops())
    runner, reference = OpenVINORunner(folder), Reference(lazy, "flat")
    for number, time in enumerate([*TIMES[:8], *TIMES[:6]]):
        inputs = small_inputs(2 + number // 8, time, number)
        expected = reference(**inputs)[0]
        found = runner(**{name: value.numpy() for name, value in inputs.items()})["sample"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert 0.1 < runner.summary().skip_ratio < 0.9
