"""What the tries on files start from, made once: a small lazy model, its gates, its export, a pipeline's folder."""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lazycompress
from lazycompress.places import Kind, seal
from lazycompress.runtime import LazyModel

from ..export_models import small_dit, small_lazy

#: Values that no key takes, whatever its type; `missing` leaves it out.
WRONG: dict[str, Any] = {
    "missing": ...,
    "null": None,
    "a list": [],
    "a list of lists": [[[1]]],
    "a string": "zzz",
    "an object": {"zzz": 1},
    "huge": 10**30,
    "negative": -7,
    "NaN": math.nan,
    "true": True,
}


@cache
def _shelf() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def lazy() -> LazyModel:
    """Tries must leave it as it is."""
    return small_lazy()


@cache
def dense() -> nn.Module:
    """The model that the gates of `gates` were made for."""
    return small_dit()


@cache
def _gates() -> Path:
    return lazycompress.save(lazy(), _shelf() / "gates")


@cache
def _export() -> Path:
    return lazycompress.export(lazy(), _shelf() / "export", format="openvino", telemetry=True)


def gates(folder: Path) -> Path:
    """A copy of the gates in a folder."""
    return Path(shutil.copytree(_gates(), folder / "gates"))


def export(folder: Path) -> Path:
    """A copy of the export in a folder."""
    return Path(shutil.copytree(_export(), folder / "export"))


def change_json(path: Path, keys: tuple[str | int, ...], value: Any) -> None:
    """Set a key of a JSON file, a path of keys and positions; `...` takes it out."""
    data = json.loads(path.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(data))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def sealed_again(folder: Path, kind: Kind) -> None:
    """Hashes and sizes of what is there now: as one who changes files would have them."""
    about = json.loads((folder / kind.marker).read_text())
    seal(folder, kind, {key: value for key, value in about.items() if key not in ("lazycompress", "files")})


@contextmanager
def weights_with(value: float, name: str = "proj_out_2.weight") -> Iterator[LazyModel]:
    """The lazy model with a value in one of its weights."""
    weight = dict(lazy().model.named_parameters())[name]
    with torch.no_grad():
        old = weight.view(-1)[0].item()
        weight.view(-1)[0] = value
    try:
        yield lazy()
    finally:
        with torch.no_grad():
            weight.view(-1)[0] = old
