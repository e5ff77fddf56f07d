"""Slices of the suite: together every test once, none much longer than another, nothing that is shared divided."""

from __future__ import annotations

import pytest

from tests.slices import Slice, choose, unit

pytest_plugins = ["pytester"]

SUITE = """
import pytest

@pytest.fixture(scope="module")
def made():
    return 1

def test_first(made): pass
def test_second(made): pass
@pytest.mark.slow(seconds=30)
def test_long(): pass
@pytest.mark.parametrize("k", range(40))
def test_many(k): pass
@pytest.mark.slow
def test_longish(): pass
"""


@pytest.fixture
def items(pytester: pytest.Pytester) -> list[pytest.Item]:
    pytester.makeini("[pytest]\nmarkers = slow: long")
    found, _ = pytester.inline_genitems(pytester.makepyfile(test_suite=SUITE))
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_slices_hold_every_test_once_and_what_shares_a_fixture_together(items: list[pytest.Item], count: int) -> None:
    parts = [choose(items, Slice(k, count)) for k in range(1, count + 1)]
    assert sorted(item.nodeid for part in parts for item in part) == sorted(item.nodeid for item in items)
    sharing = {unit(item) for item in items if item.name in ("test_first", "test_second")}
    assert len(sharing) == 1
    assert sum({"test_first", "test_second"} <= {item.name for item in part} for part in parts) == 1


def test_slices_take_about_the_same_time(items: list[pytest.Item]) -> None:
    first, second = ({item.name for item in choose(items, Slice(k, 2))} for k in (1, 2))
    assert ("test_long" in first) != ("test_longish" in first)
    # 92 seconds in all: 30 and 16 others against 20 and 26.
    assert {len(first), len(second)} == {17, 27}


@pytest.mark.parametrize("text", ["0/8", "9/8", "3", "3/", "a/b", "1/0", "-1/8"])
def test_a_slice_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(pytest.UsageError, match="NUMBER/COUNT"):
        Slice.parse(text)
