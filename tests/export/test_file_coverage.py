"""Models whose operations no format has as they are, as files with branch plans: complex numbers, writing, experts, padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lazycompress
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.runtime import wrap
from tests.coverage import specimens
from tests.export_models import Reference, lively
from tests.file_coverage import FORMATS, measure_named
from tests.zoo.specimen import STEPS

#: Largest difference to torch, as a share of the largest output.
MOST = 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "large-dit",
        *(pytest.param(name, marks=pytest.mark.slow(seconds=25)) for name in ("qwenimage", "lumina2", "nucleusmoe")),
        *(
            pytest.param(name, marks=pytest.mark.slow(seconds=25))
            for name in (
                "prx",
                "ernie_image",
                "cogview4",
                "flux",
                "chroma",
                "wan_i2v",
                "wan_ti2v",
                "zimage",
                "hunyuanvideo",
            )
        ),
    ],
)
def test_files_give_what_torch_gives(name: str) -> None:
    row = measure_named(name)
    for format, file in zip(FORMATS, row.files, strict=True):
        assert file.difference is not None, (format, file.notes)
        assert file.difference <= MOST
        assert not file.notes


def test_what_cannot_be_cut_to_some_samples_computes_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A sum with a bias for each sample asks how many samples there are; those that reuse keep what they had all the same."""
    specimen = next(specimen for specimen in specimens() if specimen.name == "affine-norm-bias")
    times = torch.cat([specimen.inputs(1, step)["t"].float() for step in range(STEPS)])
    lazy = wrap(specimen.build(), (), specimen.inputs(2, 0), lively(times, spread=1.0))
    folder = lazycompress.export(lazy, tmp_path / "out", format="onnx", telemetry=True)
    assert "computes all samples of a batch where some have to" in caplog.text
    runner: Any = OnnxRunner(folder)
    reference, mixed = Reference(lazy, "lowered"), 0
    for step in range(STEPS):
        inputs = specimen.inputs(4, step)
        expected, decisions = reference(**inputs)
        found = runner(**inputs)[0]
        assert (found - expected).abs().max() <= MOST * expected.abs().max(), step
        mixed += int(((decisions.mean(1) > 0) & (decisions.mean(1) < 1)).any())
    assert mixed >= 2
