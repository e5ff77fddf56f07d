"""Which tests belong to one slice of the suite (`--slice 3/8`)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest

#: Seconds that a test is taken to need: as many as its `slow` marker says, which says these many where it says nothing.
FAST, SLOW = 1.0, 20.0


@dataclass(frozen=True)
class Slice:
    """Part `number` of `count`, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """`3/8` is the third of eight.

        Raises:
            pytest.UsageError: the text is anything else.
        """
        number, _, count = text.partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return cls(int(number), int(count))
        raise pytest.UsageError(f"--slice takes NUMBER/COUNT, such as 3/8 for the third of eight; there was {text!r}")


def unit(item: pytest.Item) -> str:
    """The name of what cannot be divided: tests that share a fixture of their module, or else the test alone."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    shares = any(found[-1].scope in ("module", "class") for found in fixtures if found)
    return item.nodeid.split("::")[0] if shares else item.nodeid


def seconds(item: pytest.Item) -> float:
    """About how long a test takes."""
    mark = item.get_closest_marker("slow")
    return FAST if mark is None else float(mark.kwargs.get("seconds", SLOW))


def choose(items: list[pytest.Item], part: Slice) -> list[pytest.Item]:
    """The tests of one slice, in their order; the slices take about the same time, and together hold every test once."""
    costs: dict[str, float] = defaultdict(float)
    for item in items:
        costs[unit(item)] += seconds(item)
    loads = [0.0] * part.count
    owner = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += costs[name]
    return [item for item in items if owner[unit(item)] == part.number - 1]
