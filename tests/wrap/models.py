"""Small denoisers as files, made by hand: the same arithmetic in OpenVINO and ONNX, and runners that call them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
from onnx import helper
from openvino import opset13 as ops

CHANNELS, WIDTH = 4, 8

Arrays = dict[str, np.ndarray[Any, Any]]
Denoiser = Callable[..., np.ndarray[Any, Any]]


def openvino_model(
    batch: int = -1, size: int = -1, tokens: int = -1, channels: int = CHANNELS, per_token: bool = False,
    video: bool = False,
) -> ov.Model:  # fmt: skip
    """sin(2 latents + timestep / 100) + mean of the prompt, in `channels` channels: the first ones again, if they are more.

    Where each token has a timestep, that of the last one counts. A video has one dimension more.
    """
    sizes, column = [size] * (3 if video else 2), np.array([-1, 1, 1, 1, 1] if video else [-1, 1, 1, 1])
    latents = _parameter("hidden_states", [batch, CHANNELS, *sizes])
    timestep = _parameter("timestep", [batch, -1] if per_token else [batch])
    prompt = _parameter("encoder_hidden_states", [batch, tokens, WIDTH])
    moment = ops.gather(timestep, ops.constant(np.int64(-1)), ops.constant(np.int64(1))) if per_token else timestep
    time = ops.reshape(ops.multiply(moment, np.float32(0.01)), column, False)
    mean = ops.reshape(ops.reduce_mean(prompt, np.array([1, 2])), column, False)
    value = ops.add(ops.sin(ops.add(ops.multiply(latents, np.float32(2)), time)), mean)
    if channels != CHANNELS:
        value = ops.gather(value, ops.constant(np.arange(channels) % CHANNELS), ops.constant(np.int64(1)))
    value.output(0).get_tensor().set_names({"out_sample"})
    model = ov.Model([ops.result(value, name="out_sample")], [latents, timestep, prompt], "toy")
    model.set_rt_info("kept", ["a", "note"])
    return model


def _parameter(name: str, shape: list[int]) -> Any:
    made = ops.parameter(ov.PartialShape(shape), np.float32, name=name)
    made.output(0).get_tensor().set_names({name})
    return made


def onnx_model(
    batch: int | str = "batch", size: int | str = "size", tokens: int | str = "tokens", opset: int = 17,
    per_token: bool = False, video: bool = False,
) -> Any:  # fmt: skip
    """The same for ONNX, of four channels; the prompt's sum over `WIDTH * tokens` in place of its mean."""
    kind, sizes = onnx.TensorProto.FLOAT, [size] * (3 if video else 2)
    arrays = {"two": np.float32([2]), "hundredth": np.float32([0.01]), "column": np.array([-1, 1, *[1] * len(sizes)]),
              "rows": np.array([0, -1]), "one": np.array([1]), "last": np.array(-1), "scale": np.float32([0.05])}  # fmt: skip
    nodes = [
        helper.make_node("Mul", ["hidden_states", "two"], ["twice"]),
        helper.make_node("Gather", ["timestep", "last"], ["moment"], axis=1),
        helper.make_node("Mul", ["moment", "hundredth"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "column"], ["time"]),
        helper.make_node("Add", ["twice", "time"], ["phase"]),
        helper.make_node("Sin", ["phase"], ["wave"]),
        helper.make_node("Reshape", ["encoder_hidden_states", "rows"], ["flat"]),
        helper.make_node("ReduceSum", ["flat", "one"], ["sum"]),
        helper.make_node("Mul", ["sum", "scale"], ["small"]),
        helper.make_node("Reshape", ["small", "column"], ["shift"]),
        helper.make_node("Add", ["wave", "shift"], ["out_sample"]),
    ]
    if not per_token:
        nodes[1] = helper.make_node("Identity", ["timestep"], ["moment"])
    info = helper.make_tensor_value_info
    inputs = [
        info("hidden_states", kind, [batch, CHANNELS, *sizes]),
        info("timestep", kind, [batch, "timesteps"] if per_token else [batch]),
        info("encoder_hidden_states", kind, [batch, tokens, WIDTH]),
    ]
    outputs = [info("out_sample", kind, [batch, CHANNELS, *sizes])]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(model, {"kept": "a note"})
    return model


class OpenVINO:
    """Calls an OpenVINO model; what it keeps, it keeps."""

    def __init__(self, model: Any, precision: str = "f32") -> None:
        compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        self.request = compiled.create_infer_request()

    def __call__(self, **inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = next(iter(self.request.infer(inputs).values())).copy()
        return found


class Onnx:
    """Calls an ONNX model and hands `present_*` outputs to the next call."""

    def __init__(self, model: Any, level: Any = ort.GraphOptimizationLevel.ORT_ENABLE_ALL) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = level
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.past: Arrays = {}

    def __call__(self, **inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found = self.session.run(None, inputs | self.past)
        named = dict(zip([output.name for output in self.session.get_outputs()], found, strict=True))
        self.past = {n.replace("present_", "past_"): v for n, v in named.items() if n.startswith("present_")}
        return found[0]
