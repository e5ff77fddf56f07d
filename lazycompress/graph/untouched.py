"""Whatever is done to a model inside `untouched(model)`, its own state is afterwards what it was before.

Tracing runs a model's own code on values that are none. What that code remembers on its way (tables of positions in a
dictionary, in an attribute, behind `functools.lru_cache`) must not be there when the model is next called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore attributes, containers and plain objects in attributes, buffers, memoised functions, and where weights lie."""
    attributes = [(vars(owner), dict(vars(owner))) for owner in [*model.modules(), *_helpers(model)]]
    values = [value for _, before in attributes for value in before.values()]
    containers = [(value, _contents(value)) for value in values if isinstance(value, dict | list | set)]
    buffers = [
        (buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_inference()
    ]
    places = [(weight, weight.data) for weight in (*model.parameters(), *model.buffers())]
    memoised = [(function, function.cache_info().misses) for function in _memoised(model)]
    try:
        yield
    finally:
        for now, before in attributes:
            if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
                now.clear()
                now.update(before)
        for value, held in containers:
            _refill(value, held)
        for weight, data in places:
            if not _lies_at(weight, data):
                weight.data = data
        with torch.no_grad():
            for buffer, version, contents in buffers:
                if buffer._version != version:
                    buffer.copy_(contents)
        for function, misses in memoised:
            if function.cache_info().misses != misses:
                function.cache_clear()


def _lies_at(weight: Tensor, data: Tensor) -> bool:
    """Whether a weight has the storage of `data`; hooks that offload give it others, and while tracing some that are none."""
    try:
        return weight.device == data.device and weight.data_ptr() == data.data_ptr()
    except (RuntimeError, NotImplementedError):  # weights of a kind of their own have no address
        return isinstance(weight.data, type(data))


def _helpers(model: nn.Module) -> list[Any]:
    """Objects of the model's own classes that are no modules, held in attributes (a table of positions, say)."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type) and _is_own(type(value)):
                found[id(value)] = value
    return list(found.values())


def _is_own(cls: type) -> bool:
    return not cls.__module__.startswith(("torch.", "builtins", "functools", "types"))


def _contents(value: Any) -> list[Any]:
    """What a dictionary, list or set holds, flat."""
    return [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)


def _refill(value: Any, before: list[Any]) -> None:
    now = _contents(value)
    if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
        return
    value.clear()
    if isinstance(value, list):
        value.extend(before)
    else:
        value.update(zip(before[::2], before[1::2], strict=True) if isinstance(value, dict) else before)


def _memoised(model: nn.Module) -> list[Any]:
    """Functions with `functools.lru_cache` among the methods of the model's classes and beside them in their files."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    own = [cls for cls in classes if _is_own(cls)]
    files = {sys.modules[cls.__module__] for cls in own if cls.__module__ in sys.modules}
    values = [value for place in [*own, *files] for value in list(vars(place).values())]
    return list({id(v): v for v in values if not isinstance(v, Tensor) and _is_memoised(v)}.values())


def _is_memoised(value: Any) -> bool:
    return type(value).__name__ == "_lru_cache_wrapper"
