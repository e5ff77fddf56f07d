"""Wrapped ONNX files under ONNX Runtime's own ways to run and to prepare files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization.shape_inference import quant_pre_process

import lazycompress
from lazycompress.plan.plan import even

from .models import Arrays, Onnx, onnx_model
from .test_semantics import TIMES, Compared, Image, prompt
from .test_servers import is_forecast

PLAN = even(TIMES, 0.4, 2)


def wrapped(folder: Path, static: bool = False) -> Path:
    onnx.save(onnx_model(2, 6, 3) if static else onnx_model(), folder / "model.onnx")
    return lazycompress.wrap(folder / "model.onnx", PLAN, folder / "lazy") / "model.onnx"


def follows_the_plan(lazy: Any) -> None:
    """Two images and one that is left, against the dense file."""
    both = Compared((lazy, Onnx(onnx_model().SerializeToString())), PLAN)
    assert both.run(Image(1, prompt(1))) == list(PLAN.computes)
    both.run(Image(2, prompt(1)), calls=5)
    assert both.run(Image(3, prompt(1))) == list(PLAN.computes)


class InPlace:
    """Binds each `present_*` to the very buffer of its `past_*`: nothing is copied from call to call."""

    def __init__(self, path: Path, options: ort.SessionOptions) -> None:
        options.log_severity_level = 4
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        sized = Onnx(str(path))
        sized(**Image(0, prompt(0)).inputs())
        self.state = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros_like(v)) for name, v in sized.past.items()}

    def __call__(self, **inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("out_sample")
        for name, buffer in self.state.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_", "present_"), buffer)
        self.session.run_with_iobinding(binding)
        found: np.ndarray[Any, Any] = binding.get_outputs()[0].numpy().copy()
        return found


@pytest.mark.parametrize("order", ["DEFAULT", "PRIORITY_BASED", "parallel"])
@pytest.mark.parametrize("static", [False, True])
def test_a_state_bound_in_place(static: bool, order: str, tmp_path: Path) -> None:
    """All that reads a past is done before its present is written, in whatever order the runtime chooses."""
    options = ort.SessionOptions()
    if order == "parallel":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        options.inter_op_num_threads = 2
    else:
        options.execution_order = getattr(ort.ExecutionOrder, order)
    follows_the_plan(InPlace(wrapped(tmp_path, static), options))


def test_a_state_in_place_is_of_one_size(tmp_path: Path) -> None:
    """Another batch, or size, is refused by the runtime, and harms no image."""
    lazy = InPlace(wrapped(tmp_path), ort.SessionOptions())
    dense = Onnx(onnx_model().SerializeToString())
    image = Image(1, prompt(1))
    own: list[tuple[float, Any]] = []
    for k, time in enumerate(TIMES):
        if k in (4, 9):
            other: Arrays = Image(2, prompt(1, batch=1)).inputs() if k == 4 else Image(2, prompt(1), size=8).inputs()
            with pytest.raises(RuntimeError, match=r"provided for output 'present_\w+' .* has shape"):
                lazy(**other)
        output, full = lazy(**image.inputs()), dense(**image.inputs())
        if np.array_equal(output, full):
            own.insert(0, (time, output))
        else:
            assert any(is_forecast(output, own[: 1 + j], time) for j in range(PLAN.order + 1))
        image.step(output)
    assert len(own) <= PLAN.share * len(TIMES) + 2
    follows_the_plan(lazy)


def test_the_format_of_onnx_runtime_for_devices(tmp_path: Path) -> None:
    path = wrapped(tmp_path)
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("model.ort", "model.with_runtime_opt.ort"):
        follows_the_plan(Onnx(str(path.with_name(name))))


@pytest.mark.parametrize("static", [False, True])
def test_sizes_are_inferred_strictly(static: bool, tmp_path: Path) -> None:
    model = onnx.load(wrapped(tmp_path, static))
    found = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.save(found, tmp_path / "inferred.onnx")
    follows_the_plan(Onnx(str(tmp_path / "inferred.onnx")))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("options", [{}, {"auto_merge": True}, {"skip_symbolic_shape": True}])
def test_preparation_for_quantization(options: dict[str, bool], static: bool, tmp_path: Path) -> None:
    """Symbolic shape inference among it, which takes the sizes of a default for those of its input."""
    quant_pre_process(wrapped(tmp_path, static), tmp_path / "prepared.onnx", **options)
    lazy = Onnx(str(tmp_path / "prepared.onnx"))
    follows_the_plan(lazy)
    if not static:
        lazy(**Image(4, prompt(1, batch=3, tokens=5), size=8).inputs())


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("opset", [13, 18, 23])
def test_preparation_of_other_opsets(opset: int, per_token: bool, tmp_path: Path) -> None:
    onnx.save(onnx_model(opset=opset, per_token=per_token), tmp_path / "model.onnx")
    path = lazycompress.wrap(tmp_path / "model.onnx", PLAN, tmp_path / "lazy") / "model.onnx"
    quant_pre_process(path, tmp_path / "prepared.onnx")
    Onnx(str(tmp_path / "prepared.onnx"))
