"""`optimum-cli export lazy-openvino` and `export lazy-onnx`.

`optimum-cli` imports this file at every start, for every command: it imports nothing but optimum's own command classes,
and if those are not there it registers nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import ArgumentParser

REGISTER_COMMANDS: list[Any] = []

_EXAMPLES = """examples:
  optimum-cli export lazy-{format} --model my_sd3/ --recipe lazy_dit.yaml \\
      --set pipeline.prompts='[a cat, a red car]' --set pipeline.call.num_inference_steps=28 OUT
  optimum-cli export lazy-{format} --model my_dit/transformer/ --recipe mine.yaml OUT

A pipeline learns on the prompts or labels of the recipe's pipeline section, a single model on its sampling section.
"""


def _command(base: Any, info: Any, format: str) -> Any:
    class LazyExportCommand(base):  # type: ignore[misc]
        COMMAND = info(name=f"lazy-{format}", help=f"Learn when to skip, export a Diffusion Transformer to {format}.")

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            import argparse

            parser.description = LazyExportCommand.COMMAND.help
            parser.epilog = _EXAMPLES.format(format=format)
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            parser.add_argument(
                "--model",
                required=True,
                metavar="DIR",
                help="folder or hub id of a diffusers pipeline, or a model's folder",
            )
            parser.add_argument("--recipe", default="lazy_dit.yaml", help="recipe: a file or a shipped one")
            parser.add_argument(
                "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field"
            )
            parser.add_argument("--telemetry", action="store_true", help="add an output with each step's decisions")
            parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
            parser.add_argument("output", metavar="OUT", help="where to write")

        def run(self) -> None:
            from lazycompress import LazyCompressError
            from lazycompress.cli import overrides
            from lazycompress.integrations.diffusers import export_folder

            options = self.args
            try:
                folder = export_folder(
                    options.model, options.recipe, options.output, format, overrides=overrides(options.set),
                    telemetry=options.telemetry or None, overwrite=options.overwrite,
                )  # fmt: skip
            except LazyCompressError as error:
                print(f"optimum-cli export lazy-{format}: {error}", file=sys.stderr)
                raise SystemExit(1) from None
            print(f"written to {folder}")

    return LazyExportCommand


try:
    from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
    from optimum.commands.export.base import ExportCommand

    REGISTER_COMMANDS += [
        (_command(BaseOptimumCLICommand, CommandInfo, "openvino"), ExportCommand),
        (_command(BaseOptimumCLICommand, CommandInfo, "onnx"), ExportCommand),
    ]
except Exception:  # whatever is wrong here must not take optimum-cli's other commands down
    REGISTER_COMMANDS.clear()
