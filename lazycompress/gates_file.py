"""What `gates.json` and `gates.safetensors` may hold: checked, value by value, before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from .encoding import EncodingError, Zeros, decode, encode, outline
from .errors import ExportError
from .files import TensorEntry, checked, kind_of, read_json, read_tensors, tensor_entries
from .gates import Gates
from .graph.call import Call
from .recipe import GateName, Recipe
from .recipe_loading import load_recipe

GATES_FILE = "gates.safetensors"
DESCRIPTION_FILE = "gates.json"

#: More than any model has: of branches, channels of a branch, and points of a grid.
BRANCHES, WIDEST, POINTS = 10_000, 2**20, 100_000

#: Bytes that gates may take.
_LARGEST = 8 * 2**30

Finite = Annotated[float, Field(allow_inf_nan=False)]


class FileEntry(BaseModel):
    """Size and hash of a file beside a marker."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: int = Field(ge=0, le=2**60)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BranchEntry(BaseModel):
    """A branch that the gates are for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1, max_length=1000)
    kind: str = Field(max_length=100)
    macs: int = Field(ge=0, le=2**60)
    width: int = Field(ge=1, le=WIDEST)


class GatesCard(BaseModel):
    """`gates.json`. Version 0.1 wrote neither model nor weights nor files."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    lazycompress: str = Field(max_length=100)
    model: str = Field("", max_length=200)
    weights: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    dtype: str = Field("", max_length=40)
    recipe: dict[str, Any] | None
    direction: int
    timestep_input: str | None = Field(max_length=1000)
    moving: list[Annotated[str, Field(max_length=1000)]] = Field(default_factory=list, max_length=1000)
    gate: GateName = "linear"
    holds: bool = False
    branches: list[BranchEntry] = Field(min_length=1, max_length=BRANCHES)
    grid: list[Finite] = Field(min_length=1, max_length=POINTS)
    targets: list[Finite] = Field(max_length=POINTS)
    example: Any
    files: dict[str, FileEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sizes(self) -> GatesCard:
        if self.direction not in (1, -1):
            raise ValueError(f"direction is 1 or -1; there was {self.direction}")
        if sum(b.width + 3 for b in self.branches) * len(self.grid) * 4 > _LARGEST:
            raise ValueError(f"gates of more than {_LARGEST} bytes")
        return self


def read_recipe(recipe: Mapping[str, Any] | None, where: Path) -> Recipe | None:
    """The recipe that a file says was learned with.

    Raises:
        ExportError: it is none.
    """
    if recipe is None:
        return None
    try:
        return load_recipe(recipe)
    except Exception as error:  # whatever a recipe may be refused for, it is this file's fault
        raise ExportError(f"{where}: recipe: {' '.join(str(error).split())[:300]}") from None


def read_gates_card(folder: Path) -> GatesCard:
    """`gates.json` of a folder.

    Raises:
        ExportError: the folder holds no gates, those of several models, or a file is at fault.
    """
    path = folder / DESCRIPTION_FILE
    found = read_json(path) if kind_of(path) == "file" else None
    if isinstance(found, dict) and isinstance(found.get("denoisers"), list):
        inner = ", ".join(str(folder / str(name)[:100]) for name in found["denoisers"][:8])
        raise ExportError(f"{folder} holds gates of several models, in folders of their own: load {inner}")
    for name in (GATES_FILE, DESCRIPTION_FILE):
        if kind_of(folder / name) != "file":
            raise ExportError(f"{folder} holds no gates: {name} is missing; lazycompress.save writes it")
    return checked(found, GatesCard, path)


def read_gates(folder: Path, card: GatesCard) -> Gates:
    """The gates of a folder whose `gates.json` has been read.

    Raises:
        ExportError: a tensor is missing, too many, of another shape or dtype, or holds what no gate has.
    """
    path = folder / GATES_FILE
    _check_entries(tensor_entries(path), card, path)
    tensors = read_tensors(path)
    _check_values(tensors, card, path)
    gates = Gates([b.name for b in card.branches], [b.width for b in card.branches], tensors["grid"], card.direction)
    gates.frontier = torch.zeros_like(tensors["frontier"])
    gates.load_state_dict({"fitted": gates.fitted, **tensors})
    gates.kind, gates.holds = card.gate, card.holds
    return gates


def decoded_example(node: Any, where: Path, tensor: Callable[[Any], Tensor]) -> dict[str, Any] | None:
    """The keyword arguments of the call that a file keeps an example of, or None if it keeps none.

    Args:
        node: what the file says of it; see `encoded_example`.
        where: its path.
        tensor: makes a tensor of its outline.

    Raises:
        ExportError: the file holds no such call.
    """
    if node is None:
        return None
    try:
        value = decode(_of_version_0_1(node) if isinstance(node, dict) and "spec" in node else node, tensor)
    except EncodingError as error:
        raise ExportError(f"{where}: example: {error}") from None
    except RecursionError:
        raise ExportError(f"{where}: example: nested too deeply") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ExportError(f"{where}: example: no dictionary of arguments; pass example_inputs")
    return value


def encoded_example(call: Call) -> Any:
    """A call for a file; None where it holds something that a file cannot: loading then needs `example_inputs`."""
    try:
        found = encode(call.arguments(call.tensors), outline)
        decode(found, Zeros(torch.device("meta")))  # within the limits of what is read
    except EncodingError:
        return None
    return found


def _check_entries(found: Mapping[str, TensorEntry], card: GatesCard, path: Path) -> None:
    branches, points = len(card.branches), len(card.grid)
    wanted: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "grid": ("F32", (points,)),
        "bias": ("F32", (branches, points)),
        "rank": ("F32", (branches, points)),
        "frontier": ("BOOL", (None, branches, points)),
        **dict.fromkeys(("threshold", "direction", "slope", "phase"), ("F32", ())),
        **dict.fromkeys(("order", "static", "longest"), ("I64", ())),
        **{f"weights.{k}": ("F32", (points, branch.width)) for k, branch in enumerate(card.branches)},
    }
    if "fitted" in found:  # only where forecasts are
        wanted["fitted"] = ("F32", (points, 5))
    for name, (dtype, shape) in wanted.items():
        if name not in found:
            raise ExportError(f"{path}: the tensor {name!r} is missing; there are {', '.join(sorted(found))[:200]}")
        entry = found[name]
        fits = len(entry.shape) == len(shape) and all(w in (None, n) for w, n in zip(shape, entry.shape, strict=True))
        if entry.dtype != dtype or not fits:
            shown = ["any" if size is None else size for size in shape]
            raise ExportError(
                f"{path}: the tensor {name!r} is {entry.dtype} {list(entry.shape)}; by {DESCRIPTION_FILE} it is {dtype} {shown}"
            )
        if name == "frontier" and entry.shape[0] > POINTS:
            raise ExportError(f"{path}: {entry.shape[0]} schedules in 'frontier'")
    unknown = sorted(set(found) - set(wanted))
    if unknown:
        raise ExportError(f"{path}: unknown tensor {unknown[0][:100]!r}")


