"""Which sizes of its inputs a capture can run: what `torch.export` left open, and the conditions that the model sets.

Conditions are those of the model's own code (a height that the patch size divides, a table that ends somewhere). A size
that no call could change under them is fixed: positions learned for one resolution allow only that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .ops import size_hint

#: What the example's sizes are multiplied with, to see whether they may be others.
_TRIALS = (Fraction(2), Fraction(1, 2), Fraction(3, 2))


class Sizes:
    """The sizes that a graph takes, of any batch.

    Args:
        inputs: values of the placeholders, with symbolic sizes.
        batch_dims: of each, or None.
    """

    def __init__(self, inputs: Sequence[Tensor], batch_dims: Sequence[int | None]) -> None:
        self._inputs = list(inputs)
        self._batch_dims = list(batch_dims)
        self._known: dict[tuple[tuple[int, ...], ...], bool] = {}
        self._read()

    @property
    def dynamic(self) -> list[list[int]]:
        """Of every input the dimensions, other than the batch, whose sizes may be others."""
        return [[d for d, size in enumerate(dims) if not isinstance(size, int)] for dims in self._dims]

    @property
    def is_dynamic(self) -> bool:
        return any(self.dynamic)

    @property
    def symbols(self) -> set[sympy.Symbol]:
        """The sizes that may be others, the batch not among them."""
        return set(self._hints)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where to read each of `symbols`: the number of an input and a dimension of it."""
        found = {dim: (i, d) for i, dims in reversed([*enumerate(self._dims)]) for d, dim in enumerate(dims)}
        return [found[symbol] for symbol in self._hints]

    def _read(self) -> None:
        """What the symbols are, and what must hold of them, in terms of those that are left."""
        self._batch: dict[sympy.Symbol, int] = {}
        self._dims: list[list[Any]] = []
        self._known.clear()
        environment = None
        hints: dict[sympy.Symbol, int] = {}
        for value, batch_dim in zip(self._inputs, self._batch_dims, strict=True):
            dims: list[Any] = []
            for d, size in enumerate(value.shape):
                expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
                if isinstance(size, torch.SymInt):
                    environment = size.node.shape_env
                    if expression.is_Symbol:
                        (self._batch if d == batch_dim else hints)[expression] = size_hint(size)
                if d == batch_dim:
                    dims.append(size_hint(size))
                else:
                    dims.append(expression if expression.free_symbols else int(expression))
            self._dims.append(dims)
        self._hints = {symbol: hint for symbol, hint in hints.items() if symbol not in self._batch}
        guards: list[Any] = [environment.replace(guard.expr) for guard in environment.guards] if environment else []
        own = set(self._hints)
        self._guards = [g for g in dict.fromkeys(guards) if g.free_symbols & own]
        sides = [side for g in self._guards if isinstance(g, sympy.Eq) for side in (g.args, g.args[::-1])]
        self._definitions = [(a, b) for a, b in sides if a in own and a not in b.free_symbols]
        # Sizes of 1 are captured apart: they broadcast.
        self._guards += [
            dim >= 2 for dim in dict.fromkeys(d for dims in self._dims for d in dims) if not isinstance(dim, int)
        ]

    def serve(self, shapes: Sequence[Sequence[int]], batch: int) -> bool:
        """Whether tensors of these shapes can be run."""
        key = tuple(map(tuple, shapes))
        if key not in self._known:
            self._known[key] = self._serve(key, batch)
        return self._known[key]

    def _serve(self, shapes: Sequence[Sequence[int]], batch: int) -> bool:
        values: dict[sympy.Symbol, int] = dict.fromkeys(self._batch, batch)
        others: list[tuple[sympy.Expr, int]] = []
        for shape, dims, batch_dim in zip(shapes, self._dims, self._batch_dims, strict=True):
            for d, (size, dim) in enumerate(zip(shape, dims, strict=True)):
                if d == batch_dim:
                    if size != batch:
                        return False
                elif isinstance(dim, int):
                    if size != dim:
                        return False
                elif dim.is_Symbol:
                    if values.setdefault(dim, size) != size:
                        return False
                else:
                    others.append((dim, size))
        # Conditions on the batch itself are those of its example, which is never 1.
        return all(_number(dim, values) == size for dim, size in others) and self._allow(values | self._batch)

    def _allow(self, values: Mapping[sympy.Symbol, int]) -> bool:
        return all(_number(guard, values) is not False for guard in self._guards)

    def settle(self) -> None:
        """Fix every size that cannot be another one, alone or together with others."""
        moving: set[sympy.Symbol] = set()
        for group in self._groups():
            found = next(self._trials(group), {}) if not group <= moving else {}
            moving |= {symbol for symbol, size in found.items() if size != self._hints.get(symbol, size)}
        stuck = set(self._hints) - moving
        if not stuck:
            return
        for value in self._inputs:
            for size in value.shape:
                if isinstance(size, torch.SymInt) and size.node.expr in stuck:
                    size.node.guard_int("", 0)
        self._read()

    def others(self, batch: int) -> Iterator[list[tuple[int, ...]]]:
        """Shapes of some other calls that the graph takes: all sizes changed, or as many as can be at once."""
        for group in [set(self._hints), *self._groups()]:
            for values in self._trials(group):
                yield [
                    tuple(
                        batch if d == batch_dim else dim if isinstance(dim, int) else _number(dim, values)
                        for d, dim in enumerate(dims)
                    )
                    for dims, batch_dim in zip(self._dims, self._batch_dims, strict=True)
                ]

    def _groups(self) -> Iterator[set[sympy.Symbol]]:
        symbols = list(self._hints)
        yield from ({symbol} for symbol in symbols)
        yield set(symbols)
        yield from map(set, combinations(symbols, 2))

    def _trials(self, group: set[sympy.Symbol]) -> Iterator[dict[sympy.Symbol, int]]:
        """Sizes that hold, with those of `group` scaled: others may follow (a table of positions, one for each token)."""
        for factor in _TRIALS:
            scaled = {symbol: self._hints[symbol] * factor for symbol in group}
            if any(size.denominator > 1 for size in scaled.values()):
                continue
            values = {**self._batch, **self._hints, **{symbol: int(size) for symbol, size in scaled.items()}}
            for symbol, expression in self._definitions:
                if symbol not in group:
                    values[symbol] = _number(expression, values)
            if self._allow(values):
                yield values


def resized(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tensors repeated and cut to other shapes."""
    found = []
    for tensor, shape in zip(tensors, shapes, strict=True):
        whole = tensor.repeat([-(-wanted // size) for size, wanted in zip(tensor.shape, shape, strict=True)])
        found.append(whole[tuple(slice(n) for n in shape)].contiguous())
    return found


def _number(expression: Any, values: Mapping[sympy.Symbol, int]) -> Any:
    """The value of an expression, or None if it holds symbols without one; False where it has none (a division by 0)."""
    if not isinstance(expression, sympy.Basic) or not expression.free_symbols:
        return bool(expression) if isinstance(expression, sympy.logic.boolalg.BooleanAtom | bool) else int(expression)
    if any(symbol not in values for symbol in expression.free_symbols):
        return None
    try:
        return sympy_interp(PythonReferenceAnalysis, dict(values), expression)
    except ArithmeticError:
        return False
