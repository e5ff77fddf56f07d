"""A wrapped file beside the dense one that it was made of, on this machine: nothing else is needed, no torch model either.

Both are called with the same inputs over three images. What a wrapped file computes has to be what the dense one gives, and how
often it computes what its plan says.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ExportError, InputError
from ..export.card import check_files, exports_in, read_card
from ..export.sessions import Arrays, Session, computed_by, open_session
from ..files import kind_of, path_of, read_tensors
from .ports import Port

_Array = npt.NDArray[Any]

#: Sizes that a file leaves open: one sample, and this many rows, columns, frames or tokens.
_SIZE = 16

#: Images that are drawn: the first one warms up.
_IMAGES = 3

#: How far latents go from call to call, as a share of the output.
_STEP = 0.05

#: Largest difference of a computed call, as a share of the largest output: kernels may be chosen by the graph around them.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Comparison:
    """How a wrapped file compares with its dense one. `str()` gives one line.

    Attributes:
        directory: the wrapped file's folder.
        computed: calls of an image that the file computed.
        planned: those that its plan computes.
        calls: of an image.
        relative: largest difference of a computed call to the dense file, as a share of the largest output.
        forecast: root mean square of the difference of the other calls, as a share of the dense outputs' own.
        dense_seconds, lazy_seconds: for the calls of an image.
        broken: where the file gave NaN or infinity; empty if nowhere.
    """

    directory: str
    computed: int
    planned: int
    calls: int
    relative: float
    forecast: float
    dense_seconds: float
    lazy_seconds: float
    broken: str = ""

    @property
    def ok(self) -> bool:
        return not self.broken and self.computed == self.planned and self.relative <= _ROUNDING

    def __str__(self) -> str:
        if self.broken:
            return f"{self.directory}: DIFFERS, {self.broken} holds NaN or infinity"
        word = "ok" if self.ok else "DIFFERS"
        return (
            f"{self.directory}: {word}, {self.computed} of {self.calls} calls computed (planned {self.planned}), largest "
            f"difference to the dense file {self.relative:.1e} there, forecasts off by {self.forecast:.1e}; "
            f"{self.dense_seconds / self.lazy_seconds:.2f} times as fast "
            f"({self.lazy_seconds:.3g} s an image, dense {self.dense_seconds:.3g} s)"
        )


def verify_wrapped(directory: str | Path, dense: str | Path, *, inputs: str | Path | None = None) -> list[Comparison]:
    """Compare a wrapped folder with the file, or the folder, that it was made of.

    Args:
        directory: what `wrap` wrote: of one file, or of a pipeline.
        dense: what it was given.
        inputs: safetensors with the inputs of one call, by name; left out, they are made up.

    Returns:
        One for each denoiser.

    Raises:
        ExportError: the folder is none that `wrap` wrote, or a file is another one than was written.
        InputError: there is no such dense file, it does not run, or not on these inputs.
    """
    folder, source = path_of(directory), path_of(dense)
    inside = exports_in(folder)
    if inside != [folder]:
        check_files(folder, read_card(folder))
    given = None if inputs is None else _read(path_of(inputs))
    found = []
    for inner in inside:
        card = read_card(inner)
        if "plan" not in card:
            raise ExportError(f"{inner} was exported, not wrapped: it is verified without a dense file")
        check_files(inner, card)
        beside = source / inner.relative_to(folder) / card["model"] if kind_of(source) == "folder" else source
        if kind_of(beside) != "file":
            raise InputError(f"there is no file {beside}, which {inner} was made of")
        found.append(_compare(inner, card, beside, given))
    return found


@dataclass
class _Differences:
    """Of a wrapped file's outputs to the dense one's, call by call.

    Attributes:
        largest: output of the dense file, its absolute value.
        computed: largest difference of calls that computed.
        missed, squares: mean squares of the differences of other calls, and of the dense outputs there, added up.
        broken: the first call with NaN or infinity.
    """

    largest: float = 0.0
    computed: float = 0.0
    missed: float = 0.0
    squares: float = 0.0
    broken: str = ""

    def add(self, outputs: Sequence[_Array], expected: Sequence[_Array], computed: bool, where: str) -> None:
        """Count one call.

        Raises:
            InputError: the outputs are of other numbers or sizes.
        """
        sizes, wanted = ([list(value.shape) for value in values] for values in (outputs, expected))
        if sizes != wanted:
            raise InputError(
                f"the wrapped file gives outputs of the sizes {sizes}, and the dense one {wanted}: it is another"
            )
        for own, other in zip(outputs, expected, strict=True):
            if not np.isfinite(own).all():
                self.broken = self.broken or where
                continue
            error = own.astype(np.float64) - other.astype(np.float64)
            self.largest = max(self.largest, float(np.abs(other).max()))
            if computed:
                self.computed = max(self.computed, float(np.abs(error).max()))
            else:
                self.missed += float(np.square(error).mean())
                self.squares += float(np.square(other, dtype=np.float64).mean())


def _compare(folder: Path, card: Mapping[str, Any], dense: Path, given: Arrays | None) -> Comparison:
    plain, lazy = open_session(dense), open_session(folder / card["model"])
    times, planned = card["plan"]["timesteps"], sum(card["plan"]["computes"])
    ports = _inputs(dense)
    start = _made_up(ports, card) if given is None else given
    latents, timestep = card["latents"], card["timestep"]
    names = [port.name for port in ports]
    missing = [name for name in dict.fromkeys((*names, latents, timestep)) if name not in start]
    if missing:
        raise InputError(f"{dense} needs the inputs {', '.join(names)}; missing: {', '.join(missing)}")
    found, counts, seconds = _Differences(), [], []
    for image in range(_IMAGES):
        inputs = {name: start[name] for name in names}
        inputs[latents] = (
            np.random.default_rng(image).standard_normal(start[latents].shape).astype(start[latents].dtype)
        )
        spent, before = np.zeros(2), 0.0
        for number, at in enumerate(times):
            inputs[timestep] = np.full_like(start[timestep], at)
            expected, of_dense = _timed(plain, inputs, dense)
            outputs, of_lazy = _timed(lazy, inputs, folder)
            spent += of_dense, of_lazy
            count = computed_by(lazy, card["clock"])
            found.add(outputs, expected, count > before or not number, f"call {number} of image {image}")
            before = count
            inputs[latents] = _onward(inputs[latents], outputs[0])  # as a sampler goes on that has this file
        counts.append(int(before))
        seconds.append(spent)
    of_dense, of_lazy = np.median(seconds[1:], axis=0).tolist()
    return Comparison(
        str(folder), max(counts, key=lambda count: abs(count - planned)), planned, len(times),
        found.computed / max(found.largest, 1e-12), (found.missed / max(found.squares, 1e-300)) ** 0.5, of_dense, of_lazy,
        found.broken,
    )  # fmt: skip


def _timed(session: Session, inputs: Arrays, what: Path) -> tuple[list[_Array], float]:
    """The outputs of a call, and the seconds that it took."""
    begun = time.perf_counter()
    try:
        found = session(inputs)
    except Exception as error:  # runtimes have error classes of their own
        sizes = ", ".join(f"{name}{list(value.shape)}" for name, value in inputs.items())
        said = " ".join(str(error).split())[-300:]
        raise InputError(
            f"{what} does not run on {sizes}: {said}; pass the inputs of one call, in a safetensors file"
        ) from None
    return found, time.perf_counter() - begun


def _onward(latents: _Array, output: _Array) -> _Array:
    """Latents a step further; of an output of more channels the first ones count."""
    if latents.ndim != output.ndim or any(a > b for a, b in zip(latents.shape, output.shape, strict=True)):
        return latents
    own = output[tuple(slice(size) for size in latents.shape)]
    return np.asarray(latents - _STEP * own, dtype=latents.dtype)


def _made_up(ports: Sequence[Port], card: Mapping[str, Any]) -> dict[str, _Array]:
    """Inputs of one call: noise where a file takes floating-point numbers, ones elsewhere."""
    rng = np.random.default_rng(0)
    found = {}
    for port in ports:
        # Position ids, [tokens, axes], have no batch.
        ids = len(port.shape) == 2 and port.shape[1] is not None and port.shape[1] <= 4 and port.name != card["latents"]
        sizes = [(_SIZE if k or ids else 1) if size is None else size for k, size in enumerate(port.shape)]
        noise = port.floating and not ids and port.name != card["timestep"]
        try:
            found[port.name] = (rng.standard_normal(sizes) if noise else np.ones(sizes)).astype(port.dtype)
        except TypeError:
            raise InputError(
                f"input {port.name} is of {port.dtype}, which NumPy has no arrays of: it cannot be tried here"
            ) from None
    return found


def _inputs(path: Path) -> list[Port]:
    """What a dense file takes."""
    if path.suffix == ".xml":
        from . import openvino as format_openvino

        return format_openvino.ports(format_openvino.read(path))[0]
    from . import onnx as format_onnx

    return format_onnx.ports(format_onnx.read(path))[0]


def _read(path: Path) -> dict[str, _Array]:
    """Inputs of one call from a file."""
    found = {}
    for name, value in read_tensors(path, InputError).items():
        try:
            found[name] = value.numpy()
        except TypeError:
            raise InputError(
                f"{path}: {name} is {value.dtype}, which NumPy has no arrays of: store it as float32"
            ) from None
    return found


__all__ = ["Comparison", "verify_wrapped"]
