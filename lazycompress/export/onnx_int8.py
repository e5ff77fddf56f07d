"""Stage 6 for quantized models: 8-bit arithmetic in an ONNX file, inside the bodies of its `If` nodes too.

ONNX Runtime fuses quantize-dequantize pairs in the main graph only: a file that holds them inside of `If` runs in floating point,
with rounding on top. Its dynamic quantization (weights per channel when the file is written, activations per tensor at run
time) does reach the bodies. All that is outside of a branch stays in floating point, as in every other format.
"""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from ..errors import ExportError
from .onnx import LARGEST

#: What is computed in 8 bits.
MATMULS = ("MatMul", "Gemm")


def quantize(path: Path) -> None:
    """Quantize the branches of an ONNX file in place.

    Raises:
        ExportError: ONNX Runtime does not quantize this file.
    """
    outside = [node.name for node in onnx.load(path, load_external_data=False).graph.node if node.op_type != "If"]
    size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
    beside = path.with_name(f"quantized.{path.name}")
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends shape inference, which the converter has done
    try:
        quantize_dynamic(
            path, beside, op_types_to_quantize=list(MATMULS), per_channel=True, weight_type=QuantType.QInt8,
            nodes_to_exclude=outside, use_external_data_format=size / 4 > LARGEST,
            extra_options={"EnableSubgraph": True, "MatMulConstBOnly": True},
        )  # fmt: skip
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not quantize the file: {' '.join(str(error).split())[:300]}") from error
    finally:
        logger.setLevel(level)
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()
    beside.rename(path)
    data = beside.with_name(f"{beside.name}.data")
    if data.is_file():
        model = onnx.load(path, load_external_data=False)
        _point(model, data.name, f"{path.name}.data")
        onnx.save(model, path)
        data.rename(path.with_name(f"{path.name}.data"))


def _point(model: onnx.ModelProto, old: str, new: str) -> None:
    """Point a model's external weights to a file of another name."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == old:
                entry.value = new
