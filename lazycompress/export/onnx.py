"""Stage 6, export to ONNX: `If` per branch, caches and clock as inputs `past_*` and outputs `present_*`.

ONNX has no state of its own, so the caller hands the outputs of one call to the next; `OnnxRunner` does. A new image is still
seen by the file itself, from the clock among the state: any state of the right batch size will do.

1. The traced program is converted; the decisions are dropped unless telemetry is asked for.
2. Notes that the converter leaves (source lines, folders of this machine) are removed.
3. Weights may be stored in half the size; a cast restores them when the file is loaded. Gates keep float32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ExportError, MissingExtraError
from ..graph.ops import FOUR_BITS
from .card import Weights
from .decompose import decompose
from .finite import narrowed
from .trace import DECISIONS, TracedModel, is_weight

try:
    import onnx
    import onnx_ir as ir
    import torch.onnx
    from onnx_ir.traversal import RecursiveGraphIterator

    from .onnx_int8 import to_integers
    from .onnx_simplify import simplify
    from .onnx_weights import restore_once
except ImportError as _error:  # pragma: no cover - exercised by the packaging tests
    raise MissingExtraError("onnx", "onnx", "export to ONNX") from _error

MODEL_FILE = "model.onnx"

#: See `runtimes.Runtime`.
STATEFUL, ROUNDING = False, 1e-4

#: Protobuf holds at most 2 GB; above this the weights go into a file beside the model.
LARGEST = 1_800_000_000

#: The first one that knows 4-bit integers.
OPSET = 21

_TYPES = {"f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_TORCH_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def write_traced(
    traced: TracedModel, folder: Path, *, stateful: bool, telemetry: bool, weights: Weights, stages: Sequence[str]
) -> Mapping[str, Any]:
    """See `runtimes.Runtime`."""
    model = convert(traced, telemetry=telemetry, weights=weights, eight_bits="quantize" in stages)
    write(model, folder)
    return versions(model)


def open_folder(folder: Path, card: Mapping[str, Any]) -> Any:
    """See `runtimes.Runtime`."""
    from .onnx_runner import OnnxRunner

    return OnnxRunner(folder, card=dict(card))


def convert(
    traced: TracedModel, telemetry: bool = False, weights: Weights = "f32", eight_bits: bool = False
) -> ir.Model:
    """Convert a traced lazy model.

    Args:
        traced: the program and its names, traced with one batch size for inputs and state.
        telemetry: keep the output `lazy_decisions`, float32 [branches, batch], 1 where a branch was reused.
        weights: how float32 weights are stored.
        eight_bits: the branches are quantized: their matmuls become integer ones.

    Raises:
        ExportError: the converter does not take the program.
    """
    try:
        # The exporter asks the program for the operations that it knows: that is the only way to say how they are found.
        vars(traced.program)["run_decompositions"] = partial(decompose, traced.program)
        with _quiet():
            program = torch.onnx.export(
                traced.program, (), input_names=traced.inputs, output_names=traced.outputs, dynamo=True, verbose=False,
                opset_version=OPSET, optimize=False,
            )  # fmt: skip
            assert program is not None
            model: ir.Model = program.model
            simplify(model, should_fold=lambda node: False if _restores(node) else None)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"ONNX does not take the lowered graph: {' '.join(lines)[-300:]}") from error
    if not telemetry:
        decisions = next(output for output in model.graph.outputs if output.name == DECISIONS)
        model.graph.outputs.remove(decisions)
    _without_notes(model)
    _store_4_bits(model)
    if eight_bits:
        to_integers(model)
    restore_once(model)
    if weights != "f32":
        _store_as(model, weights)
    return model


def write(model: ir.Model, directory: Path, largest: int = LARGEST) -> Path:
    """Save the model into `directory`, its weights beside it where one file cannot hold them; returns the path.

    Raises:
        ExportError: the file does not check.
    """
    path = directory / MODEL_FILE
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    try:
        ir.save(model, path, external_data=f"{MODEL_FILE}.data" if size > largest else None)
        onnx.checker.check_model(str(path))
    except OSError as error:
        raise ExportError(f"cannot write {path.name}: {error.strerror or error}") from error
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the written ONNX file does not check: {' '.join(str(error).split())[:300]}") from error
    return path


def versions(model: ir.Model) -> dict[str, Any]:
    """Opset and IR version."""
    return {"opset": model.opset_imports[""], "ir": model.ir_version}


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _restores(node: ir.Node) -> bool:
    """Whether a node makes a weight of integers in few bits: small ones would be stored in floating point again."""
    value = node.inputs[0] if node.op_type == "Cast" else None
    if value is None or value.dtype not in (ir.DataType.INT8, ir.DataType.UINT8) or value.shape is None:
        return False
    return len(value.shape) >= 2 and value.shape[-1] != 1


def _without_notes(model: ir.Model) -> None:
    """Rule 2."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                attribute.as_graph().metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _store_4_bits(model: ir.Model) -> None:
    """Constants of the graph that hold 4-bit integers, one in each byte: two in each byte of the file."""
    kinds = {ir.DataType.INT8: ir.DataType.INT4, ir.DataType.UINT8: ir.DataType.UINT4}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and FOUR_BITS in name and tensor.dtype in kinds:
            kind = kinds[tensor.dtype]
            value.const_value = ir.Tensor(tensor.numpy().astype(kind.numpy()), dtype=kind, name=name)
            value.type = ir.TensorType(kind)


def _store_as(model: ir.Model, weights: Weights) -> None:
    """Rule 3."""
    casts = []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or not is_weight(name, tensor.size):
            continue
        narrow = narrowed(torch.from_numpy(tensor.numpy().copy()), _TORCH_TYPES[weights], name)
        stored = ir.Value(
            name=f"{name}.{weights}",
            shape=value.shape,
            type=ir.TensorType(_TYPES[weights]),
            const_value=ir.Tensor(
                narrow.view(torch.uint16).numpy().view(_TYPES[weights].numpy()), dtype=_TYPES[weights]
            ),
        )
        del model.graph.initializers[name]
        model.graph.initializers.add(stored)
        cast = ir.Node(
            "", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT)], num_outputs=1, name=f"{name}.cast"
        )
        restored = cast.outputs[0]
        restored.shape, restored.type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        value.replace_all_uses_with(restored)
        restored.name = name
        casts.append(cast)
    model.graph.insert_before(model.graph[0], casts)
