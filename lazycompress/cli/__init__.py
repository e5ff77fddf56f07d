"""The command line; every command imports what it needs only when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..errors import LazyCompressError
from .commands import overrides
from .options import parser

__all__ = ["main", "overrides"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except LazyCompressError as error:
        print(f"lazycompress: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:  # whoever reads has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
