"""A wrapped file beside its dense one: what is right is called so, and what is not is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from safetensors.numpy import save_file

import lazycompress
from lazycompress import ExportError, InputError
from lazycompress.cli import main
from lazycompress.export.check import verify
from lazycompress.plan.plan import Plan, even
from lazycompress.wrap.verify import verify_wrapped

from .models import CHANNELS, WIDTH, onnx_model, openvino_model

TIMES = tuple(980.0 - 20 * k for k in range(10))
PLAN = even(TIMES, 0.4, 1)


def written(folder: Path, format: str) -> Path:
    """The dense file."""
    folder.mkdir(exist_ok=True)
    if format == "openvino":
        ov.save_model(openvino_model(channels=2 * CHANNELS), folder / "dense.xml", compress_to_fp16=False)
        return folder / "dense.xml"
    onnx.save(onnx_model(), folder / "dense.onnx")
    return folder / "dense.onnx"


@pytest.mark.parametrize("format", ["openvino", "onnx"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_it_computes_what_is_planned_and_gives_what_the_dense_file_gives(
    format: str, order: int, tmp_path: Path
) -> None:
    dense = written(tmp_path / "dense", format)
    lazycompress.wrap(dense, Plan(TIMES, PLAN.computes, order), tmp_path / "lazy")
    for given in (dense, dense.parent):
        (found,) = verify_wrapped(tmp_path / "lazy", given)
        assert found.ok
        assert (found.computed, found.planned, found.calls) == (4, 4, 10)
        assert found.relative == 0.0
        assert 0.0 < found.forecast < 0.5
        assert min(found.dense_seconds, found.lazy_seconds) > 0.0


@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_another_dense_file_is_found_out(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lazycompress.wrap(written(tmp_path / "dense", format), PLAN, tmp_path / "lazy")
    if format == "openvino":
        model = openvino_model(channels=2 * CHANNELS)
        value = model.get_results()[0].input_value(0)
        other = ov.opset13.multiply(value, np.float32(1.001))
        other.output(0).get_tensor().set_names({"out"})
        ov.save_model(ov.Model([ov.opset13.result(other)], model.get_parameters()), tmp_path / "other.xml")
        path = tmp_path / "other.xml"
    else:
        changed = onnx_model()
        changed.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32([2.001]), "two"))
        path = tmp_path / "other.onnx"
        onnx.save(changed, path)
    assert not verify_wrapped(tmp_path / "lazy", path)[0].ok
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / "lazy"), "--dense", str(path)])
    printed = capsys.readouterr()
    assert "DIFFERS, 4 of 10 calls computed" in printed.out
    assert "does not give what its dense file gives" in printed.err


def test_the_command_says_how_fast_it_is_and_takes_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = written(tmp_path / "dense", "openvino")
    lazycompress.wrap(dense, PLAN, tmp_path / "lazy")
    rng = np.random.default_rng(0)
    call = {
        "hidden_states": rng.normal(size=(3, CHANNELS, 5, 7)).astype(np.float32),
        "timestep": np.full(3, 980, np.float32),
        "encoder_hidden_states": rng.normal(size=(3, 4, WIDTH)).astype(np.float32),
    }
    save_file(call, tmp_path / "call.safetensors")
    command = ["verify", str(tmp_path / "lazy"), "--dense", str(dense), "--inputs", str(tmp_path / "call.safetensors")]
    main(command)
    assert "ok, 4 of 10 calls computed (planned 4)" in capsys.readouterr().out
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["files"][0]["computed"] == 4
    del call["timestep"]
    save_file(call, tmp_path / "call.safetensors")
    with pytest.raises(InputError, match=r"needs the inputs .*; missing: timestep"):
        verify_wrapped(tmp_path / "lazy", dense, inputs=tmp_path / "call.safetensors")


def test_a_file_that_computes_something_else_than_planned_is_found_out(tmp_path: Path) -> None:
    dense = written(tmp_path / "dense", "openvino")
    lazycompress.wrap(dense, PLAN, tmp_path / "lazy")
    path = tmp_path / "lazy" / "lazycompress.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["plan"]["computes"][1] = True
    path.write_text(json.dumps(card), encoding="utf-8")
    (found,) = verify_wrapped(tmp_path / "lazy", dense)
    assert (found.computed, found.planned, found.ok) == (4, 5, False)


def test_a_pipeline_is_compared_denoiser_by_denoiser(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        (tmp_path / "dense" / name).mkdir(parents=True)
        ov.save_model(openvino_model(), tmp_path / "dense" / name / "openvino_model.xml")
    (tmp_path / "dense" / "model_index.json").write_text("{}", encoding="utf-8")
    lazycompress.wrap(tmp_path / "dense", PLAN, tmp_path / "lazy")
    found = verify_wrapped(tmp_path / "lazy", tmp_path / "dense")
    assert [Path(c.directory).name for c in found] == ["transformer", "transformer_2"]
    assert all(c.ok for c in found)


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    dense = written(tmp_path / "dense", "openvino")
    lazycompress.wrap(dense, PLAN, tmp_path / "lazy")
    with pytest.raises(InputError, match="there is no file"):
        verify_wrapped(tmp_path / "lazy", tmp_path / "nowhere")
    with pytest.raises(ExportError, match="--dense FILE"):
        verify(tmp_path / "lazy")
    weights = tmp_path / "lazy" / "dense.bin"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(ExportError, match=r"dense\.bin"):
        verify_wrapped(tmp_path / "lazy", dense)
