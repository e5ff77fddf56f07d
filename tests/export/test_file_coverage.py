"""Models whose operations no format has as they are, as files with branch plans: complex numbers, writing, experts, padding."""

from __future__ import annotations

import pytest

from tests.file_coverage import FORMATS, measure_named

#: Largest difference to torch, as a share of the largest output.
MOST = 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "large-dit",
        *(pytest.param(name, marks=pytest.mark.slow(seconds=25)) for name in ("qwenimage", "lumina2", "nucleusmoe")),
        *(
            pytest.param(name, marks=pytest.mark.slow(seconds=25))
            for name in ("prx", "ernie_image", "cogview4", "flux", "chroma", "wan_i2v", "wan_ti2v", "zimage")
        ),
    ],
)
def test_files_give_what_torch_gives(name: str) -> None:
    row = measure_named(name)
    for format, file in zip(FORMATS, row.files, strict=True):
        assert file.difference is not None, (format, file.notes)
        assert file.difference <= MOST
        assert not file.notes
