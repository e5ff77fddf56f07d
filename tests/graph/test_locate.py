"""Location knows no model, holds for models of real size, and can be read and seen."""

from __future__ import annotations

import ast
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import lazycompress
from lazycompress.cli import main
from lazycompress.graph.located import Branches
from lazycompress.integrations.digits.model import WEIGHTS_DIR
from tests.benchmarks.locate_scaling import large_model
from tests.zoo.specimen import built
from tests.zoo.styles_parts import AdaBlock, ImageDenoiser, image_inputs

ROOT = Path(lazycompress.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

#: What any program may say, although some model names a class or a module so.
WORDS = {"Attention", "Timesteps", "w3"}


def files() -> list[Path]:
    """The source of every model that diffusers defines, and of the parts they share."""
    import diffusers.models

    return sorted(Path(diffusers.models.__path__[0]).rglob("*.py"))


def names_of_models() -> set[str]:
    """Classes of all models of diffusers, and what these models call their modules where that is no plain word."""
    names: set[str] = set()
    for file in files():
        for cls in [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]:
            names.add(cls.name)
            for node in ast.walk(cls):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    names |= {
                        target.attr
                        for target in node.targets
                        if isinstance(target, ast.Attribute)
                        and re.search(r"[_0-9]", target.attr.strip("_"))
                        and re.match(r"(nn\.)?[A-Z]\w+$", ast.unparse(node.value.func))
                    }
    return {name for name in names - WORDS if not hasattr(torch.ops.aten, name)}


def test_no_name_of_any_model_in_the_sources() -> None:
    names = names_of_models()
    assert len(names) > 1000
    assert {"FluxTransformer2DModel", "HiDreamAttention", "transformer_blocks", "to_q", "attn1", "img_mlp"} <= names
    assert len(SOURCES) > 20
    found = {str(source.relative_to(ROOT)): set(re.findall(r"\w+", source.read_text())) & names for source in SOURCES}
    assert not {name: words for name, words in found.items() if words}


SVG = "{http://www.w3.org/2000/svg}"


def check_drawing(text: str, branches: Branches) -> None:
    """Every branch has a bar, whose length is its work; no bar covers another, and all is within the picture."""
    root = ElementTree.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    groups = root.findall(f"{SVG}g")
    assert len(groups) == len(branches)
    rows: dict[float, list[tuple[float, float]]] = {}
    lengths = []
    for group, branch in zip(groups, branches, strict=True):
        tip, bar = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert tip is not None
        assert bar is not None
        assert (tip.text or "").startswith(f"{branch.name}: {branch.kind}, ")
        x, y, w, h = (float(bar.attrib[key]) for key in ("x", "y", "width", "height"))
        assert x >= 0
        assert w > 0
        assert x + w <= width - 90  # what a row amounts to stands there
        assert y + h <= height
        rows.setdefault(y, []).append((x, x + w))
        lengths.append((w + 2) / branch.macs)
        for label in group.findall(f"{SVG}text"):
            assert float(label.attrib["x"]) + 0.5 * float(label.attrib["font-size"]) * len(label.text or "") <= x + w
    assert max(lengths) <= 1.05 * min(lengths)
    for bars in rows.values():
        assert all(a[1] <= b[0] for a, b in pairwise(bars))
    gaps = sorted(rows)
    assert all(b - a >= 16 for a, b in pairwise(gaps))


@pytest.mark.slow(seconds=40)
def test_a_model_of_57_blocks_on_the_meta_device() -> None:
    branches = lazycompress.locate(*large_model())
    assert Counter(branch.kind for branch in branches) == {"joint-attention": 19, "mlp": 38, "parallel": 38}
    assert len({branch.name for branch in branches}) == 95
    assert sum(branch.macs for branch in branches) > 0.99 * branches.dense_macs
    check_drawing(branches.svg(), branches)


def test_branches_print_as_a_table_and_draw_themselves() -> None:
    model = built(ImageDenoiser, block=AdaBlock, depth=3)()
    branches = lazycompress.locate(model, image_inputs(2, 0))
    assert [branch.kind for branch in branches] == ["attention", "mlp"] * 3
    lines = str(branches).splitlines()
    share = sum(branch.macs for branch in branches) / branches.dense_macs
    assert 0.5 < share < 1
    for branch in branches:
        (line,) = [line for line in lines if f" {branch.name} " in line]
        assert f"{branch.macs / 1e6:,.3f}" in line
        assert f"{branch.macs / branches.dense_macs:.1%}" in line
    assert any("all branches" in line and f"{share:.1%}" in line for line in lines)
    check_drawing(branches.svg(), branches)
    assert branches.html().count("<tr><td>") == 6
    assert branches.svg() in branches.html()


def test_the_command_writes_drawing_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, html = tmp_path / "model.svg", tmp_path / "model.html"
    arguments = ["--model", str(WEIGHTS_DIR), "--recipe", "digits_dit.yaml"]
    main(["locate", *arguments, "--svg", str(svg), "--html", str(html)])
    assert "everything else" in capsys.readouterr().out
    assert svg.read_text() in html.read_text()
    assert html.read_text().startswith("<!doctype html>")
    with pytest.raises(SystemExit):
        main(["locate", *arguments, "--html", str(tmp_path / "missing" / "model.html")])
    error = capsys.readouterr().err.strip()
    assert "cannot write" in error
    assert "\n" not in error
