"""Every try of this folder's tables, a test each."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import Try, all_tries, attempt


@pytest.mark.parametrize("tried", all_tries(), ids=lambda tried: tried.name)
def test_is_met(tried: Try, tmp_path: Path) -> None:
    outcome = attempt(tried, tmp_path)
    assert outcome.good, f"{outcome.verdict}: {outcome.text}"


def test_the_harness_sees_what_it_is_for(tmp_path: Path) -> None:
    """A traceback, a line that is none, silence and traces left behind are failures, each of its own kind."""
    import torch

    from lazycompress.errors import InputError

    def says(message: str) -> None:
        raise InputError(message)

    verdicts = [
        attempt(Try("t: x", lambda _: says("a line"), "line"), tmp_path).verdict,
        attempt(Try("t: x", lambda _: None, None), tmp_path).verdict,
        attempt(Try("t: x", lambda _: 1 / 0, "line"), tmp_path).verdict,
        attempt(Try("t: x", lambda _: None, "line"), tmp_path).verdict,
        attempt(Try("t: x", lambda _: says("another"), "line"), tmp_path).verdict,
        attempt(Try("t: x", lambda _: says("a line"), None), tmp_path).verdict,
        attempt(Try("t: x", lambda _: torch.rand(1), None), tmp_path).verdict,
        attempt(Try("t: x", lambda _: torch.set_default_dtype(torch.float64), None), tmp_path).verdict,
    ]
    assert verdicts == [
        "one line", "accepted", "traceback", "silent", "wrong line", "refused", "left changed", "left changed",
    ]  # fmt: skip
