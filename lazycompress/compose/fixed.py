"""The flat lazy graph with its sizes as numbers, for tools that do not take symbolic ones, and the way back.

NNCF takes a size that is computed in the graph for an activation. So quantization sees a copy with the sizes of one batch;
afterwards every node that had symbolic sizes gets them back. Such a tool may add nodes and fold constants; the nodes that
take sizes (views, expansions) it leaves as they are, under their names.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ..errors import ComposeError
from ..graph.insert import LazyGraph


class Fixed:
    """A copy of a flat graph with the sizes of `example`, which are the flat graph's own inputs.

    Attributes:
        module: the copy. Each use of a weight has its own name: a weight that two layers share is quantized twice.
    """

    def __init__(self, flat: LazyGraph, example: Sequence[Tensor]) -> None:
        self._flat = flat
        sizes = _sizes(flat.graph_module, example)
        self.module = copy.deepcopy(flat.graph_module)
        nodes = {node.name: node for node in self.module.graph.nodes}
        #: Arguments that hold sizes: name of the node -> args, kwargs, in nodes of the flat graph.
        self._symbolic: dict[str, tuple[Any, Any]] = {}
        for node in flat.graph_module.graph.nodes:
            if node.name not in sizes and any(used.name in sizes for used in node.all_input_nodes):
                self._symbolic[node.name] = (node.args, node.kwargs)
                ours = nodes[node.name]
                ours.args = fx.map_arg(ours.args, lambda used: sizes.get(used.name, used))
                ours.kwargs = fx.map_arg(ours.kwargs, lambda used: sizes.get(used.name, used))
        for name in reversed(sizes):
            self.module.graph.erase_node(nodes[name])
        _own_weights(self.module)
        self.module.recompile()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.no_grad():
            FakeTensorProp(self.module, mode).propagate(*example)

    def back(self, module: fx.GraphModule) -> LazyGraph:
        """The flat graph that `module`, made from the copy, stands for: any batch again.

        Raises:
            ComposeError: a node that takes sizes is gone.
        """
        source = self._flat.graph_module.graph
        nodes = {node.name: node for node in module.graph.nodes}
        lost = [name for name in self._symbolic if name not in nodes]
        if lost:
            raise ComposeError(
                f"quantization removed {', '.join(lost[:3])}, which take sizes: the graph cannot be made dynamic again"
            )
        added: dict[fx.Node, fx.Node] = {}
        last = [node for node in module.graph.nodes if node.op == "placeholder"][-1]

        def size(node: fx.Node) -> fx.Node:
            """The node of a size, or an input, in `module`."""
            if node.op == "placeholder":
                found: fx.Node = nodes[node.name]
                return found
            if node not in added:
                copied = {used: size(used) for used in node.all_input_nodes}
                with module.graph.inserting_after(last):
                    added[node] = module.graph.node_copy(node, copied.__getitem__)
            return added[node]

        for name, (args, kwargs) in self._symbolic.items():
            node = nodes[name]
            node.args = _merge(node.args, args, size)
            node.kwargs = _merge(node.kwargs, kwargs, size)
        _sort(module)
        module.lazy_gates = self._flat.graph_module.lazy_gates  # the model's own, not the copy: they may still move
        module.graph.lint()
        module.recompile()
        flat = LazyGraph(**{**vars(self._flat), "graph_module": module})
        annotate(flat, source)
        return flat


def annotate(flat: LazyGraph, source: fx.Graph) -> None:
    """Give every node of a flat graph its symbolic value, as the capture gave those of `source`."""
    count = len(flat.leaves)
    placeholders = [node for node in source.nodes if node.op == "placeholder"]
    inputs = [node.meta["val"] for node in placeholders[:count]]
    mode = next(value.fake_mode for value in inputs if hasattr(value, "fake_mode"))
    batch = inputs[flat.latents].shape[0]
    with mode:
        state = [
            torch.empty(
                node.meta["like"].shape
                if "like" in node.meta
                else [batch * spec.scale if size == -1 else size for size in spec.shape],
                dtype=spec.dtype,
            )
            for node, spec in zip(placeholders[count + 1 :], flat.state, strict=True)
        ]
        threshold = torch.empty(())
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        with torch.no_grad():
            FakeTensorProp(flat.graph_module, mode).propagate_dont_convert_inputs(*inputs, threshold, *state)
    finally:
        mode.allow_non_fake_inputs = before


class _Sizes(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, int):
            self.found[n.name] = value
        return value


def _sizes(module: fx.GraphModule, example: Sequence[Tensor]) -> dict[str, int]:
    """Every node that is a size, and its value on `example`, in the order of the graph."""
    sizes = _Sizes(module)
    with torch.no_grad():
        sizes.run(*example)
    return sizes.found


def _own_weights(module: fx.GraphModule) -> None:
    seen: set[str] = set()
    for node in list(module.graph.nodes):
        if node.op != "get_attr" or str(node.target).startswith("lazy_gates"):
            continue
        for user in list(node.users):
            if str(node.target) not in seen:
                seen.add(str(node.target))
                continue
            tensor = _attribute(module, str(node.target))
            name = f"own_{len(seen)}_{str(node.target).replace('.', '_')}"
            module.register_buffer(name, tensor.detach())
            seen.add(name)
            with module.graph.inserting_before(node):
                own = module.graph.get_attr(name)
            own.meta = dict(node.meta)
            user.replace_input_with(node, own)
        if not node.users:
            module.graph.erase_node(node)


def _attribute(module: Any, path: str) -> Tensor:
    for part in path.split("."):
        module = getattr(module, part)
    assert isinstance(module, Tensor)
    return module


def _merge(now: Any, before: Any, size: Any) -> Any:
    """Arguments as they are now, but with sizes where there were nodes of sizes before."""
    if isinstance(before, fx.Node) and isinstance(now, int):
        return size(before)
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)) and len(before) == len(now):
        return type(before)(_merge(a, b, size) for a, b in zip(now, before, strict=True))
    if isinstance(before, dict):
        return {key: _merge(now[key], value, size) for key, value in before.items()}
    return now


def _sort(module: fx.GraphModule) -> None:
    """Topological order, the present one where there is a choice."""
    done: set[fx.Node] = set()
    waiting = list(module.graph.nodes)
    last: fx.Node | None = None
    for node in waiting:
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [used for used in top.all_input_nodes if used not in done]
            if missing and top not in done:
                stack.extend(missing)
                continue
            stack.pop()
            if top in done:
                continue
            done.add(top)
            if last is not None:
                last.append(top)
            last = top
