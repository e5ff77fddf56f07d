"""`lazycompress.json`: what an export folder says about itself, and what runners make of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..errors import ExportError, InputError
from ..files import checked, kind_of, path_of, read_object, sha256_of
from ..gates_file import FileEntry, Finite
from ..recipe import FormatName

CARD_FILE = "lazycompress.json"

#: What a file keeps between calls has fewer values than this, for one sample.
_LARGEST_STATE = 2**33

#: What decides: each sample of a batch for itself, or the batch as one.
Granularity = Literal["sample", "batch"]

#: How float32 weights are stored.
Weights = Literal["f32", "f16", "bf16"]

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=0, le=2**60)]

#: A file's size alone is what version 0.1 wrote.
Files = dict[Annotated[str, Field(min_length=1, max_length=4000)], FileEntry | Count]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StateEntry(_Section):
    """One tensor that a file keeps from call to call: -1 is the batch, -2 a size that changes with those of the inputs."""

    name: Name
    shape: list[Annotated[int, Field(ge=-2, le=2**31)]] = Field(max_length=16)
    dtype: Literal["float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"]
    fill: Finite
    scale: int = Field(ge=1, le=2**20)

    @model_validator(mode="after")
    def _sizes(self) -> StateEntry:
        if 0 in self.shape or math.prod(max(size, 1) for size in self.shape) * self.scale > _LARGEST_STATE:
            raise ValueError(f"no state has the shape {self.shape}, scale {self.scale}")
        return self


class BranchEntry(_Section):
    """A branch of the file."""

    name: Name
    kind: Name
    macs: Count


class Parity(_Section):
    """How the file compared with torch when it was exported; see `check.Report`."""

    difference: Finite
    largest: Finite
    tolerance: float = Field(gt=0.0, le=0.5)
    flipped: Count | None


class _Card(_Section):
    lazycompress: str = Field(max_length=100)
    format: FormatName
    files: Files = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names(self) -> _Card:
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
                raise ValueError(f"files: {name[:80]!r} is not in the folder")
        return self


class PipelineCard(_Card):
    """The card of a whole pipeline."""

    pipeline: Name
    denoisers: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,200}$")]] = Field(min_length=1, max_length=100)
    loader: Literal["optimum.intel.OVDiffusionPipeline", "lazycompress.integrations.diffusers.load_exported", "its own"]


class WrappedCard(_Card):
    """The card of one denoiser's file that was wrapped; see `wrap`."""

    model: Name
    plan: dict[str, Any]
    share: float = Field(gt=0.0, le=1.0)
    streams: int = Field(ge=1, le=2**16)
    timestep: Name
    latents: Name
    conditions: list[Name] = Field(max_length=1000)
    moving: list[Name] = Field(max_length=1000)
    outputs: list[Name] = Field(min_length=1, max_length=1000)
    clock: Any
    versions: dict[str, str | None]
    parity: Parity | None = None


class FileCard(_Card):
    """The card of one model's file."""

    stateful: bool
    telemetry: bool
    weights: Weights
    decide: Granularity
    stages: list[Name]
    versions: dict[str, str | None]
    recipe: dict[str, Any] | None
    inputs: list[Name] = Field(min_length=1, max_length=1000)
    outputs: list[Name] = Field(min_length=1, max_length=1000)
    timestep: Name
    latents: Name
    state: list[StateEntry] = Field(max_length=100_000)
    branches: list[BranchEntry] = Field(min_length=1, max_length=100_000)
    dense_macs: Count
    threshold: Finite
    grid: list[Finite] = Field(min_length=1, max_length=100_000)
    expected_macs_ratio: float = Field(ge=0.0, le=1.0 + 1e-6)
    opset: int | None = None
    ir: int | None = None
    parity: Parity | None = None

    @model_validator(mode="after")
    def _inputs(self) -> FileCard:
        for key, name in (("timestep", self.timestep), ("latents", self.latents)):
            if name not in self.inputs:
                raise ValueError(f"{key} is {name[:80]!r}, which is none of the inputs {', '.join(self.inputs)[:200]}")
        return self


