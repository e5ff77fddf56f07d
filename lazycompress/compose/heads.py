"""Whole attention heads taken out of a module's linear layers.

Which rows belong to a head, and where a module keeps the number of its heads, differs from model to model. It is not looked
up by name but tried: the narrowed copy must give what the wide one gives with the same heads silenced.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..errors import ComposeError
from ..graph.branch import Branch
from ..graph.ops import op_name, shape_of
from .distill import RecordedCall
from .linears import linear_of, sources_of, uses_of


@dataclass(frozen=True)
class Attention:
    """One attention product: its heads and channels per head, and the layers before and after it, by module name."""

    branch: str
    heads: int
    channels: int
    sources: tuple[str, ...]
    outs: tuple[str, ...]


def find_attention(branches: Sequence[Branch], linears: Mapping[fx.Node, str], model: nn.Module) -> list[Attention]:
    """The attention products whose queries, keys and values come from linear layers alone and go to linear layers alone."""
    found: dict[tuple[str, ...], Attention] = {}
    for branch in branches:
        inside = set(branch.nodes)
        for node in branch.nodes:
            if op_name(node) != "aten::scaled_dot_product_attention":
                continue
            shapes = [shape_of(value) or [] for value in node.args[:3] if isinstance(value, fx.Node)]
            if (
                len({(len(s), s[-3] if len(s) > 2 else 0, s[-1] if s else 0) for s in shapes}) != 1
                or len(shapes[0]) != 4
            ):
                continue
            heads, channels = shapes[0][-3], shapes[0][-1]
            sources, mixed = sources_of(node, inside, linears, branch, list(node.args[:3]))
            outs, strays = uses_of(node, inside, linears, branch)
            width = heads * channels
            if mixed or strays or not sources or not outs:
                continue
            if any(linear_of(model, name).out_features % width for name in sources):
                continue
            if any(linear_of(model, name).in_features != width for name in outs):
                continue
            found[tuple(outs)] = Attention(branch.name, heads, channels, tuple(sources), tuple(outs))
    return list(found.values())


def prune_heads(
    student: nn.Module, found: Sequence[Attention], energies: Mapping[str, Tensor], share: float, call: RecordedCall
) -> nn.Module:
    """A copy of `student` without the given share of each attention's heads, those that add least to its output.

    Args:
        student: in evaluation mode; its weights are left as they are.
        found: what `find_attention` gave for the same module names.
        energies: of the inputs of the layers after the product, see `input_energies`.
        share: of the heads; at least one stays.
        call: a call of the dense model, to compare on.

    Raises:
        ComposeError: the heads are fixed in the model's code.
    """
    drops = {a.outs: _weakest(student, a, energies, share) for a in found}
    silenced = copy.deepcopy(student)
    with torch.no_grad():
        for attention in found:
            for name in attention.outs:
                linear_of(silenced, name).weight[:, _channels(attention, drops[attention.outs])] = 0
        expected = call.run(silenced).float()
    del silenced
    for parts_first in (True, False):
        for widths_too in (False, True):
            candidate = copy.deepcopy(student)
            try:
                for attention in found:
                    _take_out(candidate, attention, drops[attention.outs], parts_first, widths_too)
                with torch.no_grad():
                    got = call.run(candidate).float()
            except Exception:  # a wrong guess may fail anywhere in the model's own code
                continue
            if got.shape == expected.shape and same(got, expected, call.output.dtype):
                return candidate
    raise ComposeError(
        f"prune.heads: the number of heads is fixed in the code of {type(student).__name__}, none can be taken out of "
        f"{found[0].branch}; set prune.heads: 0 (prune.mlp_width does not depend on it)"
    )


def same(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two outputs, float32, differ by rounding of `dtype` only."""
    tolerance = 1e-3 if dtype is torch.float32 else 5e-2
    return bool((got - expected).norm() <= tolerance * expected.norm())


def _take_out(model: nn.Module, attention: Attention, drop: list[int], parts_first: bool, widths_too: bool) -> None:
    import torch_pruning as tp

    heads, channels = attention.heads, attention.channels
    for name in attention.sources:
        layer = linear_of(model, name)
        rows = torch.arange(layer.out_features)
        parts = layer.out_features // (heads * channels)  # queries, keys and values in one layer
        grid = rows.view(parts, heads, channels) if parts_first else rows.view(heads, parts, channels).transpose(0, 1)
        tp.prune_linear_out_channels(layer, grid[:, drop].flatten().tolist())
    for name in attention.outs:
        tp.prune_linear_in_channels(linear_of(model, name), _channels(attention, drop))
    kept = heads - len(drop)
    numbers = {heads: kept} | ({heads * channels: kept * channels} if widths_too else {})
    for module in model.get_submodule(_common(attention)).modules():
        if isinstance(module, nn.Linear):
            continue
        for key, value in vars(module).items():
            if type(value) is int and value in numbers:
                setattr(module, key, numbers[value])


def _weakest(model: nn.Module, attention: Attention, energies: Mapping[str, Tensor], share: float) -> list[int]:
    scores = torch.zeros(attention.heads)
    for name in attention.outs:
        columns = contributions(linear_of(model, name), energies.get(name)).cpu()
        scores += columns.view(attention.heads, attention.channels).sum(1)
    count = min(round(attention.heads * share), attention.heads - 1)
    return sorted(scores.argsort()[:count].tolist())


def contributions(layer: nn.Linear, energy: Tensor | None) -> Tensor:
    """What each input of a layer adds to its output, squared and summed: float32 [in_features]."""
    columns = layer.weight.detach().float().square().sum(0)
    return columns if energy is None else columns * energy.to(columns.device)


def _channels(attention: Attention, drop: Sequence[int]) -> list[int]:
    grid = torch.arange(attention.heads * attention.channels).view(attention.heads, attention.channels)
    found: list[int] = grid[list(drop)].flatten().tolist()
    return found


def _common(attention: Attention) -> str:
    paths = [name.split(".") for name in (*attention.sources, *attention.outs)]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
