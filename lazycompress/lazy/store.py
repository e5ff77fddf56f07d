"""A plan on disk: `plan.json`, plain JSON, and the calibration that it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from .. import __version__
from ..errors import ExportError, LazyCompressError
from ..graph.capture import take_apart
from ..plan.calibration import load_calibration, save_calibration
from ..plan.plan import Plan
from ..recipe import Recipe
from ..storage import describe_call, made_up, whole_folder
from .calls import Reader
from .engine import Engine
from .learn import Search

PLAN_FILE = "plan.json"

#: Beside it, what plans for other budgets and timesteps are made from.
CALIBRATION_FOLDER = "calibration"


class Planned(Protocol):
    """What is saved: a handle, or a lazy module."""

    engine: Engine
    recipe: Any
    example: tuple[Sequence[Any], Mapping[str, Any]] | None


@dataclass(frozen=True)
class Loaded:
    """What a folder gave: the engine, the recipe, and one call like those at learning."""

    engine: Engine
    recipe: Recipe | None
    example: tuple[Sequence[Any], Mapping[str, Any]] | None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lazycompress: str
    timesteps: list[float]
    computes: list[bool]
    order: int
    streams: list[int]
    target: float
    timestep_input: str
    moving: list[str]
    known: list[str] | None
    recipe: dict[str, Any] | None
    example: dict[str, Any] | None


def save_plan(lazy: Planned, directory: str | Path, module: nn.Module | None = None) -> Path:
    """Write the plan of a lazy module; the module's own weights are not written.

    Raises:
        ExportError: the folder cannot be written.
    """
    engine, dense = lazy.engine, module if module is not None else getattr(lazy, "module", getattr(lazy, "model", None))
    example = None
    if lazy.example is not None and dense is not None:
        try:
            example = describe_call(take_apart(dense, *lazy.example))
        except LazyCompressError:  # calls that no graph can be made for
            example = None
    recipe = lazy.recipe
    file = _File(
        lazycompress=__version__,
        timesteps=list(engine.plan.timesteps),
        computes=list(engine.plan.computes),
        order=engine.plan.order,
        streams=list(engine.plan.streams),
        target=engine.target,
        timestep_input=engine.reader.timestep,
        moving=sorted(engine.reader.moving),
        known=None if engine.reader.known is None else sorted(engine.reader.known),
        # But for a folder of the machine that learned.
        recipe=None if recipe is None else recipe.with_checkpoint("").model_dump(mode="json"),
        example=example,
    )
    with whole_folder(Path(directory)) as folder:
        text = json.dumps(file.model_dump(mode="json"), indent=2)
        (folder / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
        if isinstance(engine.planner, Search):
            save_calibration(engine.planner.calibration, folder / CALIBRATION_FOLDER)
    return Path(directory)


def load_plan(module: nn.Module, directory: str | Path) -> Loaded:
    """The engine that follows the plan of a folder for the calls of a module.

    Raises:
        ExportError: the folder holds no plan, or a broken one.
    """
    path = Path(directory) / PLAN_FILE
    try:
        file = _File.model_validate_json(path.read_text(encoding="utf-8"))
        plan = Plan(tuple(file.timesteps), tuple(file.computes), file.order, tuple(file.streams))
        recipe = None if file.recipe is None else Recipe.model_validate(file.recipe)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror or error}; lazycompress.save writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ExportError(f"{path} is no plan: {where}: {first['msg'].lower()}; save the lazy model again") from None
    except (UnicodeDecodeError, LazyCompressError) as error:
        raise ExportError(f"{path} is no plan: {error}; save the lazy model again") from None
    reader = Reader.of(module, file.timestep_input)
    known = None if file.known is None else frozenset(file.known)
    reader = Reader(reader.model, reader.names, reader.timestep, frozenset(file.moving), known)
    planner = None
    if (Path(directory) / CALIBRATION_FOLDER).is_dir():
        own = recipe or Recipe()
        planner = Search(load_calibration(Path(directory) / CALIBRATION_FOLDER), own.forecast, own.guards)
    example = None if file.example is None else ((), made_up(module, file.example))
    return Loaded(Engine(reader, plan, planner, file.target), recipe, example)
