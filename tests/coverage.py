"""What lazycompress finds and keeps right in every model of the zoo: `python -m tests.coverage [--write docs/coverage.md]`.

Each row compares one model with what reading its source and hooking its own modules say; see `COLUMNS`.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from lazycompress.errors import LazyCompressError
from lazycompress.files import check_file, write_file
from lazycompress.gates import Gates
from lazycompress.graph.branch import Branch
from lazycompress.graph.call import take_apart
from lazycompress.graph.insert import find_timestep
from lazycompress.graph.ops import macs_of
from lazycompress.graph.sizes import resized
from lazycompress.runtime import LazyModel, wrap

from .zoo.specimen import Specimen, reuse_reference

MODULES = [
    "diffusers_image",
    "diffusers_image_joint",
    "diffusers_image_single",
    "diffusers_video",
    "diffusers_video_more",
    "diffusers_video_guided",
    "diffusers_audio",
    "styles_all",
]

MARK = "Written by `python -m tests.coverage --write docs/coverage.md`"

TABLE = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"

COLUMNS = {
    "model": "name in `tests/zoo`",
    "family": "image, video or audio: a transformer class of diffusers; style: written for the tests",
    "source": "attention / MLP / parallel branches by reading the model's source",
    "found": "the same, as located in its graph",
    "kinds": "S self-, X cross-, J joint attention, M MLP, P parallel attention and MLP",
    "MACs": "share of the model's multiply-accumulates that lies in branches",
    "compute": 'largest relative difference to the original, policy "compute", two steps',
    "reuse": 'the same, second step with policy "reuse", against hooks on the original modules that replay the first',
    "batch": "gates that decide differently per sample: a batch of three against the three samples alone",
    "sizes": "inputs whose height, width, frames or number of tokens may change (dimension numbers), with one capture",
    "resized": 'largest relative difference at other sizes, policies "compute" and "reuse" as above',
    "notes": "",
}

_LETTERS = {"attention": "S", "cross-attention": "X", "joint-attention": "J", "mlp": "M", "parallel": "P"}


@dataclass(frozen=True)
class Row:
    """One line of the table; differences are None where nothing could be run."""

    name: str
    family: str
    source: str
    found: str
    kinds: str
    share: float | None
    compute: float | None
    reuse: float | None
    batch: float | None
    sizes: str
    resized: float | None
    notes: str

    def cells(self) -> list[str]:
        """The row as text."""
        share = "-" if self.share is None else f"{self.share:.1%}"
        values = (self.compute, self.reuse, self.batch, self.resized)
        *numbers, resized = ["-" if v is None else f"{v:.0e}" if v else "0" for v in values]
        return [
            self.name, self.family, self.source, self.found, self.kinds, share, *numbers, self.sizes, resized, self.notes
        ]  # fmt: skip


def specimens() -> Iterator[Specimen]:
    """Every model of the zoo that has branches."""
    for module in MODULES:
        yield from importlib.import_module(f"tests.zoo.{module}").SPECIMENS


def measure(specimen: Specimen) -> Row:
    """Run one model through everything that the table shows; whatever goes wrong is one line in its notes."""
    try:
        return _measure(specimen)
    except Exception as error:  # one model must not cost the table
        source = f"{specimen.attention}/{specimen.mlp}/{specimen.parallel}"
        note = f"fails: {type(error).__name__} {short(str(error))}"
        return Row(specimen.name, specimen.family, source, "-", "-", None, None, None, None, "-", None, note)


def _measure(specimen: Specimen) -> Row:
    source = f"{specimen.attention}/{specimen.mlp}/{specimen.parallel}"
    model = specimen.build()
    first, second = specimen.inputs(2, 0), specimen.inputs(2, 1)
    try:
        lazy = wrapped(model, first, second)
    except LazyCompressError as error:
        return Row(
            specimen.name, specimen.family, source, "-", "-", None, None, None, None, "-", None, short(str(error))
        )
    with torch.no_grad():
        dense = [model(**first), model(**second)]
        lazy.policy = "compute"
        computed = max(difference(lazy(**inputs), out) for inputs, out in zip((first, second), dense, strict=True))
        lazy.reset()
        lazy.policy = "reuse"
        lazy(**first)
        reused = difference(lazy(**second), reuse_reference(model, specimen.sites(model), first, second))
    skipped = lazy.summary().skip_ratio
    program = lazy.program(lazy.example)
    notes = [specimen.note] if specimen.note else []
    notes += [note.split(":")[0] for note in program.captured.notes]
    if skipped != 0.5:
        notes.append(f"skip ratio {skipped:.2f}, not 0.5")
    everything = sum(macs_of(node) for node in program.captured.graph_module.graph.nodes) / program.captured.batch
    share = sum(branch.macs for branch in lazy.branches) / everything
    resized = at_other_sizes(lazy, specimen)
    batched, remark = batch_of_three(lazy, specimen)
    notes += [remark] if remark else []
    return Row(
        specimen.name, specimen.family, source, found(lazy.branches), kinds(lazy.branches), share, computed, reused,
        batched, dynamic_sizes(lazy), resized, "; ".join(notes),
    )  # fmt: skip


def found(branches: list[Branch]) -> str:
    """Numbers of attention, MLP and parallel branches."""
    attention = sum("attention" in branch.kind for branch in branches)
    return f"{attention}/{sum(b.kind == 'mlp' for b in branches)}/{sum(b.kind == 'parallel' for b in branches)}"


def kinds(branches: list[Branch]) -> str:
    """How many there are of each kind, e.g. `3J 6M`."""
    letters = [_LETTERS[branch.kind] for branch in branches]
    return " ".join(f"{letters.count(letter)}{letter}" for letter in _LETTERS.values() if letter in letters)


def wrapped(model: nn.Module, first: dict[str, Any], second: dict[str, Any]) -> LazyModel:
    """A lazy model whose gates know whether timesteps rise or fall from the first call to the second."""
    calls = [take_apart(model, (), inputs) for inputs in (first, second)]
    position = find_timestep(calls[0].leaves, calls[0].tensors)
    before, after = (float(call.tensors[position].float().max()) for call in calls)
    direction = -1 if after > before else 1

    def make(branches: list[Branch]) -> Gates:
        names, widths = [b.name for b in branches], [b.width for b in branches]
        return Gates(names, widths, torch.linspace(0, 1000, 5), direction=direction)

    return wrap(model, (), first, make)


def dynamic_sizes(lazy: LazyModel) -> str:
    """Inputs and dimensions of the example's capture that may have other sizes, e.g. `x[2 3] text[1]`."""
    captured = lazy.program(lazy.example).captured
    pairs = [(leaf.name, dims) for leaf, dims in zip(captured.leaves, captured.sizes.dynamic, strict=True) if dims]
    return " ".join(f"{name}[{' '.join(map(str, dims))}]" for name, dims in pairs) or "-"


