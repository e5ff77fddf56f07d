"""A branch: the part of a graph that can reuse its last output, and the residual streams that it works on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from .ops import shape_of


@dataclass(frozen=True)
class Stream:
    """One residual stream through a branch: the value `entry` that the gate reads, the value `exit` that is cached.

    `channel_dim` is the dimension of `entry` that holds the channels: the last one of tokens, 1 of feature maps.
    """

    entry: fx.Node
    exit: fx.Node
    channel_dim: int

    @property
    def width(self) -> int:
        return (shape_of(self.entry) or [1])[self.channel_dim]


@dataclass
class Branch:
    """A part of the model that can reuse its last output.

    Attributes:
        name: module path that the branch's heavy operators share, made unique.
        kind: "attention", "cross-attention", "joint-attention", "mlp" or "parallel" (attention and MLP in one).
        macs: multiply-accumulates per sample, attention products included.
        streams: one or more residual streams (joint attention has several).
        escapes: values made inside that something outside reads as well; they are cached like the exits.
        nodes: what is not executed when the branch reuses, in topological order.
    """

    name: str
    kind: str
    macs: int
    streams: list[Stream]
    escapes: list[fx.Node] = field(repr=False)
    nodes: list[fx.Node] = field(repr=False)

    @property
    def exits(self) -> list[fx.Node]:
        """Every value that is cached: one per stream, then the escapes."""
        return [stream.exit for stream in self.streams] + self.escapes

    @property
    def width(self) -> int:
        """Channels of all streams together: the length of the gate's weight vector."""
        return sum(stream.width for stream in self.streams)
