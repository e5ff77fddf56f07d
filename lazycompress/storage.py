"""Gates on disk: `gates.safetensors` with the numbers, `gates.json` with what they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .encoding import EncodingError, Zeros, decode, encode, outline
from .errors import ExportError, InputError, LazyCompressError
from .files import path_of, write_tensors
from .gates_file import (
    DESCRIPTION_FILE,
    GATES_FILE,
    GatesCard,
    decoded_example,
    example_of,
    read_gates,
    read_gates_card,
)
from .graph.capture import Call, ExampleInputs, call_of, take_apart
from .places import GATES, place_of, seal, whole_folder
from .runtime import LazyModel
from .weights import dtype_of, weights_hash

_Lazy = TypeVar("_Lazy", bound=LazyModel)


def save(lazy: LazyModel, directory: str | Path, *, overwrite: bool | None = None) -> Path:
    """Write the gates of a lazy model; the model's own weights are not written.

    Args:
        lazy: the model.
        directory: where to: a folder that is free or empty, or that holds gates. Anything else is left alone.
        overwrite: what happens to gates that are there: True replaces them, False never does; None does if they are of this
            kind of model, with these branches, so that a loop can save again and again.

    Returns:
        The folder.

    Raises:
        ExportError: the folder is not ours to replace, or cannot be written; or the gates hold NaN.
        InputError: the model is not lazy.
    """
    _need_finite(lazy)
    place = place_of(directory)
    replaces = _is_of(lazy, place) if overwrite is None else overwrite
    with whole_folder(place, GATES, replaces) as folder:
        write_gates(lazy, folder)
    return Path(directory)


def save_all(models: Mapping[str, LazyModel], folder: Path) -> None:
    """Write the gates of the denoisers of one pipeline into a new folder: of several, each into a folder of its name."""
    for lazy in models.values():
        _need_finite(lazy)
    if len(models) == 1:
        write_gates(next(iter(models.values())), folder)
        return
    for name, lazy in models.items():
        (folder / name).mkdir()
        write_gates(lazy, folder / name)
    seal(folder, GATES, {"denoisers": list(models)})


def write_gates(lazy: LazyModel, folder: Path) -> None:
    """Write the gates' files into a folder that is there."""
    description = {
        "model": type(lazy.model).__name__,
        "weights": weights_hash(lazy.model),
        "dtype": dtype_of(lazy.model),
        # But for a folder of the machine that trained.
        "recipe": None if lazy.recipe is None else lazy.recipe.with_checkpoint("").model_dump(mode="json"),
        "direction": int(lazy.gates.direction),
        "timestep_input": lazy.timestep_input,
        "branches": [{"name": b.name, "kind": b.kind, "macs": b.macs, "width": b.width} for b in lazy.branches],
        "grid": lazy.gates.grid.tolist(),
        "targets": frontier_of(lazy),
        "example": _example(lazy.example),
    }
    write_tensors(lazy.gates.state_dict(), folder / GATES_FILE)
    seal(folder, GATES, description)


def frontier_of(lazy: LazyModel) -> list[float]:
    """Computed shares of the branches' MACs of the schedules that training left, the recipe's own first."""
    macs = torch.tensor([float(branch.macs) for branch in lazy.branches], dtype=torch.float64)
    share = (macs / macs.sum()).unsqueeze(1)
    return [1.0 - float((share * schedule.cpu()).sum(dim=0).mean()) for schedule in lazy.gates.frontier]


def load(
    model: nn.Module,
    directory: str | Path,
    *,
    example_inputs: ExampleInputs | None = None,
    kind: type[_Lazy] = LazyModel,  # type: ignore[assignment]
    strict: bool = True,
) -> _Lazy:
    """A lazy model from a dense one and the folder that `save` wrote.

    Args:
        model: the model that the gates were trained for; it is left as it is.
        directory: where the gates are.
        example_inputs: arguments of one call; left out, tensors like those at training are made up.
        kind: the class to make.
        strict: refuse a model of another class, or with other weights, than the one that the gates were learned for. Gates
            that version 0.1 wrote do not tell.

    Raises:
        ExportError: the folder holds no gates, or those of another model; one line says what is wrong, and where.
        LazyCompressError: the gates do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"gates are loaded for an nn.Module; there was {type(model).__name__}")
    folder = path_of(directory)
    card = read_gates_card(folder)
    where = folder / DESCRIPTION_FILE
    recipe = card.read_recipe(where)
    gates = read_gates(folder, card)
    if strict:
        _need_same(model, card, folder)
    if example_inputs is not None:
        call = call_of(model, example_inputs)
    else:
        arguments = decoded_example(card, where, Zeros(_device_of(model)))
        if arguments is None:
            raise ExportError(f"{where} keeps no example of a call: pass example_inputs")
        call = take_apart(model, (), arguments)
    try:
        lazy = kind(model, call, gates, timestep_input=card.timestep_input)
    except LazyCompressError:
        raise
    except Exception as error:  # the model's own code, called with what the file says
        said = " ".join(str(error).split())[:300]
        raise ExportError(f"{where}: {type(model).__name__} does not run on the example call: {said}") from error
    lazy.recipe = recipe
    return lazy


def _need_same(model: nn.Module, card: GatesCard, folder: Path) -> None:
    name = type(getattr(model, "_orig_mod", model)).__name__
    how = "strict=False takes them all the same"
    if card.model and card.model != name:
        raise ExportError(f"the gates in {folder} are of a {card.model}; this is a {name}: {how}")
    if card.weights and (found := weights_hash(model)) and found != card.weights:
        dtype = dtype_of(model)
        then = f"in {card.dtype}; these are in {dtype}" if dtype != card.dtype else "with other values, names or shapes"
        raise ExportError(f"the gates in {folder} were learned on other weights of {name}, {then}: {how}")


def _is_of(lazy: LazyModel, place: Path) -> bool:
    """Whether a folder holds gates of this kind of model, with these branches."""
    try:
        card = read_gates_card(place)
    except LazyCompressError:
        return False
    same_model = card.model in ("", type(lazy.model).__name__)
    return same_model and [branch.name for branch in card.branches] == [branch.name for branch in lazy.branches]


def _need_finite(lazy: LazyModel) -> None:
    if not isinstance(lazy, LazyModel):
        raise InputError(f"only a lazy model has gates: call lazycompress.apply first; there was {type(lazy).__name__}")
    for name, value in lazy.gates.state_dict().items():
        if value.is_floating_point() and bool(value.isnan().any() if name == "rank" else (~value.isfinite()).any()):
            raise ExportError(f"the gates' {name} holds NaN or infinity: they were not learned; nothing was written")


def _example(call: Call) -> Any:
    """The call for `gates.json`; None where it holds something that a file cannot: loading then needs `example_inputs`."""
    try:
        found = encode(example_of(call), outline)
        decode(found, Zeros(torch.device("meta")))  # within the limits of what is read
    except EncodingError:
        return None
    return found


def _device_of(model: nn.Module) -> torch.device:
    for value in (*model.parameters(), *model.buffers()):
        return value.device
    return torch.device("cpu")


__all__ = ["DESCRIPTION_FILE", "GATES_FILE", "load", "save", "save_all", "write_gates"]