def read_card(directory: str | Path) -> dict[str, Any]:
    """`lazycompress.json` of an export: that of one model's file, or of a pipeline (with the key `denoisers`).

    Raises:
        ExportError: the folder has none, or one that no export wrote: names the key that is wrong.
    """
    folder = path_of(directory)
    path = folder / CARD_FILE
    if not kind_of(path):
        raise ExportError(f"{directory} is no export of lazycompress: {CARD_FILE} is missing")
    card = read_object(path)
    if not {"denoisers", "branches", "plan"} & card.keys():
        raise ExportError(
            f"{path} says nothing of branches, a plan or denoisers: it is not what an export writes; export again"
        )
    kinds: dict[str, type[_Card]] = {"denoisers": PipelineCard, "plan": WrappedCard, "branches": FileCard}
    model = next(kind for key, kind in kinds.items() if key in card)
    return checked(card, model, path).model_dump(exclude_unset=True)


def check_files(directory: Path, card: dict[str, Any]) -> None:
    """Whether the files of an export are those that were written: sizes and hashes.

    Raises:
        ExportError: one is missing, or another one.
    """
    for name, entry in card.get("files", {}).items():
        path = directory / name
        size = entry if isinstance(entry, int) else entry["size"]
        is_file = kind_of(path) == "file"
        if not is_file or path.stat().st_size != size:
            there = f"{path.stat().st_size} bytes" if is_file else "nothing"
            raise ExportError(f"{path} should be {size} bytes, there is {there}: export again")
        if not isinstance(entry, int) and sha256_of(path) != entry["sha256"]:
            raise ExportError(f"{path} was changed since it was exported (its sha256 is another one): export again")


def need_ports(directory: str | Path, ports: Iterable[str], card: dict[str, Any]) -> None:
    """Whether the card is that of a file with these inputs.

    Raises:
        ExportError: names what the card does not.
    """
    taken = set(ports)
    told = {*card["inputs"], *(entry["name"] for entry in card["state"])}
    unknown = sorted(taken - told)
    if unknown:
        raise ExportError(
            f"{Path(directory) / CARD_FILE} is of another file: it does not name the input {unknown[0]!r}"
        )
    for key in ("latents", *(["timestep"] if card["telemetry"] else [])):
        if card[key] not in taken:
            raise ExportError(f"{Path(directory) / CARD_FILE}: {key} is {card[key]!r}, which the file does not take")


def exports_in(directory: str | Path) -> list[Path]:
    """The folders of an export's files: its own, or those of the denoisers of a pipeline.

    Raises:
        ExportError: the folder is no export.
    """
    folder = Path(directory)
    names = read_card(folder).get("denoisers")
    return [folder] if names is None else [folder / name for name in names]


def tensors_of(inputs: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    """The named inputs as tensors; numpy arrays are taken too.

    Raises:
        InputError: one is missing.
    """
    found = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items() if k in names}
    missing = [name for name in names if not isinstance(found.get(name), Tensor)]
    if missing:
        raise InputError(f"the exported model needs the tensors {', '.join(names)}; missing: {', '.join(missing)}")
    return found


def need_sizes(inputs: dict[str, Tensor], sizes: dict[str, list[int | None]]) -> None:
    """Refuse what a file was not made for: some runtimes give an empty result in place of an error.

    Args:
        inputs: of one call.
        sizes: of the file's inputs; None where any will do.

    Raises:
        InputError: an input has other sizes.
    """
    for name, tensor in inputs.items():
        wanted = sizes[name]
        given = list(tensor.shape)
        fits = len(given) == len(wanted) and all(w in (None, g) for w, g in zip(wanted, given, strict=True))
        if not fits:
            shown = ", ".join("any" if size is None else str(size) for size in wanted)
            raise InputError(
                f"input {name}: the dimensions {given} are not the file's [{shown}]; export the model with an example of them"
            )


def fresh_state(entry: dict[str, Any], batch: int) -> np.ndarray[Any, Any]:
    """One entry of the card's "state" before the first step of an image, for a batch of that size.

    Its sizes that change with those of the inputs (-2) are 1: the file takes any, and uses none of it.
    """
    shape = [batch * entry["scale"] if size == -1 else max(size, 1) for size in entry["shape"]]
    return np.full(shape, entry["fill"], dtype=entry["dtype"])


@dataclass(frozen=True)
class FileBranch:
    """What an export's description says about a branch."""

    name: str
    kind: str
    macs: int


class Output(dict[str, Tensor]):
    """Outputs by name, as attributes, and by position."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the exported model has no output {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key: str | int) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)