def at_other_sizes(lazy: LazyModel, specimen: Specimen, most: int = 2) -> float | None:
    """Largest difference to the model, and to reuse by hooks on it, at sizes that the example's capture takes too."""
    captured = lazy.program(lazy.example).captured
    calls = [take_apart(lazy.model, (), specimen.inputs(2, step)) for step in (0, 1)]
    worst = None
    left = most if captured.sizes.is_dynamic else 0
    for shapes in captured.sizes.others(2) if left else []:
        first, second = (call.arguments(resized(call.tensors, shapes)) for call in calls)
        try:
            with torch.no_grad():
                lazy.model(**first)
        except (IndexError, RuntimeError):
            continue  # sizes that the model does not take
        left -= 1
        if left < 0:
            break
        with torch.no_grad():
            lazy.policy = "reuse"
            lazy(**first)
            reused, wanted = lazy(**second), reuse_reference(lazy.model, specimen.sites(lazy.model), first, second)
            lazy.policy = "compute"
            worst = max(worst or 0.0, difference(lazy(**second), lazy.model(**second)), difference(reused, wanted))
        assert lazy.program(take_apart(lazy.model, (), second)).captured is captured
    return worst


def batch_of_three(lazy: LazyModel, specimen: Specimen) -> tuple[float | None, str]:
    """Random gates over two steps: three samples in one batch against each alone; a remark if all decided alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in lazy.gates.weights:
            weight.copy_(4 * torch.randn(weight.shape[1:], generator=generator).expand_as(weight))
        lazy.gates.bias.zero_()
    lazy.policy = "learned"
    steps = [take_apart(lazy.model, (), specimen.inputs(3, step)) for step in (0, 1)]
    dims = batch_dims(steps[0].tensors, take_apart(lazy.model, (), specimen.inputs(2, 0)).tensors)

    def run(pick: slice) -> tuple[list[Tensor], float]:
        lazy.reset()
        outputs: list[Tensor] = []
        for call in steps:
            tensors = [
                t if dim is None else t.movedim(dim, 0)[pick].movedim(0, dim)
                for t, dim in zip(call.tensors, dims, strict=True)
            ]
            with torch.no_grad():
                outputs = leaves(lazy(**call.arguments(tensors)))
        return outputs, lazy.summary().skip_ratio

    together, skipped = run(slice(None))
    worst = 0.0
    for k in range(3):
        alone, _ = run(slice(k, k + 1))
        same = together[k::3] if lazy.example.lists else [t[k : k + 1] for t in together]
        worst = max(worst, difference(alone, same))
    return worst, "" if 0 < skipped < 0.5 else "all samples decided alike"


def batch_dims(more: list[Tensor], fewer: list[Tensor]) -> list[int | None]:
    """For every input tensor the dimension that grows with the number of samples, seen from its sizes alone."""
    return [
        next((dim for dim, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b), None)
        for x, y in zip(more, fewer, strict=True)
    ]


def leaves(output: Any) -> list[Tensor]:
    """Every tensor of an output."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def difference(got: Any, wanted: Any) -> float:
    """Largest absolute difference over largest absolute value, of the worst output tensor."""
    pairs = zip(leaves(got), leaves(wanted), strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def short(message: str) -> str:
    """The start of a message, without paths of this machine and without bars of a table."""
    # No paths of this machine in a page that is kept.
    return re.sub(r"/\S*/site-packages/", "", message).replace("|", "/")[:260]


def render(rows: list[Row]) -> str:
    """The page."""
    classes = sum(row.family != "style" for row in rows)
    about = [
        f"{MARK}; `tests/graph/test_coverage.py` fails where a cell gets worse.",
        f"{classes} models of diffusers and {len(rows) - classes} written for the tests, tiny and with random weights.",
    ]
    return page("Coverage", about, COLUMNS, [row.cells() for row in rows])


def page(title: str, about: list[str], columns: dict[str, str], cells: list[list[str]]) -> str:
    """A page with one table: what it shows, what the columns mean, and its rows."""
    lines = [
        f"# {title}",
        "",
        *about,
        "",
        *(f"- **{name}**: {meaning}" for name, meaning in columns.items() if meaning),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(row) + " |" for row in cells),
    ]
    return "\n".join(lines) + "\n"


def committed(table: Path = TABLE) -> dict[str, list[str]]:
    """The cells of the kept table by name, or nothing if there is none."""
    if not table.exists():
        return {}
    lines = [line for line in table.read_text().splitlines() if line.startswith("| ")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {cells[0].strip("| "): [cell.strip("| ") for cell in cells] for cells in rows}


def main() -> None:
    """Measure, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--write", type=Path, help="where to write the page")
    options = parser.parse_args()
    if options.write:
        check_file(options.write, MARK)
    torch.set_num_threads(1)
    chosen = [s for s in specimens() if not options.only or s.name in options.only]
    rows = []
    for specimen in tqdm(chosen, unit="model"):
        row = measure(specimen)
        rows.append(row)
        tqdm.write("  ".join(row.cells()))
    if options.write:
        write_file(options.write, render(rows), MARK)


if __name__ == "__main__":
    main()
