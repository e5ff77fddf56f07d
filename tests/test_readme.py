"""The README: its quick starts run as written, its links lead somewhere, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lazycompress.cli import main
from tests.quickstart import README, QuickStart, prepare, quick_starts, run

STARTS = quick_starts()
DOCS = [README, *sorted((README.parent / "docs").glob("*.md"))]

#: The package without which a quick start cannot run, and what it leaves behind.
NEEDS = {"diffusers": "diffusers", "Optimum": "optimum.intel", "OpenVINO": "openvino", "ONNX Runtime": "onnxruntime"}
LEAVES = {
    "diffusers": "my_dit_lazy/transformer/lazy",
    "Optimum": "cat.png",
    "OpenVINO": "my_model_lazy/openvino_model.xml",
    "ONNX Runtime": "my_model_lazy/model.onnx",
}


def test_there_is_a_quick_start_for_each_audience() -> None:
    assert set(STARTS) == set(NEEDS) == set(LEAVES)
    assert all(len(start.blocks) >= 2 for start in STARTS.values())


#: The others are marked slow.
QUICK = "diffusers"


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(start, id=name, marks=[] if name == QUICK else pytest.mark.slow(seconds=60))
        for name, start in STARTS.items()
    ],
)
def test_a_quick_start_runs_as_written(start: QuickStart, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[start.audience])
    prepare(start, tmp_path)
    printed = run(start, tmp_path)
    assert (tmp_path / LEAVES[start.audience]).exists()
    tables = re.findall(r"^│ all .*computed (\d+\.\d)% ", printed, re.MULTILINE)
    if "summary" in "".join(code for _, code in start.blocks):
        assert tables, printed
        assert all(float(share) < 60 for share in tables), printed


def test_a_block_that_fails_is_shown(tmp_path: Path) -> None:
    broken = "\n## Quick start\n\n### A\n\n```sh\npip install lazycompress[x]\n```\n\n```python\nimport nowhere\n```\n"
    (start,) = quick_starts(broken).values()
    assert start == QuickStart("A", "x", [("python", "import nowhere\n")])
    with pytest.raises(RuntimeError, match="import nowhere"):
        run(start, tmp_path)


@pytest.mark.parametrize("page", DOCS, ids=[page.name for page in DOCS])
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", DOCS, ids=[page.name for page in DOCS])
def test_commands_that_pages_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for command in set(re.findall(r"(?:^\s*|`)(?:\.venv/bin/)?lazycompress ([a-z]+)", text, re.MULTILINE)):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0, command
    modules = re.findall(r"python -m (tests(?:\.\w+)+)", text)
    for module in modules:
        path = README.parent / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\s*(?:`)?make (\w[\w-]*)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile, target
