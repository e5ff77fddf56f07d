"""Puts what a benchmark prints into a page, with the command and the machine: tables there are never kept by hand."""

from __future__ import annotations

import io
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from lazycompress.files import write_file

#: A bar of progress, with what has been done and how long it took: no result.
_BAR = re.compile("━.* • ")

PAGE_HELP = "put what is printed into this page, in place of what the same command printed before"


@contextmanager
def written(page: Path | None, name: str) -> Iterator[None]:
    """Within the block, what is printed is kept too, and then put into `page` between the marks of `name`.

    The marks are `<!-- name -->` and `<!-- end of name -->`, each on a line of its own.

    Raises:
        SystemExit: the page has no such marks; before the block starts.
    """
    if page is None:
        yield
        return
    marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if not marks.search(page.read_text(encoding="utf-8")):
        raise SystemExit(f"{page}: no line <!-- {name} --> followed by <!-- end of {name} -->")
    kept = _Both(sys.stdout)
    with redirect_stdout(kept):
        yield
    words = [word for word in sys.argv[1:] if word not in ("--write", str(page))]
    command = " ".join(["python -m", f"tests.benchmarks.{name}", *words])
    lines = [line.rstrip() for line in kept.getvalue().splitlines() if not _BAR.search(line)]
    body = "\n".join([f"`{command}` on {machine()}:\n", "```text", *lines, "```\n"])
    text = page.read_text(encoding="utf-8")
    write_file(page, marks.sub(lambda found: f"{found[1]}{body}{found[2]}", text), f"<!-- {name} -->")


def machine() -> str:
    """The processor and the number of threads."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


class _Both(io.StringIO):
    """Keeps what is written, and passes it on."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other

    def write(self, text: str) -> int:
        self.other.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.other.flush()
