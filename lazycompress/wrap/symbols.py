"""Arithmetic on tensors of a graph that is being written, whatever its format: operators write nodes.

A format says how a node is written (`Graph`); the kinds of nodes and what they mean are ONNX's
(https://onnx.ai/onnx/operators/), but that axes are always attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike


class Graph(Protocol):
    """A graph that is being written. Handles are the format's own."""

    def constant(self, value: np.ndarray[Any, Any]) -> Any:
        """A handle of a constant."""

    def node(self, kind: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        """Write a node of one output."""

    def branch(self, condition: Any, inputs: Sequence[Any], then: Body, otherwise: Body) -> list[Any]:
        """Write an `If`: each body is called once, with its own handles of `inputs`, and returns those of its outputs."""


Body = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True, eq=False)
class Symbol:
    """A tensor of a graph."""

    graph: Graph
    handle: Any

    def _node(self, kind: str, *others: Symbol | ArrayLike, **attributes: Any) -> Symbol:
        handles = [self.handle, *(self.like(other).handle for other in others)]
        return Symbol(self.graph, self.graph.node(kind, handles, **attributes))

    def like(self, value: Symbol | ArrayLike) -> Symbol:
        """A value of this graph: numbers with a point become float32."""
        if isinstance(value, Symbol):
            return value
        array = np.asarray(value)
        return Symbol(self.graph, self.graph.constant(array.astype(np.float32) if array.dtype.kind == "f" else array))

    def __add__(self, other: Symbol | ArrayLike) -> Symbol:
        return self._node("Add", other)

    def __sub__(self, other: Symbol) -> Symbol:
        # OpenVINO makes such a sum of a difference itself, and then it forgets to stay in float32.
        return self + other * -1.0

    def __mul__(self, other: Symbol | ArrayLike) -> Symbol:
        return self._node("Mul", other)

    def __truediv__(self, other: Symbol) -> Symbol:
        # So does a quotient.
        return self * other._node("Reciprocal")

    def __mod__(self, other: int) -> Symbol:
        return self._node("Mod", np.array(other))

    def __gt__(self, other: Symbol | ArrayLike) -> Symbol:
        return self._node("Greater", other)

    def __ge__(self, other: Symbol | ArrayLike) -> Symbol:
        return self._node("GreaterOrEqual", other)

    def __le__(self, other: Symbol | ArrayLike) -> Symbol:
        return self._node("LessOrEqual", other)

    def equals(self, other: Symbol | ArrayLike) -> Symbol:
        return self._node("Equal", other)

    def __and__(self, other: Symbol) -> Symbol:
        return self._node("And", other)

    def __or__(self, other: Symbol) -> Symbol:
        return self._node("Or", other)

    def __invert__(self) -> Symbol:
        return self._node("Not")

    def where(self, yes: Symbol | ArrayLike, no: Symbol | ArrayLike) -> Symbol:
        """`yes` where this is true, else `no`: of what is not chosen nothing is left, NaN neither."""
        return self._node("Where", yes, no)

    def abs(self) -> Symbol:
        return self._node("Abs")

    def sqrt(self) -> Symbol:
        return self._node("Sqrt")

    def floor(self) -> Symbol:
        return self._node("Floor")

    def clip(self, low: float, high: float) -> Symbol:
        return self._node("Max", low)._node("Min", high)

    def cast(self, dtype: str) -> Symbol:
        return self._node("Cast", to=dtype)

    def float(self) -> Symbol:
        return self.cast("float32")

    def identity(self) -> Symbol:
        """The value itself: what a body gives is to be made in it."""
        return self._node("Identity")

    def sum(self, *axes: int, keep: bool = False) -> Symbol:
        return self._node("ReduceSum", axes=axes, keepdims=keep)

    def any(self, *axes: int, keep: bool = False) -> Symbol:
        """Whether any is true, along axes."""
        return self.float().sum(*axes, keep=keep) > 0.5

    def all(self, *axes: int, keep: bool = False) -> Symbol:
        """Whether all are true, along axes."""
        return ~(~self).any(*axes, keep=keep)

    def argmax(self, axis: int) -> Symbol:
        """Position of the largest along an axis, which stays with size 1, int64."""
        return self._node("ArgMax", axis=axis)

    def shape(self) -> Symbol:
        """The sizes, int64 [rank]."""
        return self._node("Shape")

    def size(self, axis: int) -> Symbol:
        """One size, int64 [1]."""
        return self.shape().take([axis])

    def reshape(self, shape: Symbol | Sequence[int]) -> Symbol:
        """With other sizes; 0 keeps one, -1 is what is left."""
        return self._node("Reshape", shape if isinstance(shape, Symbol) else np.array(shape, np.int64))

    def of_sizes(self, shape: Symbol) -> Symbol:
        """The same, which has these sizes, for tools that infer them. OpenVINO is not told.

        It takes what holds in one body for true outside of it, too (2026.4).
        """
        return self._node("OfSizes", shape)

    def expand(self, shape: Symbol) -> Symbol:
        return self._node("Expand", shape)

    def insert(self, *axes: int) -> Symbol:
        """With new axes of size 1."""
        return self._node("Unsqueeze", np.array(axes))

    def take(self, positions: Symbol | Sequence[int] | int, axis: int = 0) -> Symbol:
        """Slices at positions along an axis, which a single number drops."""
        found = positions if isinstance(positions, Symbol) else np.array(positions, np.int64)
        return self._node("Gather", found, axis=axis)

    def first(self, count: Symbol, axis: int) -> Symbol:
        """The first slices along an axis; count: int64 [1]."""
        return self.take(count.counted(), axis)

    def times(self, other: Symbol) -> Symbol:
        """Products of rows: [rows, values] and [others, values] give [rows, others]."""
        return self._node("Gemm", other, transB=1)

    def counted(self) -> Symbol:
        """0, 1, ... as far as this number, int64 [1], says."""
        return self.like(np.array(0))._node("Range", self.take(0), np.array(1))


def concat(parts: Sequence[Symbol], axis: int) -> Symbol:
    """Tensors in a row along an axis."""
    return parts[0]._node("Concat", *parts[1:], axis=axis) if len(parts) > 1 else parts[0]


def branch(
    condition: Symbol,
    inputs: Sequence[Symbol],
    then: Callable[[list[Symbol]], list[Symbol]],
    otherwise: Callable[[list[Symbol]], list[Symbol]],
) -> list[Symbol]:
    """An `If`. Bodies use nothing from outside but what they are handed, and constants that they make from it."""
    graph = condition.graph

    def body(write: Callable[[list[Symbol]], list[Symbol]]) -> Body:
        return lambda handles: [out.handle for out in write([Symbol(graph, handle) for handle in handles])]

    handles = [value.handle for value in inputs]
    return [Symbol(graph, h) for h in graph.branch(condition.handle, handles, body(then), body(otherwise))]
