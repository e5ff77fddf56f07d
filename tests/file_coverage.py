"""Branch plans as files, for every model of the zoo: `python -m tests.file_coverage [--write docs/coverage_files.md]`.

Each model gets static gates that decide each branch by itself and change from call to call, is exported to both formats, and the
files are run on calls that torch recorded: an image is begun, goes on, begins again, and goes on with other sizes where it can.
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import lazycompress
from lazycompress.errors import LazyCompressError
from lazycompress.export.check import verify
from lazycompress.files import check_file, write_file
from lazycompress.graph.call import take_apart
from lazycompress.graph.insert import find_timestep
from lazycompress.runtime import wrap
from tests.coverage import committed, page, short, specimens
from tests.export_models import lively
from tests.zoo.specimen import STEPS, Specimen

MARK = "Written by `python -m tests.file_coverage --write docs/coverage_files.md`"

FORMATS = ("onnx", "openvino")

COLUMNS = {
    "model": "name in `tests/zoo`",
    "branches": "that have an `If` of their own",
    "ONNX": "largest difference of its file to torch, as a share of the largest output",
    "OpenVINO": "the same",
    "seconds": "of processor time, to export and check each of the two",
    "notes": "decisions that differ, what a file cannot do, or what stands in the way of it",
}


#: Folders of the machine that a message names.
_PATH = re.compile(r"\S*/(?=[\w.-]+)")


@dataclass(frozen=True)
class Exported:
    """One file: its difference to torch, or None where there is none."""

    difference: float | None
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    branches: int
    files: tuple[Exported, ...]

    def cells(self) -> list[str]:
        """The row as text."""
        said = {
            note: [format for format, file in zip(FORMATS, self.files, strict=True) if note in file.notes]
            for file in self.files
            for note in file.notes
        }
        notes = [note if len(formats) == len(FORMATS) else f"{formats[0]}: {note}" for note, formats in said.items()]
        numbers = ["none" if file.difference is None else f"{file.difference:.0e}" for file in self.files]
        seconds = " ".join(f"{file.seconds:.0f}" for file in self.files)
        return [self.name, str(self.branches), *numbers, seconds, "; ".join(notes)]


class _Warnings(logging.Handler):
    """What an export says that it cannot do."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def measure(specimen: Specimen) -> Row:
    """Export one model to each format; whatever goes wrong is a line in its notes."""
    torch.set_num_threads(1)
    model = specimen.build()
    inputs = specimen.inputs(2, 0)
    calls = [take_apart(model, (), specimen.inputs(1, step)) for step in (0, STEPS - 1)]
    position = find_timestep(calls[0].leaves, calls[0].tensors)
    first, last = (float(call.tensors[position].float().max()) for call in calls)
    times = torch.linspace(first, last, STEPS).to(calls[0].tensors[position].dtype).float()
    lazy = wrap(model, (), inputs, lively(times, spread=0.0))
    logger, said = logging.getLogger("lazycompress"), _Warnings()
    logger.addHandler(said)
    files = []
    try:
        for format in FORMATS:
            said.said.clear()
            start = time.process_time()
            difference = None
            with tempfile.TemporaryDirectory() as folder:
                try:
                    written = lazycompress.export(lazy, Path(folder) / "out", format=format, telemetry=True)
                    report = verify(written)
                    difference = report.relative
                    notes = [f"{report.flipped} decisions differ"] if report.flipped else []
                    notes += [f"{report.broken} is not finite"] if report.broken else []
                except LazyCompressError as error:
                    notes = [short(_PATH.sub("", str(error)).replace("](", "] ("))]  # no links of Markdown
            notes += [short(line) for line in said.said]
            files.append(Exported(difference, time.process_time() - start, tuple(notes)))
    finally:
        logger.removeHandler(said)
    return Row(specimen.name, len(lazy.branches), tuple(files))


def measure_named(name: str) -> Row:
    """`measure` of the model with this name."""
    return measure(next(specimen for specimen in specimens() if specimen.name == name))


def rows(names: list[str]) -> Iterator[Row]:
    """The table's rows, one after the other, measured in a process of their own, which a crash of a runtime may take along."""
    with tqdm(total=len(names), unit="model") as bar:
        while bar.n < len(names):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                for name in names[bar.n :]:
                    try:
                        row = pool.submit(measure_named, name).result()
                    except BrokenProcessPool:
                        row = _failed(name, "the process ends")
                    except Exception as error:  # one model must not cost the table
                        row = _failed(name, f"{type(error).__name__}: {error}")
                    tqdm.write("  ".join(row.cells()))
                    yield row
                    bar.update()
                    if "the process ends" in row.files[0].notes:
                        break


def _failed(name: str, reason: str) -> Row:
    return Row(name, 0, (Exported(None, 0.0, (short(reason),)),) * len(FORMATS))


def render(cells: list[list[str]]) -> str:
    """The page."""
    written = [sum(row[2 + k] != "none" for row in cells) for k in range(len(FORMATS))]
    about = [
        f"{MARK}; with `--only` the other rows stay as they are.",
        f"{len(cells)} models, tiny and with random weights; files with a branch plan: {written[0]} ONNX, {written[1]} OpenVINO.",
    ]
    return page("Coverage of files", about, COLUMNS, cells)


def main() -> None:
    """Measure, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--write", type=Path, help="where to write the page")
    options = parser.parse_args()
    if options.write:
        check_file(options.write, MARK)
    names = [specimen.name for specimen in specimens()]
    for row in rows([name for name in names if not options.only or name in options.only]):
        if options.write:
            kept = committed(options.write) | {row.name: row.cells()}
            write_file(options.write, render([kept[name] for name in names if name in kept]), MARK)


if __name__ == "__main__":
    main()
