"""The command line; every command imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import LazyCompressError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exit codes: 0 done, 1 the input was at fault (one line on stderr), 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="lazycompress", description="Makes any Diffusion Transformer lazy.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="learn, export, sample and compare on the bundled model")
    demo.add_argument("directory", type=Path, help="where to write")
    demo.add_argument("--images", type=int, default=2000, help="images per way of sampling (default: 2000)")
    demo.set_defaults(run=_demo)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except LazyCompressError as error:
        print(f"lazycompress: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _demo(options: argparse.Namespace) -> None:
    from .integrations.digits.demo import run_demo

    run_demo(options.directory, options.images)
