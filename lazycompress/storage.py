"""Gates on disk: `gates.safetensors` with the numbers, `gates.json` with what they belong to."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

from . import __version__
from .errors import ExportError, InputError
from .gate import Gates
from .graph.capture import Call, ExampleInputs, call_of, take_apart
from .lazy.model import LazyModule
from .recipe import Recipe
from .runtime import LazyModel

if TYPE_CHECKING:
    from .lazy.attach import Handle

_Lazy = TypeVar("_Lazy", bound=LazyModel)

GATES_FILE = "gates.safetensors"
DESCRIPTION_FILE = "gates.json"


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `directory` only when the block ends without an error.

    Raises:
        ExportError: the folder cannot be made there.
    """
    directory = directory.absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file")
        beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise ExportError(f"cannot write {directory}: {error.strerror or error}; choose another folder") from None
    try:
        yield beside
        if directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
            os.replace(directory, old / "it")
            os.replace(beside, directory)
            shutil.rmtree(old)
        else:
            os.replace(beside, directory)
        directory.chmod(0o755)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save(lazy: LazyModel | LazyModule | Handle | nn.Module, directory: str | Path) -> Path:
    """Write the gates or the plan of a lazy model; the model's own weights are not written.

    Raises:
        ExportError: the folder cannot be written.
    """
    from .lazy.convert import lazy_of
    from .lazy.store import save_plan  # it needs this module

    lazy = lazy_of(lazy)
    if not isinstance(lazy, LazyModel):
        return save_plan(lazy, directory)
    call = lazy.example
    description = {
        "lazycompress": __version__,
        # But for a folder of the machine that trained.
        "recipe": None if lazy.recipe is None else lazy.recipe.with_checkpoint("").model_dump(mode="json"),
        "direction": int(lazy.gates.direction),
        "timestep_input": lazy.timestep_input,
        "branches": [{"name": b.name, "kind": b.kind, "macs": b.macs, "width": b.width} for b in lazy.branches],
        "grid": lazy.gates.grid.tolist(),
        "targets": frontier_of(lazy),
        "example": describe_call(call),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in lazy.gates.state_dict().items()}
    with whole_folder(Path(directory)) as folder:
        save_file(tensors, folder / GATES_FILE)
        (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2, default=str) + "\n", encoding="utf-8")
    return Path(directory)


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
) -> _Lazy | LazyModule:
    """A lazy model from a dense one and the folder that `save` wrote.

    Args:
        model: the model that the gates were trained for; it is left as it is.
        directory: where the gates are.
        example_inputs: arguments of one call; left out, tensors like those at training are made up.
        kind: the class to make where the folder holds gates; of a plan it is a `LazyModule`.

    Raises:
        ExportError: the folder holds no gates.
        LazyCompressError: the gates do not fit the model.
    """
    folder = Path(directory)
    from .lazy.store import PLAN_FILE, load_plan  # it needs this module

    if (folder / PLAN_FILE).is_file():
        loaded = load_plan(model, folder)
        module = LazyModule(model, loaded.engine)
        module.recipe, module.example = loaded.recipe, loaded.example
        if example_inputs is not None:
            module.example = ((), example_inputs) if isinstance(example_inputs, Mapping) else (example_inputs, {})
        return module
    for name in (GATES_FILE, DESCRIPTION_FILE):
        if not (folder / name).is_file():
            raise ExportError(f"{folder} holds no gates: {name} is missing; lazycompress.save writes it")
    description = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    tensors = load_file(folder / GATES_FILE)
    branches = description["branches"]
    gates = Gates(
        [b["name"] for b in branches], [b["width"] for b in branches], tensors["grid"], description["direction"]
    )
    gates.frontier = torch.zeros_like(tensors["frontier"])
    gates.load_state_dict(tensors)
    if example_inputs is not None:
        call = call_of(model, example_inputs)
    else:
        call = take_apart(model, (), made_up(model, description["example"]))
    lazy = kind(model, call, gates, timestep_input=description["timestep_input"])
    lazy.recipe = Recipe.model_validate(description["recipe"]) if description["recipe"] else None
    return lazy


def describe_call(call: Call) -> dict[str, Any]:
    """The structure of a call, its sizes and its constants, as JSON; `made_up` gives such a call."""
    return {
        "spec": pytree.treespec_dumps(call.spec),
        "tensors": [
            {"name": leaf.name, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for t, leaf in zip(call.tensors, call.leaves, strict=True)
        ],
        "others": {str(k): v for k, v in call.others.items()},
    }


def made_up(model: nn.Module, example: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments, all zeros, like those of the call that was described.

    Raises:
        InputError: they cannot be made.
    """
    parameter = next(model.parameters())
    tensors: list[Any] = []
    for entry in example["tensors"]:
        dtype = getattr(torch, entry["dtype"])
        tensors.append(torch.zeros(entry["shape"], dtype=dtype, device=parameter.device))
    for position, value in sorted(example["others"].items(), key=lambda item: int(item[0])):
        tensors.insert(int(position), value)
    arguments = pytree.tree_unflatten(tensors, pytree.treespec_loads(example["spec"]))
    if not isinstance(arguments, dict):
        raise InputError("the saved example inputs are not a dictionary: pass example_inputs")
    return arguments
