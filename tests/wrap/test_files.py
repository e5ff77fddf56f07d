"""What wrapped files and folders keep of the old ones, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest

import lazycompress
from lazycompress import InputError, LazyCompressError
from lazycompress.cli import main
from lazycompress.plan.plan import Plan, dense, even
from lazycompress.wrap.plans import read_plan
from lazycompress.wrap.verify import verify_wrapped

from .models import CHANNELS, WIDTH, Onnx, OpenVINO, onnx_model, openvino_model

TIMES = tuple(980.0 - 20 * k for k in range(6))
PLAN = even(TIMES, 0.5, 1)
MODEL = "openvino_model.xml"


def run(runner: Any, batch: int = 2, size: int = 6, tokens: int = 3) -> list[Any]:
    """Two images of one prompt; all outputs."""
    words = np.random.default_rng(9).normal(size=(batch, tokens, WIDTH)).astype(np.float32)
    found = []
    for seed in (1, 2):
        latents = np.random.default_rng(seed).normal(size=(batch, CHANNELS, size, size)).astype(np.float32)
        for time in TIMES:
            inputs = {"hidden_states": latents, "timestep": np.full(batch, time, np.float32)}
            found.append(runner(**inputs, encoder_hidden_states=words))
            latents = (latents - 0.05 * found[-1]).astype(np.float32)
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    return all(a.shape == b.shape and np.allclose(a, b, rtol=0, atol=2e-6) for a, b in zip(one, other, strict=True))


def ports(model: Any) -> list[Any]:
    return [
        (port.get_names(), str(port.get_partial_shape()), port.get_element_type(), port.get_node().get_friendly_name())
        for port in (*model.inputs, *model.outputs)
    ]


def test_an_ir_keeps_its_ports_and_notes(tmp_path: Path) -> None:
    dense = openvino_model()
    dense.inputs[0].get_node().set_layout(ov.Layout("NCHW"))
    ov.save_model(dense, tmp_path / "dense.xml", compress_to_fp16=False)
    lazycompress.wrap(tmp_path / "dense.xml", PLAN, tmp_path / "lazy")
    found, dense = ov.Core().read_model(tmp_path / "lazy" / "dense.xml"), ov.Core().read_model(tmp_path / "dense.xml")
    assert ports(found) == ports(dense)
    assert found.get_rt_info(["a", "note"]).astype(str) == "kept"
    assert found.inputs[0].get_node().get_layout() == ov.Layout("NCHW")
    assert {name.split(".")[0] for name in (v.info.variable_id for v in found.get_variables())} == {"lazycompress"}


def test_a_model_in_memory_is_left_as_it_is(tmp_path: Path) -> None:
    model = openvino_model()
    before = [node.get_friendly_name() for node in model.get_ordered_ops()]
    lazycompress.wrap(model, PLAN, tmp_path / "lazy")
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_an_onnx_model_keeps_its_ports_and_notes(opset: int, tmp_path: Path) -> None:
    onnx.save(onnx_model(opset=opset), tmp_path / "dense.onnx")
    lazycompress.wrap(tmp_path / "dense.onnx", PLAN, tmp_path / "lazy")
    dense, found = onnx.load(tmp_path / "dense.onnx"), onnx.load(tmp_path / "lazy" / "dense.onnx")
    onnx.checker.check_model(found, full_check=True)
    onnx.shape_inference.infer_shapes(found, strict_mode=True)
    assert list(found.graph.input)[:3] == list(dense.graph.input)
    assert list(found.graph.output)[:1] == list(dense.graph.output)
    assert [i.name for i in found.graph.input[3:]] == ["past_clock", "past_latents", "past_output_0"]
    assert found.metadata_props == dense.metadata_props
    weights = {tensor.name: tensor for tensor in found.graph.initializer}
    assert all(weights[tensor.name] == tensor for tensor in dense.graph.initializer)
    lazy = Onnx(str(tmp_path / "lazy" / "dense.onnx"))
    assert [i.name for i in lazy.session.get_inputs()] == [
        i.name for i in dense.graph.input
    ]  # the others have defaults
    run(lazy)


def test_a_past_without_defaults_is_handed_zeros_first(tmp_path: Path) -> None:
    onnx.save(onnx_model(), tmp_path / "dense.onnx")
    lazycompress.wrap(tmp_path / "dense.onnx", PLAN, tmp_path / "lazy")
    (tmp_path / "plan.json").write_text(json.dumps({"timesteps": TIMES, "computes": PLAN.computes, "order": 1}))
    main(["wrap", str(tmp_path / "dense.onnx"), str(tmp_path / "js"), "--plan", str(tmp_path / "plan.json"),
          "--no-past-defaults"])  # fmt: skip
    onnx.checker.check_model(onnx.load(tmp_path / "js" / "dense.onnx"), full_check=True)
    lazy, other = (Onnx(str(tmp_path / name / "dense.onnx")) for name in ("lazy", "js"))
    pasts = [info for info in other.session.get_inputs() if info.name.startswith("past_")]
    assert [info.name for info in pasts] == ["past_clock", "past_latents", "past_output_0"]
    other.past = {i.name: np.zeros([s if isinstance(s, int) else 1 for s in i.shape], np.float32) for i in pasts}
    assert same(run(other), run(lazy))
    (compared,) = verify_wrapped(tmp_path / "js", tmp_path / "dense.onnx")
    assert compared.ok


def test_external_weights_stay_where_they_are(tmp_path: Path) -> None:
    model = onnx_model()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4096, np.float32), "large"))
    model.graph.node.insert(0, onnx.helper.make_node("ReduceMax", ["large"], ["one_more"], keepdims=0))
    model.graph.node.insert(1, onnx.helper.make_node("Mul", ["two", "one_more"], ["still_two"]))
    model.graph.node[2].input[1] = "still_two"
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    before = (tmp_path / "m.data").read_bytes()
    lazycompress.wrap(tmp_path / "m.onnx", PLAN, tmp_path / "lazy")
    assert (tmp_path / "lazy" / "m.data").read_bytes() == before
    model = onnx.load(tmp_path / "m.onnx")
    onnx.save(model, tmp_path / "whole.onnx")
    lazycompress.wrap(tmp_path / "whole.onnx", PLAN, tmp_path / "other")
    assert same(run(Onnx(str(tmp_path / "lazy" / "m.onnx"))), run(Onnx(str(tmp_path / "other" / "whole.onnx"))))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_reshape_before_or_after(batch: int, tmp_path: Path) -> None:
    shapes = {"hidden_states": [batch, CHANNELS, 6, 6], "timestep": [batch], "encoder_hidden_states": [batch, 3, WIDTH]}
    lazycompress.wrap(openvino_model(), PLAN, tmp_path / "dynamic")
    expected = run(OpenVINO(tmp_path / "dynamic" / "openvino_model.xml"), batch)
    after = ov.Core().read_model(tmp_path / "dynamic" / "openvino_model.xml")
    after.reshape(shapes)
    assert same(run(OpenVINO(after), batch), expected)
    ov.save_model(after, tmp_path / "saved.xml")
    assert same(run(OpenVINO(tmp_path / "saved.xml"), batch), expected)
    model = openvino_model()
    model.reshape(shapes)
    lazycompress.wrap(model, PLAN, tmp_path / "static")
    before = ov.Core().read_model(tmp_path / "static" / "openvino_model.xml")
    assert not before.is_dynamic()
    assert all(variable.info.data_shape.is_static for variable in before.get_variables())
    assert same(run(OpenVINO(before), batch), expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_reshaped_file_computes_what_the_reshaped_dense_file_computes(batch: int, tmp_path: Path) -> None:
    shapes = {"hidden_states": [batch, CHANNELS, 6, 6], "timestep": [batch], "encoder_hidden_states": [batch, 3, WIDTH]}
    models = []
    for plan in (dense(TIMES), PLAN):
        models.append(
            ov.Core().read_model(lazycompress.wrap(openvino_model(), plan, tmp_path / str(len(models))) / MODEL)
        )
    for model in (*models, full := openvino_model()):
        model.reshape(shapes)
    everything, lazy, plain = map(OpenVINO, (*models, full))
    pairs: list[bool] = []

    def both(runner: Any) -> Any:
        def call(**inputs: Any) -> Any:
            output = runner(**inputs)
            pairs.append(np.array_equal(output, plain(**inputs)))
            return output

        return call

    run(both(everything), batch)
    run(both(lazy), batch)
    assert pairs == [True] * 2 * len(TIMES) + list(PLAN.computes) * 2


def test_outputs_of_more_channels_than_the_latents(tmp_path: Path) -> None:
    lazycompress.wrap(openvino_model(channels=8), PLAN, tmp_path / "lazy")
    lazy, dense = OpenVINO(tmp_path / "lazy" / "openvino_model.xml"), OpenVINO(openvino_model(channels=8))
    latents, words = np.ones((1, CHANNELS, 6, 6), np.float32), np.ones((1, 3, WIDTH), np.float32)
    latents += np.random.default_rng(0).normal(size=latents.shape).astype(np.float32)
    computed = []
    for time in TIMES:
        inputs = {"hidden_states": latents, "timestep": np.full(1, time, np.float32), "encoder_hidden_states": words}
        output = lazy(**inputs)
        computed.append(np.array_equal(output, dense(**inputs)))
        latents = (latents - 0.05 * output[:, :CHANNELS]).astype(np.float32)
    assert computed == list(PLAN.computes)


def test_nothing_new_computes_in_bfloat16(tmp_path: Path) -> None:
    lazycompress.wrap(openvino_model(2, 6, 3), PLAN, tmp_path / "lazy")
    hint = {"INFERENCE_PRECISION_HINT": "bf16"}
    compiled = ov.Core().compile_model(tmp_path / "lazy" / "openvino_model.xml", "CPU", hint)
    notes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    assert not [n["originalLayersNames"].value for n in notes if n["runtimePrecision"].value == "bf16"]


def test_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    out = lazycompress.wrap(openvino_model(), PLAN, tmp_path / "lazy")
    card = json.loads((out / "lazycompress.json").read_text(encoding="utf-8"))
    assert card["plan"] == {
        "timesteps": list(TIMES),
        "computes": list(PLAN.computes),
        "order": 1,
        "streams": [0] * len(TIMES),
        "fitted": [[]] * len(TIMES),
    }
    assert (card["timestep"], card["latents"], card["conditions"]) == (
        "timestep", "hidden_states", ["encoder_hidden_states"],
    )  # fmt: skip
    for name, file in card["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == file["sha256"]
    assert set(card["files"]) == {path.name for path in out.iterdir()} - {"lazycompress.json"}


def test_a_folder_comes_with_what_else_is_in_it(tmp_path: Path) -> None:
    source = tmp_path / "pipe"
    for name in ("transformer", "vae_decoder"):
        (source / name).mkdir(parents=True)
        (source / name / "config.json").write_text("{}", encoding="utf-8")
    (source / "model_index.json").write_text("{}", encoding="utf-8")
    ov.save_model(openvino_model(), source / "transformer" / "openvino_model.xml")
    value = ov.opset13.parameter([1, 4], np.float32, name="latent_sample")
    value.output(0).get_tensor().set_names({"latent_sample"})
    decoder = ov.Model([ov.opset13.result(ov.opset13.relu(value))], [value], "decoder")
    ov.save_model(decoder, source / "vae_decoder" / "openvino_model.xml")
    out = lazycompress.wrap(source, PLAN, tmp_path / "out")
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    cards = {Path("lazycompress.json"), Path("transformer/lazycompress.json")}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == files | cards
    assert ov.Core().read_model(out / "transformer" / "openvino_model.xml").get_variables()
    assert not ov.Core().read_model(out / "vae_decoder" / "openvino_model.xml").get_variables()


def _old(folder: Path) -> Path:
    onnx.save(onnx_model(opset=12), folder / "old.onnx")
    return folder / "old.onnx"


def _text(folder: Path) -> Path:
    (folder / "text.onnx").write_text("no model", encoding="utf-8")
    return folder / "text.onnx"


def _lazy(folder: Path) -> Path:
    return lazycompress.wrap(openvino_model(), PLAN, folder / "first") / "openvino_model.xml"


def _unnamed(folder: Path) -> Any:
    model = openvino_model()
    model.inputs[1].get_tensor().set_names({"when"})
    return model


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (_old, {}, "opset 12"),
        (_text, {}, "no ONNX model"),
        (_lazy, {}, "lazy already"),
        (_unnamed, {}, "timestep_input"),
        (lambda folder: folder / "nowhere.xml", {}, "there is no file"),
        (lambda folder: openvino_model(), {"timestep_input": "t"}, "no input 't'"),
        (lambda folder: openvino_model(), {"moving": ["control"]}, "no input 'control'"),
        (lambda folder: openvino_model(), {"streams": 0}, "streams"),
        (lambda folder: openvino_model(), {"past_defaults": False}, "past_defaults"),
        (lambda folder: openvino_model(), {"plan": Plan((3.0, 1.0, 2.0), (True,) * 3)}, "turn back"),
    ],
)  # fmt: skip
def test_what_cannot_be_wrapped_is_refused(make: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = make(tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        lazycompress.wrap(model, options.pop("plan", PLAN), tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(LazyCompressError, match="not empty"):
        lazycompress.wrap(openvino_model(), PLAN, out)
    lazycompress.wrap(openvino_model(), PLAN, tmp_path / "lazy")
    with pytest.raises(LazyCompressError, match="overwrite"):
        lazycompress.wrap(openvino_model(), PLAN, tmp_path / "lazy")
    lazycompress.wrap(openvino_model(), PLAN, tmp_path / "lazy", overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(onnx_model(), tmp_path / "dense.onnx")
    plan = {"timesteps": list(TIMES), "computes": list(PLAN.computes), "order": 1}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    main(["wrap", str(tmp_path / "dense.onnx"), str(tmp_path / "lazy"), "--plan", str(tmp_path / "plan.json")])
    assert "written to" in capsys.readouterr().out
    assert (tmp_path / "lazy" / "dense.onnx").is_file()
    main(["summary", str(tmp_path / "lazy")])
    assert "50.0% of 6 calls" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / "lazy")])
    assert "dense file" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text('{"timesteps": [1, 2]}', encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["wrap", str(tmp_path / "dense.onnx"), str(tmp_path / "other"), "--plan", str(tmp_path / "plan.json")])
    assert "plan.json" in capsys.readouterr().err


def test_a_saved_plan_is_a_plan_for_files(tmp_path: Path) -> None:
    """What `save` writes for guidance in two calls, whose passes have one plan; passes with plans of their own are refused."""
    calls = [(time, stream) for time in TIMES for stream in (0, 1)]
    found = {
        "lazycompress": "0.1.0", "model": "Any", "timesteps": [time for time, _ in calls],
        "computes": [computes for computes in PLAN.computes for _ in (0, 1)], "order": 1,
        "streams": [stream for _, stream in calls],
    }  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    out = lazycompress.wrap(openvino_model(), read_plan(path), tmp_path / "lazy")
    card = json.loads((out / "lazycompress.json").read_text(encoding="utf-8"))
    assert card["plan"]["computes"] == list(PLAN.computes)
    apart = Plan(tuple(found["timesteps"]), (*[True] * (len(calls) - 1), False), 1, tuple(found["streams"]))
    with pytest.raises(InputError, match="plans of their own"):
        lazycompress.wrap(openvino_model(), apart, tmp_path / "other")
