"""Which operator scores a branch: the package's own, or one that is made of another package's gate.

A graph holds a gate as one opaque node. So a gate from outside becomes an operator beside those of `lazycompress.gate`: every
pass that leaves these alone leaves it alone, and an exporter takes it apart into what it is made of.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import kinds
from ..errors import InputError
from ..gate import SCORE

_library: Any = torch.library.Library("lazycompress", "FRAGMENT")  # type: ignore[no-untyped-call]


class Gate(Protocol):
    """How lazy a branch is; a module, or an object."""

    def score(
        self,
        streams: Sequence[Tensor],
        channel_dims: Sequence[int],
        hats: Tensor,
        weight: Tensor,
        bias: Tensor,
        elapsed: Tensor,
        slope: Tensor,
    ) -> Tensor:
        """The score of each sample, float32 [batch] in [0, 1], higher is lazier: above the threshold the branch is reused.

        Made of torch operations alone, which carry gradients to `weight` and which exporters take.

        Args:
            streams: the branch's inputs Z, each [batch * k, ..., channels, ...].
            channel_dims: which dimension of each holds the channels.
            hats: weights of interpolation over the grid of timesteps, float32 [batch, grid]: `hats @ weight` is `weight` now.
            weight: what is learned, float32 [grid, channels of all streams].
            bias: float32 [grid]; large and negative where the branch has to compute. It has to get through to the score.
            elapsed: time since the branch was computed, float32 [batch].
            slope: what the logarithm of `elapsed` counts, float32 scalar; 0: nothing.
        """
        ...


@cache
def operator_of(gate: str) -> Any:
    """The operator of a gate by its name.

    Raises:
        InputError: there is none, or what there is has no score.
    """
    found = kinds.find("gates", gate)
    if gate in kinds.OWN["gates"]:
        return torch.ops.lazycompress.score
    if not callable(getattr(found, "score", None)):
        raise InputError(
            f"the gate {gate!r} has to have score(streams, channel_dims, hats, weight, bias, elapsed, slope)"
        )
    name = "score_" + re.sub(r"\W", lambda sign: f"_{ord(sign[0]):x}_", gate)
    _library.define(f"{name}{SCORE}")
    _library.impl(name, found.score, "CompositeImplicitAutograd")
    return getattr(torch.ops.lazycompress, name)
