"""`python -m tests.hostile [GROUP ...] [--write docs/robustness.md]`: run all tries, print what failed, write the page."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
from pathlib import Path

import torch

from .harness import Outcome, Try, all_tries, attempt, page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="run these groups only")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lazycompress").addHandler(logging.NullHandler())
    logging.getLogger("lazycompress").propagate = False
    outcomes: list[tuple[Try, Outcome]] = []
    for tried in all_tries():
        if options.groups and tried.group not in options.groups:
            continue
        sink = io.StringIO()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            outcome = attempt(tried, Path(folder))
        outcomes.append((tried, outcome))
        if not outcome.good:
            print(f"{tried.name}: {outcome.verdict}: {outcome.text.strip()}")
    good = sum(outcome.good for _, outcome in outcomes)
    print(f"{good} of {len(outcomes)} tries met")
    if options.write is not None:
        options.write.write_text(page(outcomes), encoding="utf-8")
    if good < len(outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
