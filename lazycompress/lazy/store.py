"""A plan on disk: `plan.json`, plain JSON, and the calibration that it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from torch import nn

from ..encoding import Zeros
from ..errors import ExportError, LazyCompressError
from ..files import checked, kind_of, read_json
from ..gates_file import FileEntry, Finite, decoded_example, encoded_example, read_recipe
from ..graph.call import take_apart
from ..places import GATES, seal
from ..plan.calibration import load_calibration, save_calibration
from ..plan.forecasts import Order
from ..plan.plan import Plan
from ..recipe import Recipe
from ..weights import device_of, dtype_of, need_same, weights_hash
from .calls import Reader
from .engine import Engine
from .learn import Search

PLAN_FILE = "plan.json"

#: Beside it, what plans for other budgets and timesteps are made from.
CALIBRATION_FOLDER = "calibration"

#: More calls than any run of a sampler makes.
CALLS = 100_000

_Name = Annotated[str, Field(max_length=1000)]
_Times = Annotated[list[Finite], Field(min_length=1, max_length=CALLS)]
_Streams = Annotated[list[Annotated[int, Field(ge=0, le=64)]], Field(max_length=CALLS)]

#: Of the forecasts, call by call.
Weights = list[Annotated[list[Finite], Field(max_length=64)]]


def _order(value: Any) -> Order:
    if type(value) not in (int, str) or len(str(value)) > 200:
        raise ValueError("order is 0, 1 or 2, or the name of a forecast")
    found: Order = value
    return found


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
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    lazycompress: str = Field(max_length=100)
    model: str = Field(max_length=200)
    weights: str = Field(pattern=r"^([0-9a-f]{64})?$")
    dtype: str = Field(max_length=40)
    timesteps: _Times
    computes: list[bool] = Field(max_length=CALLS)
    order: Annotated[Order, PlainValidator(_order)]
    streams: _Streams
    fitted: Weights = Field(default_factory=list, max_length=CALLS)
    target: Finite = Field(gt=0.0, le=1.0)
    timestep_input: _Name
    moving: list[_Name] = Field(max_length=1000)
    known: list[_Name] | None = Field(max_length=1000)
    recipe: dict[str, Any] | None
    example: Any
    files: dict[str, FileEntry]


def write_plan(lazy: Planned, folder: Path) -> None:
    """Write the plan of a lazy module into a folder that is there; the module's own weights are not written."""
    engine, dense = lazy.engine, _module(lazy)
    example = None
    if lazy.example is not None:
        try:
            example = encoded_example(take_apart(dense, *lazy.example))
        except LazyCompressError:  # calls that no graph can be made for
            example = None
    about = {
        "model": type(dense).__name__,
        "weights": weights_hash(dense),
        "dtype": dtype_of(dense),
        "timesteps": list(engine.plan.timesteps),
        "computes": list(engine.plan.computes),
        "order": engine.plan.order,
        "streams": list(engine.plan.streams),
        "fitted": [list(weights) for weights in engine.plan.fitted],
        "target": engine.target,
        "timestep_input": engine.reader.timestep,
        "moving": sorted(engine.reader.moving),
        "known": None if engine.reader.known is None else sorted(engine.reader.known),
        # But for a folder of the machine that learned.
        "recipe": None if lazy.recipe is None else lazy.recipe.with_checkpoint("").model_dump(mode="json"),
        "example": example,
    }
    if isinstance(engine.planner, Search):
        save_calibration(engine.planner.calibration, folder / CALIBRATION_FOLDER)
    seal(folder, GATES, about, PLAN_FILE)


def is_plan_of(lazy: Planned, folder: Path) -> bool:
    """Whether a folder holds a plan that was learned with this kind of model."""
    try:
        return _read(folder).model == type(_module(lazy)).__name__
    except LazyCompressError:
        return False


def load_plan(module: nn.Module, folder: Path, *, strict: bool = True) -> Loaded:
    """The engine that follows the plan of a folder for the calls of a module.

    Args:
        module: the one that was learned with.
        folder: what `write_plan` wrote.
        strict: refuse a plan of another class or of other weights.

    Raises:
        ExportError: the folder holds no plan, a broken one, or one of another model.
    """
    path = folder / PLAN_FILE
    file = _read(folder)
    if strict:
        need_same(module, file.model, file.weights, file.dtype, f"the decisions in {folder}")
    recipe = read_recipe(file.recipe, path)
    try:
        plan = Plan(
            tuple(file.timesteps),
            tuple(file.computes),
            file.order,
            tuple(file.streams),
            tuple(map(tuple, file.fitted)),
        )
        planner = None
        if kind_of(folder / CALIBRATION_FOLDER) == "folder":
            own = recipe or Recipe()
            learned = plan if not own.goal and file.target == own.targets[0] else None  # else it was moved since
            planner = Search(load_calibration(folder / CALIBRATION_FOLDER), own.forecast, own.guards, learned)
        reader = Reader.of(module, file.timestep_input)
    except LazyCompressError as error:
        raise ExportError(f"{path}: {error}") from None
    known = None if file.known is None else frozenset(file.known)
    reader = Reader(reader.model, reader.names, reader.timestep, frozenset(file.moving), known)
    arguments = decoded_example(file.example, path, Zeros(device_of(module)))
    example = None if arguments is None else ((), arguments)
    return Loaded(Engine(reader, plan, planner, file.target), recipe, example)


def read_settings(folder: Path) -> tuple[float, Recipe]:
    """The target and the recipe that a folder's plan was learned with.

    Raises:
        ExportError: the folder holds no plan, or a broken one.
    """
    file = _read(folder)
    return file.target, read_recipe(file.recipe, folder / PLAN_FILE) or Recipe()


def _read(folder: Path) -> _File:
    path = folder / PLAN_FILE
    return checked(read_json(path), _File, path)


def _module(lazy: Planned) -> nn.Module:
    """The user's own module: a handle stands before it, a lazy module has it inside."""
    found = getattr(lazy, "module", None)
    module: nn.Module = found if isinstance(found, nn.Module) else lazy.model  # type: ignore[attr-defined]
    return module
