"""Post-training quantization and weight compression of a lazy model: NNCF on the flat graph, then lowered again.

On the flat graph every branch is in sight, whichever steps compute it; inside the bodies of an exported model NNCF would
see nothing (ONNX, weight compression) or run the model once for each of them (OpenVINO). Calibration takes the model's
inputs and caches as they are in the sampler's own loop, at all timesteps.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from ..errors import ComposeError, MissingExtraError
from ..graph.insert import LazyGraph
from ..graph.ops import FOUR_BITS, is_heavy
from ..recipe import Quantize, Weights
from ..runtime import LazyModel
from ..sampling import Sampler
from .fixed import Fixed

_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_FAKE = torch.ops.aten.fake_quantize_per_tensor_affine.default


@dataclass(frozen=True)
class ComposeReport:
    """What a stage did: its name, matmuls of branches it changed and left alone, and seconds."""

    stage: str
    changed: int
    left: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.stage}: {self.changed} matmuls and convolutions of branches, {self.left} left, {self.seconds:.1f} s"
        )


def quantize(lazy: LazyModel, sampler: Sampler, options: Quantize, *, seed: int = 0) -> ComposeReport:
    """Quantize weights and activations of the branches to 8 bits, in place.

    Args:
        lazy: the model; quantized for every batch, and for the other sizes that its example has.
        sampler: as for training; its runs are the calibration set.
        options: NNCF's parameters.
        seed: of the calibration noise.

    Raises:
        ComposeError: NNCF cannot quantize this graph.
        MissingExtraError: NNCF is not installed.
    """
    nncf = need_nncf("post-training quantization")
    data = calibration(lazy, sampler, options.subset_size, seed)
    scope = nncf.IgnoredScope(
        names=list(options.ignored_scope.names), patterns=list(options.ignored_scope.patterns),
        types=list(options.ignored_scope.types), validate=False,
    )  # fmt: skip
    alpha = options.smooth_quant_alpha
    alphas = nncf.AdvancedSmoothQuantParameters(convolution=alpha, matmul=alpha)
    advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas)

    def run(module: fx.GraphModule, inside: list[str], outside: list[str]) -> fx.GraphModule:
        scope.names.extend(outside)
        result: fx.GraphModule = nncf.quantize(
            module, nncf.Dataset(data, lambda item: item), model_type=nncf.ModelType(options.model_type),
            preset=nncf.QuantizationPreset(options.preset), subset_size=len(data), ignored_scope=scope,
            fast_bias_correction=options.fast_bias_correction, advanced_parameters=advanced,
        )  # fmt: skip
        return result

    return _compose(lazy, "quantize", data[0], run)


def compress_weights(lazy: LazyModel, sampler: Sampler | None, options: Weights, *, seed: int = 0) -> ComposeReport:
    """Store weights in 8 or 4 bits, in place; arithmetic stays in floating point.

    4 bits are for the branches; all other layers (modulation, embeddings of time, projections) then have 8, since they act on
    every token at once and are a third of a DiT's weights.

    Args and errors as for `quantize`; without data-aware options no sampler is needed.
    """
    nncf = need_nncf("weight compression")
    aware = options.awq or options.scale_estimation
    data = calibration(lazy, sampler, options.subset_size, seed) if aware and sampler is not None else None
    own = {key: value for key in ("ratio", "group_size", "all_layers", "awq", "scale_estimation")
           if (value := getattr(options, key)) is not None}  # fmt: skip
    if data is not None:
        own |= {"dataset": nncf.Dataset(data, lambda item: item), "subset_size": len(data)}

    def run(module: fx.GraphModule, inside: list[str], outside: list[str]) -> fx.GraphModule:
        mode = nncf.CompressWeightsMode(options.mode)
        if options.mode.startswith("int4"):
            others = nncf.IgnoredScope(names=inside, validate=False)
            module = nncf.compress_weights(module, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=others)
            own["ignored_scope"] = nncf.IgnoredScope(names=outside, validate=False)
        result: fx.GraphModule = nncf.compress_weights(module, mode=mode, **own)
        return result

    example = data[0] if data is not None else calibration_of_example(lazy)
    return _compose(lazy, "weights", example, run)


def _compose(
    lazy: LazyModel,
    stage: str,
    example: Sequence[Tensor],
    run: Callable[[fx.GraphModule, list[str], list[str]], fx.GraphModule],
) -> ComposeReport:
    started = time.perf_counter()
    flat = lazy.program(lazy.example).flat
    inside = {node.name for branch in flat.branches for node in branch.nodes}
    heavy = [node.name for node in flat.graph_module.graph.nodes if is_heavy(node)]
    fixed = Fixed(flat, example)
    level = logging.getLogger("nncf").level
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        module = run(fixed.module, [n for n in heavy if n in inside], [n for n in heavy if n not in inside])
    except Exception as error:
        raise ComposeError(
            f"{stage}: NNCF stopped: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        logging.getLogger("nncf").setLevel(level)
    result = fixed.back(inline(module))
    lazy.replace_flat(result, stage)
    changed = sum(1 for name in heavy if name in inside and _is_changed(result, name))
    return ComposeReport(
        stage, changed, len([n for n in heavy if n in inside]) - changed, time.perf_counter() - started
    )


def straight_through(flat: LazyGraph) -> LazyGraph:
    """The same graph with a gradient: rounding passes it on unchanged within its range (straight-through estimator).

    Gates are learned on a quantized model this way: the forward pass is the quantized one.
    """
    module = copy.deepcopy(flat.graph_module)
    module.lazy_gates = flat.graph_module.lazy_gates
    for node in module.graph.nodes:
        source = node.args[0] if node.target is _DEQUANTIZE and node.args else None
        if isinstance(source, fx.Node) and source.target is _QUANTIZE:
            value, scale, zero, low, high = source.args[:5]
            with module.graph.inserting_before(node):
                passing = module.graph.call_function(_FAKE, (value, scale, zero, low, high))
            passing.meta = dict(node.meta)
            node.replace_all_uses_with(passing)
    module.graph.eliminate_dead_code()
    module.recompile()
    return replace(flat, graph_module=module)


def inline(module: fx.GraphModule) -> fx.GraphModule:
    """Modules that NNCF calls (scales of SmoothQuant, decompressors) as operations of the graph itself.

    4-bit weights that it packs in pairs are taken apart: runtimes pack them in ways of their own. Each then is an integer
    constant whose name ends in `FOUR_BITS`.
    """
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    for node in calls:
        inner = module.get_submodule(str(node.target))
        traced = fx.symbolic_trace(inner)
        mapped: dict[fx.Node, Any] = {}
        inputs = iter(node.args)
        known: dict[fx.Node, Tensor] = {}  # integers that depend on constants alone
        with module.graph.inserting_before(node):
            for part in traced.graph.nodes:
                if part.op == "placeholder":
                    mapped[part] = next(inputs)
                    value = _constant(module, mapped[part])
                elif part.op == "get_attr":
                    value = _constant(traced, part)
                elif part.op == "output":
                    node.replace_all_uses_with(mapped[part.args[0]])
                    continue
                else:
                    value = _folded(part, known)
                    if value is None:
                        for used in part.all_input_nodes:
                            if used not in mapped:
                                mapped[used] = _stored(module, f"{node.target}_{used.name}", known[used])
                        mapped[part] = module.graph.node_copy(part, mapped.__getitem__)
                if value is not None and not value.is_floating_point():
                    known[part] = value
                elif part.op == "get_attr" and value is not None:
                    mapped[part] = _stored(module, f"{node.target}_{part.target}", value)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    return module


def _folded(part: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor | None:
    """The integers that a node gives, if it works on known ones alone."""
    if not part.all_input_nodes or any(used not in known for used in part.all_input_nodes):
        return None
    args, kwargs = fx.map_arg((part.args, part.kwargs), known.__getitem__)
    if part.op == "call_method":
        value = getattr(args[0], str(part.target))(*args[1:], **kwargs)
    else:
        value = part.target(*args, **kwargs)  # type: ignore[operator]
    return value if isinstance(value, Tensor) and not value.is_floating_point() else None


def _stored(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    low, high = (-8, 7) if value.dtype is torch.int8 else (0, 15)
    four = not value.is_floating_point() and value.numel() > 1 and low <= int(value.min()) <= int(value.max()) <= high
    name = name.replace(".", "_") + (FOUR_BITS if four else "")
    module.register_buffer(name, value.detach().contiguous())
    return module.graph.get_attr(name)


def _constant(module: Any, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    for step in str(node.target).split("."):
        module = getattr(module, step)
    return module if isinstance(module, Tensor) else None


def calibration(lazy: LazyModel, sampler: Sampler, count: int, seed: int) -> list[tuple[Tensor, ...]]:
    """Inputs and caches of `count` calls of the flat graph, spread over whole sampling runs, in the order of its inputs."""
    found: list[tuple[Tensor, ...]] = []
    program = lazy.program(lazy.example)
    generator = torch.get_rng_state()
    hook = program.lowered.graph_module.register_forward_pre_hook(
        lambda module, args: found.append(tuple(value.detach().clone() for value in args))
    )
    lazy.reset()
    torch.manual_seed(seed + 555)
    try:
        with torch.no_grad():
            _ = sampler(lazy)
    finally:
        hook.remove()
        torch.set_rng_state(generator)
        lazy.reset()
    if not found:
        raise ComposeError("calibration: the sampler calls the model with other sizes than its example")
    picked = torch.linspace(0, len(found) - 1, min(count, len(found))).round().int().tolist()
    return [found[k] for k in picked]


def calibration_of_example(lazy: LazyModel) -> tuple[Tensor, ...]:
    """The inputs of the model's own example, with empty caches."""
    flat, call = lazy.program(lazy.example).flat, lazy.example
    state = [spec.fresh(call.batch, call.tensors[call.latents].device) for spec in flat.state]
    return (*call.tensors, torch.tensor(float(lazy.gates.threshold)), *state)


def _is_changed(flat: LazyGraph, name: str) -> bool:
    """Whether a matmul reads a value that was stored in fewer bits."""
    nodes = {node.name: node for node in flat.graph_module.graph.nodes}
    stack, seen = list(nodes[name].all_input_nodes) if name in nodes else [], 0
    while stack and seen < 40:
        node, seen = stack.pop(), seen + 1
        if "dequantize" in str(node.target) or _stored_narrow(flat, node):
            return True
        if node.op == "get_attr" or not is_heavy(node):
            stack.extend(n for n in node.all_input_nodes if _is_constant(n))
    return False


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "call_function" and all(_is_constant(n) for n in node.all_input_nodes)
                                     and bool(node.all_input_nodes))  # fmt: skip


def _stored_narrow(flat: LazyGraph, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    value: Any = flat.graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.dtype in (torch.int8, torch.uint8)


def need_nncf(purpose: str) -> Any:
    """NNCF itself.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import nncf
    except ImportError:
        raise MissingExtraError("nncf", "openvino", purpose) from None
    return nncf
