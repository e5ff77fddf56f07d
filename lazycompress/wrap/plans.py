"""Plans as JSON: `{"timesteps": [...], "computes": [...], "order": 2}`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..plan.plan import Plan


def read_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        InputError: there is none that can be followed.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the plan {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict) or not {"timesteps", "computes"} <= found.keys() <= {
        "timesteps",
        "computes",
        "order",
    }:
        raise InputError(f"the plan {path} is no JSON object with timesteps and computes, and perhaps an order")
    timesteps, computes, order = found["timesteps"], found["computes"], found.get("order", 2)
    if not _all(timesteps, (int, float)) or not _all(computes, (bool,)) or isinstance(order, bool):
        raise InputError(f"the plan {path}: timesteps are numbers, and computes is true or false for each")
    return Plan(tuple(float(t) for t in timesteps), tuple(computes), order)


def _all(values: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(type(value) in kinds for value in values)


__all__ = ["read_plan"]
