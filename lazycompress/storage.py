"""What was learned, on disk: `gates.safetensors` and `gates.json` of a lazy graph, or `plan.json` of a lazy module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .encoding import Zeros
from .errors import ExportError, InputError, LazyCompressError
from .files import kind_of, path_of, write_tensors
from .gates_file import (
    DESCRIPTION_FILE,
    GATES_FILE,
    decoded_example,
    encoded_example,
    read_gates,
    read_gates_card,
    read_recipe,
)
from .graph.call import ExampleInputs, call_of, take_apart
from .lazy.attach import Handle
from .lazy.convert import lazy_of
from .lazy.model import LazyModule
from .lazy.store import PLAN_FILE, is_plan_of, load_plan, write_plan
from .places import GATES, place_of, seal, whole_folder
from .runtime import LazyModel
from .weights import device_of, dtype_of, need_same, weights_hash

_Lazy = TypeVar("_Lazy", bound=LazyModel)

#: What can be saved.
Learned = LazyModel | LazyModule | Handle


def save(lazy: Learned | nn.Module, directory: str | Path, *, overwrite: bool | None = None) -> Path:
    """`lazycompress.save` of one model, or of a lazy pipeline's own denoiser."""
    return save_parts({"": lazy}, directory, overwrite=overwrite)


def save_parts(
    models: Mapping[str, Learned | nn.Module], directory: str | Path, *, overwrite: bool | None = None
) -> Path:
    """The same of the denoisers of one pipeline: of several, each into a folder of its name."""
    parts = {name: lazy_of(model) for name, model in models.items()}
    for lazy in parts.values():
        _need_finite(lazy)
    place = place_of(directory)
    if overwrite is None:
        overwrite = all(_is_of(lazy, place / name if len(parts) > 1 else place) for name, lazy in parts.items())
    with whole_folder(place, GATES, overwrite) as folder:
        save_all(parts, folder)
    return Path(directory)


def save_all(models: Mapping[str, Learned], folder: Path) -> None:
    """Write what the denoisers of one pipeline learned into a new folder: of several, each into a folder of its name."""
    for lazy in models.values():
        _need_finite(lazy)
    if len(models) == 1:
        _write(next(iter(models.values())), folder)
        return
    for name, lazy in models.items():
        (folder / name).mkdir()
        _write(lazy, folder / name)
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
        "moving": sorted(lazy.moving),
        "gate": lazy.gates.kind,
        "holds": lazy.gates.holds,
        "branches": [{"name": b.name, "kind": b.kind, "macs": b.macs, "width": b.width} for b in lazy.branches],
        "grid": lazy.gates.grid.tolist(),
        "targets": frontier_of(lazy),
        "example": encoded_example(lazy.example),
    }
    tensors = lazy.gates.state_dict()
    if not lazy.gates.fits:
        del tensors["fitted"]
    write_tensors(tensors, folder / GATES_FILE)
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
) -> _Lazy | LazyModule:
    """`lazycompress.load` for one model; `kind` is the class to make where the folder holds gates."""
    if not isinstance(model, nn.Module):
        raise InputError(f"gates are loaded for an nn.Module; there was {type(model).__name__}")
    folder = path_of(directory)
    if kind_of(folder / PLAN_FILE) == "file":
        loaded = load_plan(model, folder, strict=strict)
        module = LazyModule(model, loaded.engine)
        module.recipe, module.example = loaded.recipe, loaded.example
        if example_inputs is not None:
            module.example = ((), example_inputs) if isinstance(example_inputs, Mapping) else (example_inputs, {})
        return module
    card = read_gates_card(folder)
    where = folder / DESCRIPTION_FILE
    recipe = read_recipe(card.recipe, where)
    gates = read_gates(folder, card)
    if strict:
        need_same(model, card.model, card.weights, card.dtype, f"the gates in {folder}")
    if example_inputs is not None:
        call = call_of(model, example_inputs)
    else:
        arguments = decoded_example(card.example, where, Zeros(device_of(model)))
        if arguments is None:
            raise ExportError(f"{where} keeps no example of a call: pass example_inputs")
        call = take_apart(model, (), arguments)
    try:
        lazy = kind(model, call, gates, timestep_input=card.timestep_input, moving=card.moving)
    except LazyCompressError:
        raise
    except Exception as error:  # the model's own code, called with what the file says
        said = " ".join(str(error).split())[:300]
        raise ExportError(f"{where}: {type(model).__name__} does not run on the example call: {said}") from error
    lazy.recipe = recipe
    return lazy


def _write(lazy: Learned, folder: Path) -> None:
    if isinstance(lazy, LazyModel):
        write_gates(lazy, folder)
    else:
        write_plan(lazy, folder)


def _is_of(lazy: Learned, place: Path) -> bool:
    """Whether a folder holds what was learned with this kind of model, with these branches."""
    if not isinstance(lazy, LazyModel):
        return is_plan_of(lazy, place)
    try:
        card = read_gates_card(place)
    except LazyCompressError:
        return False
    same_model = card.model in ("", type(lazy.model).__name__)
    return same_model and [branch.name for branch in card.branches] == [branch.name for branch in lazy.branches]


def _need_finite(lazy: Learned) -> None:
    if not isinstance(lazy, LazyModel):
        return  # the numbers of a plan are finite: it could not be made else
    for name, value in lazy.gates.state_dict().items():
        if value.is_floating_point() and bool(value.isnan().any() if name == "rank" else (~value.isfinite()).any()):
            raise ExportError(f"the gates' {name} holds NaN or infinity: they were not learned; nothing was written")


__all__ = ["DESCRIPTION_FILE", "GATES_FILE", "PLAN_FILE", "load", "save", "save_all", "save_parts", "write_gates"]
