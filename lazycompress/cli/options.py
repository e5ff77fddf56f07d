"""The commands and their options, and what `--help` says of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import LazyCompressError, shown
from . import commands

_EXAMPLES = """examples:
  lazycompress demo out/demo
  lazycompress recipes
  lazycompress locate --model my_dit/ --recipe mine.yaml --svg branches.svg
  lazycompress apply --model my_dit/ --recipe mine.yaml --set target=0.4 gates/
  lazycompress export --model my_dit/ --gates gates/ --format openvino out/
  lazycompress export --model my_sd3/ --set pipeline.prompts='[a cat, a red car]' out/
  lazycompress wrap openvino_model.xml lazy/ --plan plan.json
  lazycompress plan --calibration gates/ --steps 20 --target 0.4
  lazycompress verify out/
  lazycompress summary out/

A model is a local folder in diffusers' layout: a single model's, whose inputs come from the recipe's sampling section or
from --inputs, or a whole pipeline's, which samples what the recipe's pipeline section says.
Exit codes: 0 done, 1 the input was at fault (one line on stderr), 2 wrong usage.
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lazycompress",
        description="Makes any Diffusion Transformer lazy: finds its branches, learns when to reuse them, exports the result.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choices = made.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = choices.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print JSON for other programs")
        return made

    def with_model(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--model", type=Path, required=True, metavar="DIR", help="folder of a diffusers model or pipeline"
        )

    def with_recipe(made: argparse.ArgumentParser) -> None:
        made.add_argument("--recipe", default="lazy_dit.yaml", help="file or shipped recipe (default: lazy_dit.yaml)")
        made.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a recipe field, such as target=0.4",
        )

    locate = command("locate", commands.locate, "print the branches of a model; nothing is changed")
    with_model(locate)
    with_recipe(locate)
    locate.add_argument(
        "--inputs", type=Path, metavar="FILE", help="safetensors with the arguments of one forward call"
    )
    locate.add_argument("--svg", type=Path, metavar="FILE", help="also draw the model with its branches")
    locate.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the drawing and the table")

    apply = command("apply", commands.apply, "learn gates and write them to a folder")
    with_model(apply)
    with_recipe(apply)
    apply.add_argument("directory", type=Path, help="where to write the gates")
    apply.add_argument("--overwrite", action="store_true", help="replace gates that are there")
    apply.add_argument("--resume", action="store_true", help="go on with a training into this folder that was cut off")

    export = command("export", commands.export, "write a model or a pipeline as OpenVINO or ONNX")
    with_model(export)
    with_recipe(export)
    export.add_argument(
        "--gates", type=Path, metavar="DIR", help="what 'lazycompress apply' wrote (default: learn them now)"
    )
    export.add_argument(
        "--format", type=_format, help="openvino, onnx, executorch, or that of another package (default: the recipe's)"
    )
    export.add_argument("--telemetry", action="store_true", help="add an output with the decisions of each step")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument("directory", type=Path, help="where to write")

    wrap = command("wrap", commands.wrap, "make an OpenVINO or ONNX denoiser lazy that exists as a file")
    wrap.add_argument("model", type=Path, help="a .xml or .onnx file, or a folder of a model or a pipeline")
    wrap.add_argument("directory", type=Path, help="where to write")
    wrap.add_argument(
        "--plan", type=Path, required=True, metavar="FILE",
        help="JSON with the plan: timesteps, computes (true or false for each), order (0, 1 or 2)",
    )  # fmt: skip
    wrap.add_argument("--timestep-input", metavar="NAME", help="the timestep's name (default: found by its name)")
    wrap.add_argument(
        "--moving", action="append", default=[], metavar="NAME", help="an input that changes within an image"
    )
    wrap.add_argument("--streams", type=int, default=2, help="images or passes that may take turns (default: 2)")
    wrap.add_argument(
        "--no-past-defaults",
        action="store_true",
        help="ONNX inputs past_* have to be passed: for JavaScript's runtimes",
    )
    wrap.add_argument("--overwrite", action="store_true", help="replace an earlier export")

    plan = command("plan", commands.plan, "draw the plan for other steps or another budget, without the model")
    plan.add_argument(
        "--calibration", type=Path, required=True, metavar="DIR", help="what 'lazycompress apply' or 'save' wrote"
    )
    plan.add_argument(
        "--target", type=float, metavar="SHARE", help="of the calls to compute (default: as it was learned)"
    )
    times = plan.add_mutually_exclusive_group()
    times.add_argument("--steps", type=_count, metavar="N", help="steps, spread as the learned ones are")
    times.add_argument("--timesteps", type=_times, metavar="T,T,...", help="of the steps, as the model gets them")

    verify = command(
        "verify",
        commands.verify,
        "run an exported folder again on its recorded calls, or a wrapped one beside its dense file",
    )
    verify.add_argument("directory", type=Path)
    verify.add_argument("--dense", type=Path, metavar="PATH", help="file or folder that 'lazycompress wrap' was given")
    verify.add_argument(
        "--inputs", type=Path, metavar="FILE", help="safetensors with the inputs of one call (default: made up)"
    )

    summary = command("summary", commands.summary, "say what an exported folder holds")
    summary.add_argument("directory", type=Path)

    recipes = command(
        "recipes", commands.recipes, "list the shipped recipes, print one, or print the reference of all fields"
    )
    recipes.add_argument("name", nargs="?", help="print this recipe")
    recipes.add_argument("--reference", action="store_true", help="print the reference as Markdown")

    demo = command("demo", commands.demo, "learn, export, draw and compare on the bundled pipeline")
    demo.add_argument("directory", type=Path, help="where to write")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    demo.add_argument("--images", type=_count, default=48, help="pictures of each way of drawing (default: 48)")
    return made


def _count(text: str) -> int:
    """A number of images or of steps, as argparse wants it: an error says what to write."""
    if not text.isdecimal() or len(text) > 7 or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"a number from 1 to 1000000 is needed, there was {shown(text)}")
    return int(text)


def _times(text: str) -> tuple[float, ...]:
    """Timesteps with commas between them, as argparse wants them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"numbers with commas between them are needed, there was {shown(text)}"
        ) from None


def _format(text: str) -> str:
    """An export format, as argparse wants it: an error says which there are."""
    from ..kinds import need

    try:
        need("runtimes", text)
    except LazyCompressError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
