"""The command line on the bundled model: what it prints, writes, and exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lazycompress
from lazycompress.cli import main
from lazycompress.integrations.digits.model import WEIGHTS_DIR
from tests.export_models import small_dit, small_lazy

MODEL = ["--model", str(WEIGHTS_DIR), "--recipe", "digits_dit.yaml"]
QUICK = ["--set", "train.effort=0.25", "--set", "sampling.steps=8", "--set", "sampling.batch=4"]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    return line


def test_a_reader_that_has_enough_ends_it_without_a_traceback() -> None:
    command = f"{sys.executable} -c 'from lazycompress.cli import main; main([\"recipes\"])' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_locate_prints_the_branches(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["locate", *MODEL, "--svg", str(tmp_path / "model.svg")])
    text = capsys.readouterr().out
    assert "transformer_blocks.5.attn1" in text
    assert "attention" in text
    assert (tmp_path / "model.svg").read_text().startswith("<svg")
    main(["locate", *MODEL, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in rows] == ["attention", "mlp"] * 6


def test_export_then_summary_then_verify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, gates, out = (str(tmp_path / name) for name in ("model", "gates", "out"))
    dit: Any = small_dit()
    dit.save_pretrained(model)
    lazycompress.save(small_lazy(), gates)
    main(["export", "--model", model, "--gates", gates, "--format", "openvino", out])
    capsys.readouterr()
    main(["summary", out])
    assert "openvino, 2 branches" in capsys.readouterr().out
    main(["verify", out, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["ok"]
    assert [(file["directory"], file["flipped"]) for file in said["files"]] == [(out, None)]
    assert "overwrite=True" in fails(capsys, ["export", "--model", model, "--gates", gates, out])


@pytest.mark.slow(seconds=60)
def test_apply_then_export_then_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gates, out = str(tmp_path / "gates"), str(tmp_path / "out")
    main(["apply", *MODEL, *QUICK, "--set", "target=0.6", "--json", gates])
    report = json.loads(capsys.readouterr().out)
    assert 0.45 < report["share"] <= 0.6
    main(["export", "--model", str(WEIGHTS_DIR), "--gates", gates, "--format", "openvino", out])
    capsys.readouterr()
    main(["summary", out])
    text = capsys.readouterr().out
    assert "openvino, 12 branches" in text
    assert f"expected: {report['share']:.1%}" in text
    main(["verify", out, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["ok"]
    assert [(file["directory"], file["flipped"]) for file in said["files"]] == [(out, None)]
    assert "overwrite=True" in fails(capsys, ["export", "--model", str(WEIGHTS_DIR), "--gates", gates, out])


def test_recipes_are_listed_printed_and_documented(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    assert "digits_dit.yaml" in capsys.readouterr().out
    main(["recipes", "digits_dit.yaml", "--json"])
    assert json.loads(capsys.readouterr().out)["sampling"]["steps"] == 50
    main(["recipes", "--reference"])
    text = capsys.readouterr().out
    page = Path(__file__).parent.parent / "docs" / "recipes.md"
    assert text.strip() == page.read_text().strip(), "docs/recipes.md is not up to date: make docs"
    assert "| `guards.max_reuse` |" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["locate", "--model", "nowhere", "--recipe", "digits_dit.yaml"], "neither config.json nor model_index.json"),
        (["locate", "--model", str(WEIGHTS_DIR)], "no sampling section"),
        (["locate", *MODEL, "--set", "target"], "write KEY=VALUE"),
        (["locate", *MODEL, "--set", "tarket=0.4"], "did you mean 'target'"),
        (["summary", "nowhere"], r"lazycompress.json is missing"),
        (["recipes", "nope"], "no recipe 'nope'"),
        (["export", "--model", str(WEIGHTS_DIR), "--gates", "nowhere", "out"], "holds no gates"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_one(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # whatever lies in the folder that tests are run in: a demo's `out`, say
    assert expected in fails(capsys, arguments)


@pytest.mark.parametrize("card", ["{", "[]", "{}"])
@pytest.mark.parametrize("command", ["summary", "verify"])
def test_a_card_that_no_export_wrote_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, card: str
) -> None:
    (tmp_path / "lazycompress.json").write_text(card)
    assert str(tmp_path / "lazycompress.json") in fails(capsys, [command, str(tmp_path)])


def test_wrong_usage_exits_with_two() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["locate"])
    assert caught.value.code == 2
