"""What a file must give: a few recorded calls, and the comparison with them, at export and later on any machine."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ExportError
from ..graph.sizes import resized
from ..runtime import LazyModel
from .card import exports_in, read_card
from .trace import Granularity, granularity

CHECK_FILE = "lazycompress.check.safetensors"

#: Calls that are recorded: an image is begun, goes on twice, and is begun again.
_CALLS = 4

#: Other sizes that are tried, of which one is recorded.
_TRIALS = 5


@dataclass(frozen=True)
class Report:
    """How a file compares with torch. `str()` gives one line.

    Attributes:
        directory: the folder.
        difference: largest absolute difference of any output, over the recorded calls.
        largest: largest absolute value of the recorded outputs.
        tolerance: what `difference / largest` may be.
        flipped: decisions that differ; None for a file without telemetry.
        allowed: how many may: weights stored in half the size move scores.
    """

    directory: str
    difference: float
    largest: float
    tolerance: float
    flipped: int | None
    allowed: int = 0

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance * max(self.largest, 1e-12) and (self.flipped or 0) <= self.allowed

    def __str__(self) -> str:
        flips = "not in the file" if self.flipped is None else f"{self.flipped} differ"
        return (
            f"{self.directory}: {'ok' if self.ok else 'DIFFERS'}, largest difference to torch {self.difference:.1e} "
            f"(outputs up to {self.largest:.2g}), decisions: {flips}"
        )


def record(lazy: LazyModel, decide: Granularity, sizes: bool = True) -> dict[str, Tensor]:
    """Run torch on the example inputs over a few timesteps; every input, output and decision, by call and name.

    With `sizes` some calls of other sizes follow, where the capture takes them.
    """
    call = lazy.example
    program = lazy.program(call)
    lowered = program.lowered
    device = call.tensors[0].device
    state = [spec.fresh(call.batch, device) for spec in lowered.state]
    grid = lazy.gates.grid.cpu()
    times = (grid.flip(0) if float(lazy.gates.direction) > 0 else grid)[:_CALLS].tolist()
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    threshold = torch.tensor(float(lazy.gates.threshold), device=device)

    def run(number: int, tensors: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        """One call; the state that it leaves."""
        tensors = list(tensors)
        moved = 0.05 * number * torch.randn(tensors[lowered.latents].shape, generator=generator).to(device)
        tensors[lowered.latents] = (tensors[lowered.latents] + moved).to(tensors[lowered.latents].dtype)
        if len(times) >= _CALLS - 1:
            time = times[number % (_CALLS - 1)]
            tensors[lowered.timestep] = torch.full_like(tensors[lowered.timestep], time)
        with torch.no_grad(), granularity(lowered, decide):
            results = lowered.graph_module(*tensors, threshold, *state)
        for leaf, tensor in zip(lowered.leaves, tensors, strict=True):
            found[f"{number}.in.{leaf.name}"] = tensor
        for position in range(lowered.outputs):
            found[f"{number}.out.{position}"] = results[position]
        found[f"{number}.decisions"] = results[-1].to(torch.float32)
        return list(results[lowered.outputs : -1])

    for number in range(_CALLS):
        state = run(number, call.tensors, state)
    others = program.captured.sizes.others(call.batch) if sizes and program.captured.sizes.is_dynamic else iter(())
    for shapes in itertools.islice(others, _TRIALS):
        try:
            after = run(_CALLS, resized(call.tensors, shapes), state)
        except (IndexError, RuntimeError):
            continue  # sizes that the model itself does not take
        run(_CALLS + 1, resized(call.tensors, shapes), after)
        break
    return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}


def save_record(found: dict[str, Tensor], directory: Path) -> None:
    """Write what `record` gave."""
    save_file(found, directory / CHECK_FILE)


def compare(directory: Path, found: dict[str, Tensor], runner: Any, tolerance: float, allowed: int = 0) -> Report:
    """Run a file on recorded calls."""
    difference = largest = 0.0
    flipped: int | None = None
    for number in range(sum(name.endswith(".decisions") for name in found)):
        prefix = f"{number}.in."
        inputs = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        runner.usage.clear()
        results = runner(**inputs)
        for position, output in enumerate(results.values()):
            expected = found[f"{number}.out.{position}"].double()
            difference = max(difference, float((output.double() - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
        counted = runner.usage.reused
        if counted:
            told = sum(counted.values(), torch.zeros(1))
            flipped = (flipped or 0) + int((told - found[f"{number}.decisions"].sum(dim=1)).abs().sum())
    return Report(str(directory), difference, largest, tolerance, flipped, allowed)


def start(directory: Path, card: dict[str, Any] | None = None) -> Any:
    """A runner of the file in a folder, whose card is read if it is not given.

    Raises:
        ExportError: the folder holds no export that loads.
    """
    card = card or read_card(directory)
    try:
        if card["format"] == "openvino":
            from .openvino_runner import OpenVINORunner

            return OpenVINORunner(directory, card=card)
        from .onnx_runner import OnnxRunner

        return OnnxRunner(directory, card=card)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"the file in {directory} does not load: {' '.join(str(error).split())[-300:]}") from error


def verify(directory: str | Path) -> Report:
    """Re-check an export folder on this machine: its files are those of the card, load, and give what torch gave.

    A pipeline has a folder for each denoiser, see `card.exports_in`.

    Raises:
        ExportError: the folder is a pipeline's, a file is missing or has another size, the model does not load, or the
            folder has no recorded calls.
    """
    folder = Path(directory)
    card = read_card(folder)
    if "denoisers" in card:
        inner = ", ".join(str(path) for path in exports_in(folder))
        raise ExportError(f"{folder} is a pipeline, whose files are in folders of their own: verify {inner}")
    if "plan" in card:
        raise ExportError(
            f"{folder} was wrapped, without recorded calls: compare it with its dense file; "
            "its files' hashes are in lazycompress.json"
        )
    for name, size in card.get("files", {}).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            there = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise ExportError(f"{path} should be {size} bytes, there is {there}: export again")
    if not (folder / CHECK_FILE).is_file():
        raise ExportError(f"{folder} was exported without recorded calls ({CHECK_FILE}); export with check=True")
    try:
        found = load_file(folder / CHECK_FILE)
    except Exception as error:
        raise ExportError(f"{folder / CHECK_FILE} cannot be read: {error}") from error
    parity = card["parity"]
    return compare(folder, found, start(folder), parity["tolerance"], parity["flipped"] or 0)


__all__ = ["CHECK_FILE", "Report", "compare", "record", "save_record", "start", "verify"]
