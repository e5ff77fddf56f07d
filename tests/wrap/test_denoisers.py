"""Transformers of diffusers as files, made without a pipeline: IRs as `ov.convert_model` gives them, ONNX by `torch.onnx`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
import torch
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.torch import save_file
from torch import nn

import lazycompress
from lazycompress.plan.plan import Plan, dense, even
from lazycompress.wrap.verify import verify_wrapped

from ..pipelines import make_dit, make_sd3, make_wan
from .models import Arrays, Onnx, OpenVINO

TIMES = tuple(980.0 - 98 * k for k in range(10))
PLAN = even(TIMES, 0.5, 1)


class _Dit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_dit().transformer

    def forward(self, hidden_states: Any, timestep: Any, class_labels: Any) -> Any:
        return self.model(hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False)[0]


class _Wan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_wan().transformer

    def forward(self, hidden_states: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return self.model(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]


class _Sd3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_sd3().transformer

    def forward(self, hidden_states: Any, timestep: Any, encoder_hidden_states: Any, pooled_projections: Any) -> Any:
        return self.model(
            hidden_states, encoder_hidden_states, pooled_projections, timestep=timestep, return_dict=False
        )[0]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A transformer: how it is made, the sizes of its latents and of its conditions, and which numbers are whole ones."""

    make: Callable[[], nn.Module]
    latents: tuple[int, ...]
    conditions: dict[str, tuple[int, ...]]
    whole: tuple[str, ...] = ()

    def condition(self, prompt: int, batch: int) -> Arrays:
        random = np.random.default_rng(prompt)
        found = {}
        for name, sizes in self.conditions.items():
            value = (
                random.integers(10, size=(batch, *sizes)) if name in self.whole else random.normal(size=(batch, *sizes))
            )
            found[name] = value.astype(np.int64 if name in self.whole else np.float32)
        return found

    def inputs(self, latents: Any, moment: float, conditions: Arrays) -> Arrays:
        kind = np.int64 if "timestep" in self.whole else np.float32
        return {"hidden_states": latents, "timestep": np.full(len(latents), moment, kind), **conditions}

    def example(self) -> dict[str, torch.Tensor]:
        latents = np.random.default_rng(0).normal(size=(2, *self.latents)).astype(np.float32)
        return {k: torch.from_numpy(v) for k, v in self.inputs(latents, 500.0, self.condition(0, 2)).items()}


KINDS = {
    "dit": Kind(_Dit, (4, 8, 8), {"class_labels": ()}, ("class_labels", "timestep")),
    "wan": Kind(_Wan, (16, 2, 4, 4), {"encoder_hidden_states": (6, 32)}),
    "sd3": Kind(_Sd3, (8, 8, 8), {"encoder_hidden_states": (6, 64), "pooled_projections": (64,)}),
}


@cache
def ir(name: str) -> ov.Model:
    return ov.convert_model(KINDS[name].make().eval(), example_input=KINDS[name].example())


def compressed(name: str, weights: str) -> ov.Model:
    nncf = pytest.importorskip("nncf")
    modes = nncf.CompressWeightsMode
    options: dict[str, Any] = {"mode": modes.INT8_ASYM}
    if weights == "int4":
        options = {"mode": modes.INT4_SYM, "group_size": 8, "all_layers": True}
    return nncf.compress_weights(copy.deepcopy(ir(name)), **options)


class Files:
    """A wrapped file beside its dense one, on several images."""

    def __init__(self, kind: Kind, lazy: Any, full: Any) -> None:
        self.kind, self.lazy, self.full = kind, lazy, full

    def sample(self, seed: int, prompt: int, batch: int = 2, calls: int = len(TIMES)) -> tuple[Any, list[bool]]:
        """The latents in the end, and which calls gave bit for bit what the dense file gives."""
        conditions = self.kind.condition(prompt, batch)
        latents = np.random.default_rng(seed).normal(size=(batch, *self.kind.latents)).astype(np.float32)
        computed = []
        for moment in TIMES[:calls]:
            inputs = self.kind.inputs(latents, moment, conditions)
            output = self.lazy(**inputs)
            computed.append(np.array_equal(output, self.full(**inputs)))
            latents = latents - np.float32(0.05) * output[:, : latents.shape[1]]
        return latents, computed

    def check(self, plan: Plan) -> None:
        """Two images, one that is stopped, and other batches, each of which is as if it were alone."""
        planned = list(plan.computes)
        first, computed = self.sample(1, prompt=1)
        assert computed == planned
        assert self.sample(2, prompt=2)[1] == planned
        self.sample(3, prompt=1, calls=4)
        again, computed = self.sample(1, prompt=1)
        assert computed == planned
        np.testing.assert_array_equal(again, first)
        for batch in (1, 2):
            assert self.sample(4, prompt=1, batch=batch)[1] == planned


def check(kind: Kind, wrap: Callable[[Plan, str], Path], runner: Callable[[Any], Any], full: Any) -> None:
    for word, plan in (("all", dense(TIMES)), ("half", PLAN)):
        began = time.process_time()
        path = wrap(plan, word)
        seconds = time.process_time() - began
        print(f"wrapped in {seconds:.2f} s")
        assert seconds < 10
        Files(kind, runner(path), full).check(plan)


@pytest.mark.parametrize(
    "weights", ["f32", *(pytest.param(w, marks=pytest.mark.slow(seconds=10)) for w in ("int8", "int4"))]
)
@pytest.mark.parametrize("name", ["dit", pytest.param("wan", marks=pytest.mark.slow(seconds=10))])
def test_a_transformer_as_an_ir(name: str, weights: str, tmp_path: Path) -> None:
    """As the converter gives it: with numbers among the names of the timestep, and without a name of the output."""
    model = ir(name) if weights == "f32" else compressed(name, weights)

    def wrap(plan: Plan, word: str) -> Path:
        return lazycompress.wrap(model, plan, tmp_path / word) / "openvino_model.xml"

    check(KINDS[name], wrap, OpenVINO, OpenVINO(model))


@pytest.mark.parametrize(
    "name", ["dit", *(pytest.param(n, marks=pytest.mark.slow(seconds=15)) for n in ("wan", "sd3"))]
)
def test_a_transformer_by_torch_onnx(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    batch = torch.export.Dim("batch", min=1, max=64)
    example = kind.example()
    torch.onnx.export(
        kind.make().eval(), (), tmp_path / "model.onnx", kwargs=example, dynamo=True, verbose=False,
        dynamic_shapes={key: {0: batch} for key in example}, output_names=["out_sample"],
    )  # fmt: skip

    def wrap(plan: Plan, word: str) -> Path:
        return lazycompress.wrap(tmp_path / "model.onnx", plan, tmp_path / word) / "model.onnx"

    def run(path: Path) -> Any:
        # One level below the default: there the dense file's convolutions get a layout that those in a body do not.
        return Onnx(str(path), ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)

    check(kind, wrap, run, run(tmp_path / "model.onnx"))
    for found in verify_wrapped(tmp_path / "half", tmp_path / "model.onnx", inputs=_stored(example, tmp_path)):
        assert found.ok  # as it is loaded by default
    onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half" / "model.onnx"), True, True, True)
    quant_pre_process(tmp_path / "half" / "model.onnx", tmp_path / "prepared.onnx")
    Onnx(str(tmp_path / "prepared.onnx"))


def _stored(example: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(example, folder / "call.safetensors")
    return folder / "call.safetensors"
