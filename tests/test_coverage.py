"""Every model of the zoo against the kept table: a cell may get better, not worse."""

from __future__ import annotations

import pytest

from tests.coverage import Row, committed, measure, specimens
from tests.zoo.specimen import Specimen
from tests.zoo.styles_negative import NOT_DITS

EXACT, HALF, BATCH = 1e-6, 1e-2, 2e-5
TABLE = committed()
ALL = {specimen.name: specimen for specimen in specimens()}


def limit(name: str) -> float:
    """Largest relative difference allowed: rounding of the model's own dtype."""
    return HALF if "bfloat16" in name else EXACT


def compare(row: Row, kept: list[str]) -> None:
    """Raise if a cell of `row` is worse than the kept one; `-` is a cell that could not be measured."""
    _, _, source, found, kinds, share, compute, reuse, batch, _ = kept
    assert row.source == source
    if found == "-":
        return
    assert (row.found, row.kinds) == (found, kinds), row.notes
    assert row.share is not None
    assert row.share >= float(share.rstrip("%")) / 100 - 0.001
    for value, cell, most in (
        (row.compute, compute, limit(row.name)),
        (row.reuse, reuse, limit(row.name)),
        (row.batch, batch, 3 * HALF if "bfloat16" in row.name else BATCH),
    ):
        if cell != "-":
            assert value is not None
            assert value <= max(most, 1.5 * float(cell)), row.notes


def test_table_has_every_model() -> None:
    assert list(TABLE) == list(ALL)
    assert sum(specimen.family != "style" for specimen in ALL.values()) >= 30


@pytest.mark.parametrize("specimen", ALL.values(), ids=list(ALL))
def test_no_cell_gets_worse(specimen: Specimen) -> None:
    compare(measure(specimen), TABLE[specimen.name])


@pytest.mark.parametrize("specimen", NOT_DITS, ids=[s.name for s in NOT_DITS])
def test_models_without_branches_say_so_in_one_line(specimen: Specimen) -> None:
    notes = measure(specimen).notes
    assert "\n" not in notes
    assert "no Diffusion Transformer here" in notes or "without a floating-point tensor of rank 3" in notes
