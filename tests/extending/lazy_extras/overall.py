"""A pruning method: the smallest weights of all branches together, where `magnitude` takes a share of each layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from lazycompress.errors import ComposeError
from lazycompress.graph.branch import Branch
from lazycompress.recipe import Prune
from lazycompress.sampling import Sampler


def need(options: Prune) -> None:
    share = options.options.get("share")
    if set(options.options) != {"share"} or not isinstance(share, float) or not 0 < share < 1:
        raise ComposeError(
            f"prune.options: method overall takes share, above 0 and below 1; there was {options.options}"
        )


def prune(
    model: nn.Module,
    sampler: Sampler,
    options: Prune,
    branches: Sequence[Branch],
    linears: Mapping[fx.Node, str],
    seed: int,
    progress: bool,
) -> tuple[nn.Module, set[str]]:
    names = {linears[node] for branch in branches for node in branch.nodes if node in linears}
    pruned = copy.deepcopy(model).eval()
    layers = [pruned.get_submodule(name) for name in sorted(names)]
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    sizes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    limit = sizes.kthvalue(max(1, int(options.options["share"] * len(sizes)))).values
    with torch.no_grad():
        for weight in weights:
            weight[weight.abs() <= limit] = 0
    return pruned, names
