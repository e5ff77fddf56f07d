"""What each command does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, InputError, RecipeError, shown

if TYPE_CHECKING:
    from torch import nn

    from ..recipe import Recipe


def _recipe(options: argparse.Namespace) -> Recipe:
    from ..recipe_loading import load_recipe

    return load_recipe(options.recipe, overrides(options.set))


def _is_pipeline(folder: Path) -> bool:
    from ..files import kind_of

    return kind_of(folder / "model_index.json", InputError) == "file"


def _parts(options: argparse.Namespace) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """The denoisers of `--model` by name, each with the arguments of one call."""
    from ..integrations.diffusers import example_calls, load_denoiser, load_pipeline
    from ..sampling import build_inputs

    recipe = _recipe(options)
    if options.inputs is not None:
        return {"": (load_denoiser(options.model), read_inputs(options.inputs))}
    if recipe.sampling is not None:
        model = load_denoiser(options.model)
        return {"": (model, build_inputs(model, recipe.sampling))}
    if _is_pipeline(options.model):
        pipeline = load_pipeline(options.model)
        calls = example_calls(pipeline, recipe)
        return {name: (getattr(pipeline, name), inputs) for name, inputs in calls.items()}
    load_denoiser(options.model)  # says so if the folder is at fault
    raise RecipeError(
        f"{options.recipe} has no sampling section, from which a single model's inputs come; or pass --inputs"
    )


def read_inputs(path: Path) -> dict[str, Any]:
    from ..files import read_tensors

    return dict(read_tensors(path, InputError))


def overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """`["target=0.4"]` as `{"target": 0.4}`; values are YAML.

    Raises:
        InputError: an assignment has no `=`, or no key before it.
        RecipeError: its value is not YAML.
    """
    from ..strict_yaml import parse

    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {shown(assignment)}: write KEY=VALUE, such as --set target=0.4")
        found[key.strip()] = parse(value, f"--set {shown(key.strip())}")
    return found


def locate(options: argparse.Namespace) -> None:
    from ..api import locate
    from ..files import check_file, write_file
    from ..graph.draw import MARK

    for path in filter(None, (options.svg, options.html)):
        check_file(path, MARK)
    found = {name: locate(model, inputs) for name, (model, inputs) in _parts(options).items()}
    for name, branches in found.items():
        for path, text in ((options.svg, branches.svg()), (options.html, branches.html())):
            if path is not None:
                write_file(path if len(found) == 1 else path.with_stem(f"{path.stem}_{name}"), text, MARK)
        if not options.json:
            print(branches)
    if options.json:
        rows = [
            {"name": b.name, "kind": b.kind, "streams": len(b.streams), "macs": b.macs}
            | ({"part": name} if name else {})
            for name, branches in found.items()
            for b in branches
        ]
        print(json.dumps(rows, indent=2))


def apply(options: argparse.Namespace) -> None:
    from ..api import apply
    from ..integrations.diffusers import lazy_denoisers, load_denoiser, load_pipeline
    from ..places import GATES, whole_folder
    from ..storage import save_all
    from ..train.checkpoint import begin, discard
    from ..train.distributed import Group

    recipe, group = _recipe(options), Group.find()
    progress = not options.json
    _not_the_models_own(options)
    # What all processes learn is written by one, which holds the place from before the first of them learns.
    with whole_folder(options.directory, GATES, options.overwrite) if group.main else nullcontext() as folder:
        kept = begin(recipe.train.checkpoint, options.directory, options.resume, group)
        recipe = recipe.with_checkpoint(str(kept))
        made: dict[str, Any]
        if recipe.sampling is None and _is_pipeline(options.model):
            made = dict(lazy_denoisers(apply(load_pipeline(options.model), recipe, progress=progress)))
        else:
            model = load_denoiser(options.model)
            if recipe.sampling is None:
                raise RecipeError(f"{options.recipe} has no sampling section, from which a single model's inputs come")
            made = {"": apply(model, recipe, progress=progress)}
        if folder is not None:
            save_all(made, folder)
    if not group.main:
        return
    if not _recipe(options).train.checkpoint:
        discard(kept)
    reports = {}
    for name, lazy in made.items():
        report = lazy.training_report
        planned = hasattr(lazy, "plan")
        shares = {"share": lazy.plan.share} if planned else {}
        reports[name] = vars(report) if report is not None else shares
        if progress:
            if report is not None:
                print(report)
            place = options.directory if len(made) == 1 else options.directory / name
            print(f"{'plan' if planned else 'gates'} written to {place}")
    if options.json:
        print(json.dumps(next(iter(reports.values())) if len(reports) == 1 else reports))


def _not_the_models_own(options: argparse.Namespace) -> None:
    """Refuse to write into the place of what is read.

    Raises:
        ExportError: names it.
    """
    from ..files import path_of
    from ..places import place_of

    place = place_of(options.directory)
    for what in ("model", "gates"):
        read = getattr(options, what, None)
        if read is not None and place in ((found := path_of(read, f"--{what}").absolute()), *found.parents):
            raise ExportError(f"{options.directory} holds what --{what} names: choose another folder")


def export(options: argparse.Namespace) -> None:
    from ..export.folder import export
    from ..integrations.diffusers import export_folder, load_denoiser
    from ..places import EXPORT, check_place
    from ..storage import load

    _not_the_models_own(options)
    telemetry = True if options.telemetry else None
    if options.gates is None:
        recipe = _recipe(options)
        folder = export_folder(
            options.model, recipe, options.directory, options.format or recipe.export.format, telemetry=telemetry,
            overwrite=options.overwrite, progress=not options.json,
        )  # fmt: skip
    else:
        check_place(options.directory, EXPORT, options.overwrite)
        lazy = load(load_denoiser(options.model), options.gates)
        folder = export(lazy, options.directory, options.format, telemetry=telemetry, overwrite=options.overwrite)
    print(json.dumps({"directory": str(folder)}) if options.json else f"written to {folder}")


def wrap(options: argparse.Namespace) -> None:
    from ..wrap.folder import wrap
    from ..wrap.plans import read_plan

    folder = wrap(
        options.model, read_plan(options.plan), options.directory, timestep_input=options.timestep_input,
        moving=options.moving, streams=options.streams, past_defaults=not options.no_past_defaults,
        overwrite=options.overwrite,
    )  # fmt: skip
    print(json.dumps({"directory": str(folder)}) if options.json else f"written to {folder}")


def plan(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from ..lazy.presets import presets, spread_as
    from ..plan.draw import drawn, priced

    found = presets(options.calibration)
    prices = {}
    for name, preset in found.items():
        times = options.timesteps
        if options.steps is not None:
            times = spread_as(preset.search.calibration, options.steps)
        target = preset.target if options.target is None else options.target
        prices[name] = priced(preset.search.calibration, preset.search.plan(target, times))
    if options.json:
        shown = [
            asdict(price.plan) | {"share": price.plan.share, "relative": price.relative, "even": price.even}
            for price in prices.values()
        ]
        print(json.dumps(shown[0] if len(shown) == 1 else dict(zip(prices, shown, strict=True))))
        return
    for name, price in prices.items():
        if name:
            print(name)
        print(drawn(price))


def verify(options: argparse.Namespace) -> None:
    from ..export.check import verify_all
    from ..wrap.verify import verify_wrapped

    if options.dense is not None:
        compared = verify_wrapped(options.directory, options.dense, inputs=options.inputs)
        rows, other = [vars(c) | {"ok": c.ok} for c in compared], "its dense file gives"
        lines, ok = list(map(str, compared)), all(c.ok for c in compared)
    else:
        reports = verify_all(options.directory)
        rows, other = [vars(r) | {"ok": r.ok, "relative": r.relative} for r in reports], "torch gave"
        lines, ok = list(map(str, reports)), all(r.ok for r in reports)
    print(json.dumps({"ok": ok, "files": rows}) if options.json else "\n".join(lines))
    if not ok:
        raise ExportError(f"{options.directory} does not give what {other}")


def summary(options: argparse.Namespace) -> None:
    from rich.table import Table

    from ..export.card import exports_in, read_card
    from ..report import render

    folders = exports_in(options.directory)
    cards = [read_card(folder) for folder in folders]
    if options.json:
        print(
            json.dumps(
                {"files": [{"directory": str(f)} | card for f, card in zip(folders, cards, strict=True)]}, indent=2
            )
        )
        return
    for folder, card in zip(folders, cards, strict=True):
        if folder != options.directory:
            print(folder.name)
        if "plan" in card:
            calls = len(card["plan"]["timesteps"])
            print(f"{card['format']}, {card['model']} wrapped: {card['share']:.1%} of {calls} calls computed")
            continue
        table = Table(
            title=f"{card['format']}, {len(card['branches'])} branches, {card['dense_macs'] / 1e6:.1f} MMACs a sample"
        )
        for header in ("branch", "kind", "MMACs"):
            table.add_column(header)
        for branch in card["branches"]:
            table.add_row(branch["name"], branch["kind"], f"{branch['macs'] / 1e6:.3f}")
        print(render(table))
        print(f"expected: {card['expected_macs_ratio']:.1%} of the branch MACs computed")


def recipes(options: argparse.Namespace) -> None:
    from ..recipe_loading import load_recipe, shipped_recipes
    from ..recipe_reference import reference

    if options.reference:
        print(reference())
    elif options.name:
        recipe = load_recipe(options.name)
        print(json.dumps(recipe.model_dump(mode="json"), indent=2) if options.json else recipe.to_yaml(), end="")
    elif options.json:
        print(json.dumps(shipped_recipes(), indent=2))
    else:
        for name, line in shipped_recipes().items():
            print(f"{name:24} {line}")


def demo(options: argparse.Namespace) -> None:
    from ..integrations.emoji.demo import run_demo

    rows = run_demo(options.directory, options.images, overwrite=options.overwrite)
    if options.json:
        print(json.dumps([vars(row) for row in rows]))
