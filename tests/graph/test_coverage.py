"""Every model of the zoo: all branches that the source has, and exact reuse."""

from __future__ import annotations

import pytest

from tests.coverage import committed, measure, specimens
from tests.zoo.specimen import Specimen
from tests.zoo.styles_negative import NOT_DITS

EXACT, HALF, BATCH, RESIZED = 1e-6, 1e-2, 2e-5, 1e-6
TABLE = committed()
ALL = {specimen.name: specimen for specimen in specimens()}

#: Each kind of architecture once; all others are marked slow, with about as many seconds as they take.
QUICK = {
    "dit", "pixart", "sd3", "flux", "sana", "stable_audio", "dit-adaln-zero", "softmax-by-hand", "post-norm",
    "parallel-fused", "swiglu", "moe-masked", "conv-mlp", "next-dit", "u-vit", "shared-block", "bfloat16",
}  # fmt: skip
SECONDS = {"hidream": 135, "hidream_dense": 110, "lumina2": 245, "chroma": 42, "zimage": 40}

#: What is known to be wrong, and why. A model that comes right must be taken off this list.
KNOWN = {}


def cases() -> list[object]:
    marked = []
    for name, specimen in ALL.items():
        marks = [pytest.mark.xfail(reason=KNOWN[name], strict=True)] if name in KNOWN else []
        if name not in QUICK:
            marks.append(pytest.mark.slow(seconds=SECONDS.get(name, 3 if specimen.family == "style" else 10)))
        marked.append(pytest.param(specimen, id=name, marks=marks))
    return marked


def test_table_has_every_model() -> None:
    assert list(TABLE) == list(ALL)
    assert sum(specimen.family != "style" for specimen in ALL.values()) >= 30
    assert {*KNOWN, *QUICK, *SECONDS} <= set(ALL)


@pytest.mark.parametrize("specimen", cases())
def test_every_branch_is_found_and_reused_exactly(specimen: Specimen) -> None:
    row = measure(specimen)
    most = HALF if "bfloat16" in row.name else EXACT
    assert row.found == row.source, row.notes
    assert row.compute is not None
    assert row.compute <= most
    assert row.reuse is not None
    assert row.reuse <= most
    if row.resized is not None:
        assert row.resized <= (HALF if "bfloat16" in row.name else RESIZED)
    assert row.sizes == TABLE[specimen.name][9]
    if row.batch is not None:
        assert row.batch <= (3 * HALF if "bfloat16" in row.name else BATCH)
    share = float(TABLE[specimen.name][5].rstrip("%")) / 100
    assert row.share is not None
    assert row.share >= share - 0.001


@pytest.mark.parametrize("specimen", NOT_DITS, ids=[s.name for s in NOT_DITS])
def test_models_without_branches_say_so_in_one_line(specimen: Specimen) -> None:
    notes = measure(specimen).notes
    assert "\n" not in notes
    assert "no Diffusion Transformer here" in notes or "without a floating-point tensor of rank 3" in notes
