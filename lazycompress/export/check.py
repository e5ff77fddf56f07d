"""What a file must give: a few recorded calls, and the comparison with them, at export and later on any machine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, LazyCompressError
from ..files import kind_of, path_of, read_tensors
from ..graph.sizes import resized
from ..runtime import LazyModel
from .card import Granularity, check_files, exports_in, read_card
from .runtimes import runtime_of
from .trace import granularity

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
        broken: where the file gave NaN or infinity; empty if nowhere.
    """

    directory: str
    difference: float
    largest: float
    tolerance: float
    flipped: int | None
    allowed: int = 0
    broken: str = ""

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest output."""
        return self.difference / max(self.largest, 1e-12)

    @property
    def ok(self) -> bool:
        return not self.broken and self.relative <= self.tolerance and (self.flipped or 0) <= self.allowed

    def __str__(self) -> str:
        if self.broken:
            return f"{self.directory}: DIFFERS, {self.broken} holds NaN or infinity"
        flips = "not in the file" if self.flipped is None else f"{self.flipped} differ"
        return (
            f"{self.directory}: {'ok' if self.ok else 'DIFFERS'}, largest difference to torch {self.relative:.1e} of the "
            f"largest output ({self.largest:.2g}; allowed {self.tolerance:.0e}), decisions: {flips}"
        )


@dataclass(frozen=True)
class RecordedCall:
    """One call of torch: inputs by name, outputs in order, and what was reused, [branches, batch]."""

    number: int
    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    decisions: Tensor


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


def recorded_calls(found: Mapping[str, Tensor], card: Mapping[str, Any], where: str) -> list[RecordedCall]:
    """What `record` gave, call by call, if it says something.

    Args:
        found: tensors by call and name.
        card: of the file; names inputs and counts outputs.
        where: what is at fault if it does not, for messages.

    Raises:
        ExportError: there is no call, one is not whole, or it holds NaN or infinity.
    """
    calls: list[RecordedCall] = []
    while f"{len(calls)}.decisions" in found:
        number = len(calls)
        inputs = {name: found.get(f"{number}.in.{name}") for name in card["inputs"]}
        outputs = [found.get(f"{number}.out.{k}") for k in range(len(card["outputs"]))]
        named = {**{f"input {name}": value for name, value in inputs.items()}}
        named |= {f"output {name}": value for name, value in zip(card["outputs"], outputs, strict=True)}
        decisions = found[f"{number}.decisions"]
        for name, value in named.items():
            if value is None or not value.numel():
                raise ExportError(f"{where}: {name} of recorded call {number} is missing: export again")
            # Masks may hold infinity.
            bad = value.isnan() if name.startswith("input") else ~value.isfinite()
            if bool(bad.any()):
                raise ExportError(f"{where}: {name} of recorded call {number} holds NaN or infinity")
        if decisions.dim() != 2 or len(decisions) != len(card["branches"]):
            raise ExportError(f"{where}: the decisions of recorded call {number} are not those of the branches")
        whole = {name: value for name, value in inputs.items() if value is not None}
        calls.append(RecordedCall(number, whole, [value for value in outputs if value is not None], decisions))
    if not calls:
        raise ExportError(f"{where} says nothing: no call is recorded; export again")
    return calls


def compare(directory: Path, calls: list[RecordedCall], runner: Any, tolerance: float, allowed: int = 0) -> Report:
    """Run a file on recorded calls.

    Raises:
        ExportError: it does not run on them.
    """
    difference = largest = 0.0
    flipped: int | None = None
    broken = ""
    for call in calls:
        runner.usage.clear()
        try:
            results = runner(**call.inputs)
        except LazyCompressError:
            raise
        except Exception as error:  # runtimes have error classes of their own
            said = " ".join(str(error).split())[:300]
            raise ExportError(f"the file in {directory} does not run on recorded call {call.number}: {said}") from error
        if len(results) != len(call.outputs):
            raise ExportError(f"the file in {directory} gives {len(results)} outputs, torch {len(call.outputs)}")
        for (name, output), expected in zip(results.items(), call.outputs, strict=True):
            if output.shape != expected.shape:
                raise ExportError(
                    f"the file in {directory} gives {name} with the sizes {list(output.shape)}, torch {list(expected.shape)}"
                )
            if not bool(output.isfinite().all()):
                broken = broken or f"output {name} of recorded call {call.number}"
                continue
            difference = max(difference, float((output.double() - expected.double()).abs().max()))
            largest = max(largest, float(expected.double().abs().max()))
        counted = runner.usage.reused
        if counted:
            told = sum(counted.values(), torch.zeros(1))
            flipped = (flipped or 0) + int((told - call.decisions.sum(dim=1)).abs().sum())
    return Report(str(directory), difference, largest, tolerance, flipped, allowed, broken)


def start(directory: Path, card: dict[str, Any] | None = None) -> Any:
    """A runner of the file in a folder, whose card is read if it is not given.

    Raises:
        ExportError: the folder holds no export that loads.
    """
    card = card or read_card(directory)
    try:
        return runtime_of(card["format"]).open_folder(directory, card)
    except LazyCompressError:
        raise
    except Exception as error:
        raise ExportError(f"the file in {directory} does not load: {' '.join(str(error).split())[-300:]}") from error


def verify(directory: str | Path) -> Report:
    """Re-check an export folder on this machine: its files are those of the card, load, and give what torch gave.

    A pipeline has a folder for each denoiser, see `card.exports_in`.

    Raises:
        ExportError: the folder is a pipeline's, a file is missing or another one than was written, the model does not load,
            or the folder has no recorded calls that say something.
    """
    folder = path_of(directory)
    card = read_card(folder)
    if "denoisers" in card:
        inner = ", ".join(str(path) for path in exports_in(folder))
        raise ExportError(f"{folder} is a pipeline, whose files are in folders of their own: verify {inner}")
    check_files(folder, card)
    path = folder / CHECK_FILE
    parity = card.get("parity")
    if "plan" in card and parity is None:
        raise ExportError(
            f"{folder} was wrapped, without recorded calls: lazycompress verify --dense FILE compares it with its dense file"
        )
    if kind_of(path) != "file" or parity is None:
        raise ExportError(f"{folder} was exported without recorded calls ({CHECK_FILE}); export with check=True")
    found = read_tensors(path)
    try:
        if "plan" in card:
            from .replay import replay

            return replay(folder, card, found)
        calls = recorded_calls(found, card, str(path))
        runner = start(folder, card)
        return compare(folder, calls, runner, parity["tolerance"], parity["flipped"] or 0)
    except LazyCompressError:
        raise
    except Exception as error:
        raise ExportError(f"the file in {folder} does not run: {' '.join(str(error).split())[-300:]}") from error


def verify_all(directory: str | Path) -> list[Report]:
    """`verify` for each file of an export, a pipeline's other files compared with the card.

    Raises:
        ExportError: as for `verify`.
    """
    folder = path_of(directory)
    inside = exports_in(folder)
    if inside != [folder]:  # a single one checks its own files
        check_files(folder, read_card(folder))
    return [verify(inner) for inner in inside]


__all__ = [
    "CHECK_FILE", "RecordedCall", "Report", "compare", "record", "recorded_calls", "start", "verify", "verify_all",
]  # fmt: skip