def _check_values(tensors: Mapping[str, Tensor], card: GatesCard, path: Path) -> None:
    for name, value in tensors.items():
        bad = value.isnan() if name == "rank" else ~value.isfinite() if value.is_floating_point() else None
        if bad is not None and bad.any():
            raise ExportError(f"{path}: {name!r} holds NaN{'' if name == 'rank' else ' or infinity'}")
    grid = tensors["grid"]
    if bool((grid[1:] <= grid[:-1]).any()):
        raise ExportError(f"{path}: the timesteps in 'grid' do not rise")
    if not all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) for a, b in zip(grid.tolist(), card.grid, strict=True)):
        raise ExportError(f"{path}: 'grid' has other timesteps than {DESCRIPTION_FILE}")
    for name, lowest, highest in (
        ("order", 0, 2),
        ("static", 0, 1),
        ("longest", 1, 2**31),
        ("slope", 0, 1e6),
        ("phase", 0, 1e30),
        ("direction", card.direction, card.direction),
    ):
        number = float(tensors[name])
        if not lowest <= number <= highest:
            span = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
            raise ExportError(f"{path}: {name!r} is {number:g}; it may be {span}")


def _of_version_0_1(example: dict[str, Any]) -> Any:
    """What version 0.1 wrote, a structure in torch's own words beside a list of tensors, in the form that is written now.

    Raises:
        EncodingError: it names a structure other than dict, list and tuple, or does not hold together.
    """
    from .old_gates import structure

    return structure(example)
