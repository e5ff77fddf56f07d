"""Post-training quantization and weight compression of a lazy model: NNCF on the flat graph, then lowered again.

On the flat graph every branch is in sight, whichever steps compute it; inside the bodies of an exported model NNCF would
see nothing (ONNX, weight compression) or run the model once for each of them (OpenVINO). Calibration takes the model's
inputs and caches as they are in the sampler's own loop, at all timesteps.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ComposeError, MissingExtraError
from ..graph.insert import LazyGraph
from ..recipe import Quantize, Weights
from ..runtime import LazyModel
from ..sampling import Sampler
from .fixed import Fixed
from .guard import HeldOut, counts, worst_first
from .inline import DEQUANTIZE, QUANTIZE, inline, round_last
from .scope import has_weight, is_constant, label, left_out

_FAKE = torch.ops.aten.fake_quantize_per_tensor_affine.default


@dataclass(frozen=True)
class ComposeReport:
    """What a stage did.

    Attributes:
        stage: its name.
        changed: matmuls and convolutions with a weight, in branches, that it changed.
        left: those that it left alone.
        seconds: wall time.
        error: mean squared error of held-out final latents to the model before; None where the recipe sets no limit.
        spared: layers that were left out because they hurt most.
    """

    stage: str
    changed: int
    left: int
    seconds: float
    error: float | None = None
    spared: tuple[str, ...] = ()

    def __str__(self) -> str:
        error = "" if self.error is None else f", error of held-out latents {self.error:.1e}"
        spared = f", left out as they hurt most: {', '.join(self.spared)}" if self.spared else ""
        return f"{self.stage}: {self.changed} layers of branches, {self.left} left, {self.seconds:.1f} s{error}{spared}"


@dataclass(frozen=True)
class _Layers:
    """Names of the layers that have weights: in branches, elsewhere, and those of both that are to be left out."""

    inside: list[str]
    outside: list[str]
    spared: list[str]


_Run = Callable[[fx.GraphModule, _Layers], fx.GraphModule]


def quantize(lazy: LazyModel, sampler: Sampler, options: Quantize, *, seed: int = 0) -> ComposeReport:
    """Quantize weights and activations of the branches to 8 bits, in place; all other layers store their weights in 8 bits.

    Queries and keys are quantized too: OpenVINO multiplies them in 8 bits, ONNX Runtime in floating point. Layers outside of
    the branches (modulation, embeddings) act on every token at once: their activations stay as they are. Reading their weights,
    a third of a DiT's, is what they cost. Under a limit the error decides which of all layers stay as they were.

    Args:
        lazy: the model; quantized for every batch, and for the other sizes that its example has.
        sampler: as for training; its runs are the calibration set.
        options: NNCF's parameters, and how large the error may be.
        seed: of the calibration noise.

    Raises:
        ComposeError: NNCF cannot quantize this graph, the error is above the limit, or a stage was there before.
        RecipeError: the ignored scope names something that is not there.
        MissingExtraError: NNCF is not installed.
    """
    started = time.perf_counter()
    nncf = need_nncf("post-training quantization")
    graph = _untouched(lazy, "quantize").graph_module.graph
    ignored = left_out(graph, options.ignored_scope, "quantize")
    data = calibration(lazy, sampler, options.subset_size, seed)
    alpha = options.smooth_quant_alpha
    alphas = nncf.AdvancedSmoothQuantParameters(convolution=alpha, matmul=alpha)
    advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas)
    types = list(options.ignored_scope.types)

    def run(module: fx.GraphModule, layers: _Layers) -> fx.GraphModule:
        scope = nncf.IgnoredScope(
            names=list(dict.fromkeys([*layers.outside, *layers.spared, *ignored])), types=types, validate=False
        )
        result: fx.GraphModule = nncf.quantize(
            module, nncf.Dataset(data, lambda item: item), model_type=nncf.ModelType(options.model_type),
            preset=nncf.QuantizationPreset(options.preset), subset_size=len(data), ignored_scope=scope,
            fast_bias_correction=options.fast_bias_correction, advanced_parameters=advanced,
        )  # fmt: skip
        return _weights_in_8_bits(result, [*layers.inside, *layers.spared, *ignored], types)

    return _compose(lazy, "quantize", data, run, options, sampler, seed, started)


def compress_weights(lazy: LazyModel, sampler: Sampler | None, options: Weights, *, seed: int = 0) -> ComposeReport:
    """Store weights in 8 or 4 bits, in place; arithmetic stays in floating point.

    4 bits are for the branches; all other layers (modulation, embeddings of time, projections) then have 8, since they act on
    every token at once and are a third of a DiT's weights. Where layers are spared, those of branches have 8 bits too, others
    stay as they were.

    Args and errors as for `quantize`; without data-aware options and a limit no sampler is needed.
    """
    started = time.perf_counter()
    nncf = need_nncf("weight compression")
    graph = _untouched(lazy, "weights").graph_module.graph
    ignored = left_out(graph, options.ignored_scope, "weights")
    aware = options.awq or options.scale_estimation
    limited = options.max_error is not None
    if (aware or limited) and sampler is not None:
        data = calibration(lazy, sampler, options.subset_size, seed)
    else:
        data = [calibration_of_example(lazy)]
    own = {key: value for key in ("ratio", "group_size", "all_layers", "awq", "scale_estimation")
           if (value := getattr(options, key)) is not None}  # fmt: skip
    if aware:
        own |= {"dataset": nncf.Dataset(data, lambda item: item), "subset_size": len(data)}
    four = options.mode.startswith("int4")
    if four:  # groups that do not divide a layer's width become smaller there
        adjust = nncf.GroupSizeFallbackMode.ADJUST
        own["advanced_parameters"] = nncf.AdvancedCompressionParameters(group_size_fallback_mode=adjust)

    def run(module: fx.GraphModule, layers: _Layers) -> fx.GraphModule:
        scope = list(dict.fromkeys([*layers.spared, *ignored]))
        if four:
            chosen = set(layers.inside) - set(layers.spared)
            module = _weights_in_8_bits(module, [*chosen, *(set(layers.outside) & set(layers.spared)), *ignored])
            scope += layers.outside
        result: fx.GraphModule = nncf.compress_weights(
            module, mode=nncf.CompressWeightsMode(options.mode),
            ignored_scope=nncf.IgnoredScope(names=scope, types=list(options.ignored_scope.types), validate=False), **own,
        )  # fmt: skip
        return result

    return _compose(lazy, "weights", data, run, options, sampler, seed, started)


def _weights_in_8_bits(module: fx.GraphModule, but: Sequence[str], types: Sequence[str] = ()) -> fx.GraphModule:
    """Store weights in 8 bits, `but` those of the layers that are named and of some types of them."""
    nncf = need_nncf("weight compression")
    others = nncf.IgnoredScope(names=list(but), types=list(types), validate=False)
    result: fx.GraphModule = nncf.compress_weights(
        module, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=others
    )
    return result


def _untouched(lazy: LazyModel, stage: str) -> LazyGraph:
    """The model's flat graph.

    Raises:
        ComposeError: it went through such a stage before.
    """
    if lazy.stages:
        raise ComposeError(
            f"{stage}: the model went through {', '.join(lazy.stages)} already, and weights are made smaller once: make the "
            "dense model lazy again, with one of the sections quantize and weights"
        )
    return lazy.program(lazy.example).flat


def _compose(
    lazy: LazyModel,
    stage: str,
    data: Sequence[Sequence[Tensor]],
    run: _Run,
    options: Quantize | Weights,
    sampler: Sampler | None,
    seed: int,
    started: float,
) -> ComposeReport:
    flat = lazy.program(lazy.example).flat
    in_branches = {node.name for branch in flat.branches for node in branch.nodes}
    heavy = {node.name: node for node in flat.graph_module.graph.nodes if has_weight(node)}
    inside = [name for name in heavy if name in in_branches]
    outside = [name for name in heavy if name not in in_branches]

    def attempt(spared: list[str]) -> LazyGraph:
        fixed = Fixed(flat, data[0])
        with _quiet():
            try:
                module = run(fixed.module, _Layers(inside, outside, spared))
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                raise ComposeError(f"{stage}: NNCF stopped: {type(error).__name__}: {text}") from error
        module = inline(module)
        round_last(module)
        return fixed.back(module)

    result = attempt([])
    error: float | None = None
    spared: list[str] = []
    if options.max_error is not None and sampler is not None:
        held_out = HeldOut.of(lazy, sampler, seed)
        error = held_out.error(result)
        if error > options.max_error and options.on_error == "stop":
            raise ComposeError(
                f"{stage}.max_error: the mean squared error of held-out final latents to the model before is {error:.2e}, "
                f"allowed are {options.max_error:.2e}; set {stage}.on_error: fall_back to leave out the layers that hurt "
                "most, or allow more"
            )
        changed = [name for name in heavy if _is_changed(result, name)]
        order = worst_first(flat, result, data, changed) if error > options.max_error else []
        for count in counts(len(order)) if order else []:
            spared = order[:count]
            result = attempt(spared)
            error = held_out.error(result)
            if error <= options.max_error:
                break
        if error > options.max_error:
            raise ComposeError(
                f"{stage}.max_error: with the {len(spared)} of {len(changed)} layers left out that hurt most, the mean "
                f"squared error of held-out final latents still is {error:.2e}, allowed are {options.max_error:.2e}; allow "
                f"more, or leave the section {stage} out"
            )
    changed_now = sum(_is_changed(result, name) for name in inside)
    lazy.replace_flat(result, stage)
    return ComposeReport(
        stage, changed_now, len(inside) - changed_now, time.perf_counter() - started, error,
        tuple(label(heavy[name]) for name in spared),
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def straight_through(flat: LazyGraph) -> LazyGraph:
    """The same graph with a gradient: rounding passes it on unchanged within its range (straight-through estimator).

    Gates are learned on a quantized model this way: the forward pass is the quantized one.
    """
    module = copy.deepcopy(flat.graph_module)
    module.lazy_gates = flat.graph_module.lazy_gates
    for node in module.graph.nodes:
        source = node.args[0] if node.target is DEQUANTIZE and node.args else None
        if isinstance(source, fx.Node) and source.target is QUANTIZE:
            value, scale, zero, low, high = source.args[:5]
            with module.graph.inserting_before(node):
                passing = module.graph.call_function(_FAKE, (value, scale, zero, low, high))
            passing.meta = dict(node.meta)
            node.replace_all_uses_with(passing)
    module.graph.eliminate_dead_code()
    module.recompile()
    return replace(flat, graph_module=module)


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
        with torch.no_grad(), lazy.programs.each_branch():
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
    """Whether a matmul reads a weight that is stored in fewer bits."""
    nodes = {node.name: node for node in flat.graph_module.graph.nodes}
    stack = [used for used in nodes[name].all_input_nodes if is_constant(used)] if name in nodes else []
    while stack:
        node = stack.pop()
        if _stored_narrow(flat, node):
            return True
        stack.extend(node.all_input_nodes)
    return False


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
