"""Trainings that are cut off and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lazycompress import LazyCompressError
from lazycompress.cli import main
from lazycompress.integrations.digits.model import WEIGHTS_DIR
from lazycompress.plan.kept import Kept
from lazycompress.recipe_loading import load_recipe
from lazycompress.runtime import LazyModel
from lazycompress.sampling import build_sampler
from lazycompress.train import checkpoint as checkpoints
from lazycompress.train import runs
from lazycompress.train.checkpoint import Checkpoint, discard, fingerprint
from tests.conftest import two_blocks

from .quick import PAPER, QUICK, learn, same_gates

SLOW = pytest.mark.slow(seconds=8)


class CutOff(BaseException):
    """Like a kill: nothing handles it."""


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("made", [3, 9])
def test_a_training_that_was_cut_off_makes_only_the_runs_that_are_missing(
    digits: nn.Module, whole: LazyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: int
) -> None:
    counted = {"linearise": 0, "run": 0}
    most = [10**6]

    def counting(name: str) -> Any:
        original = getattr(runs, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if sum(counted.values()) >= most[0]:
                raise CutOff
            counted[name] += 1
            return original(*args, **kwargs)

        return call

    for name in counted:
        monkeypatch.setattr(runs, name, counting(name))
    kept = {**QUICK, "train.checkpoint": str(tmp_path / "kept")}
    most[0] = made
    with pytest.raises(CutOff):
        learn(digits, kept)
    most[0] = 10**6
    counted.update(linearise=0, run=0)
    resumed = learn(digits, kept)
    left = sum(counted.values())
    same_gates(whole, resumed)
    assert resumed.training_report.history == whole.training_report.history
    assert resumed.training_report.forwards == whole.training_report.forwards
    runs_of_whole = len(list((tmp_path / "kept").glob("*.safetensors")))
    assert runs_of_whole > whole.training_report.runs
    assert left == runs_of_whole - made


@pytest.mark.slow(seconds=25)
def test_the_papers_training_goes_on_after_its_last_updates(
    short: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lazycompress.train import paper

    updates = [0]
    most = [10**6]
    original = paper._distance

    def counting(*args: Any) -> Any:
        if updates[0] >= most[0]:
            raise CutOff
        updates[0] += 1
        return original(*args)

    monkeypatch.setattr(paper, "_distance", counting)
    whole = learn(short, PAPER)
    assert updates[0] == 30
    kept = {**PAPER, "train.checkpoint": str(tmp_path / "kept")}
    updates[0], most[0] = 0, 25
    with pytest.raises(CutOff):
        learn(short, kept)
    updates[0], most[0] = 0, 10**6
    resumed = learn(short, kept)
    assert updates[0] == 10
    same_gates(whole, resumed)


@pytest.mark.slow(seconds=30)
def test_killed_for_real_and_resumed_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = tmp_path / "gates"
    settings = {"units": "branches", "train.effort": 0.5, "sampling.steps": 8, "sampling.batch": 8}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    arguments = ["apply", "--model", str(WEIGHTS_DIR), "--recipe", "digits_dit.yaml", *options, "--json", str(gates)]
    kept = tmp_path / "gates.training"
    program = [sys.executable, "-c", "from lazycompress.cli import main; import sys; main(sys.argv[1:])", *arguments]
    process = subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        while len(list(kept.glob("*.safetensors"))) < 3 and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() != 0, "it ended before it could be killed"
    assert not gates.exists()
    files = {path: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
    main([*arguments, "--resume"])
    report = json.loads(capsys.readouterr().out)
    assert report["macs_ratio"] <= 0.5
    assert (gates / "gates.safetensors").is_file()
    assert len(files) >= 3
    assert not kept.exists(), "what is done needs no checkpoint"
    assert "checkpoint: ''" in load_recipe(json.loads((gates / "gates.json").read_text())["recipe"]).to_yaml()
    with pytest.raises(SystemExit):
        main([*arguments, "--resume", "--overwrite"])
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.slow(seconds=20)
def test_without_resume_the_command_line_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = tmp_path / "gates"
    kept = tmp_path / "gates.training"
    kept.mkdir()
    (kept / "about.json").write_text("{}")  # which may be somebody else's
    options = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]
    arguments = ["apply", "--model", str(WEIGHTS_DIR), "--recipe", "digits_dit.yaml", *options, "--json", str(gates)]
    with pytest.raises(SystemExit):
        main([*arguments, "--resume"])
    assert "does not describe a training" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(arguments)
    assert "does not describe a training" in capsys.readouterr().err
    (kept / "about.json").unlink()
    Checkpoint(kept, {"lazycompress": "1", "recipe": {}, "model": "m", "timesteps": []}).put("run", 1.0)
    main(arguments)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train.seed": 1}, r"keeps another training: train\.seed was 0, now it is 1; delete the folder"),
        pytest.param({"target": 0.6}, r"target was 0\.5, now it is 0\.6", marks=SLOW),
        pytest.param(
            {"sampling.conditions": {"class_labels": {"kind": "integers", "high": 3}}},
            r"high was 10, now it is 3",
            marks=SLOW,
        ),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(
    short: nn.Module, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    kept = {**QUICK, "train.checkpoint": str(tmp_path / "kept")}
    _checkpoint_of(short, kept)
    with pytest.raises(LazyCompressError, match=expected) as caught:
        learn(short, {**kept, **change})
    assert "\n" not in str(caught.value)
    learn_export = load_recipe("digits_dit.yaml", {**kept, "export.format": "onnx"})
    assert learn_export.export.format == "onnx"


def _checkpoint_of(digits: nn.Module, overrides: dict[str, Any]) -> None:
    """What a training leaves that is cut off before its first run."""
    from lazycompress.train.checkpoint import about
    from lazycompress.train.trainer import tell_calls_apart

    lazy = learn(digits, {**overrides, "train.enabled": False})
    recipe = load_recipe("digits_dit.yaml", overrides)
    assert recipe.sampling is not None
    calls = tell_calls_apart(lazy, build_sampler(recipe.sampling))
    Checkpoint(recipe.train.checkpoint, about(lazy, recipe, calls[0]))


def test_a_checkpoint_of_another_model_is_refused(short: nn.Module, tmp_path: Path) -> None:
    kept = {**QUICK, "train.checkpoint": str(tmp_path / "kept")}
    _checkpoint_of(short, kept)
    other = two_blocks()
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "transformer_blocks.1" in name).add_(0.01)
    with pytest.raises(LazyCompressError, match="the model is another one"):
        learn(other, kept)


def test_what_was_kept_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "kept", {"lazycompress": "1", "recipe": {}, "model": "m", "timesteps": []})
    checkpoint.put("a", {"x": torch.arange(3), "n": 1.5})
    assert checkpoint.get("a")["x"].tolist() == [0, 1, 2]
    assert checkpoint.get("b") is None

    def torn(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of")
        raise CutOff

    monkeypatch.setattr(checkpoints, "write_tensors", torn)
    with pytest.raises(CutOff):
        checkpoint.put("b", 1)
    with pytest.raises(CutOff):
        checkpoint.put("a", 2)
    assert checkpoint.get("b") is None
    assert checkpoint.get("a")["n"] == 1.5


def test_the_fingerprint_of_a_model_is_its_own(short: nn.Module) -> None:
    one, two = (learn(short, {**QUICK, "train.enabled": False}) for _ in range(2))
    assert fingerprint(one) == fingerprint(two)


def test_what_a_calibration_kept_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    about = {"lazycompress": "0.1.0", "images": 2, "seed": 0, "budget": 2.0, "weights": ""}
    kept = Kept(tmp_path / "out.training", about)
    kept.put("dense-0", {"image": np.zeros(3)})
    other = tmp_path / "other.training"
    Kept(other, {"mine": 1})
    discard(tmp_path / "out.training")
    discard(other)
    assert [path.name for path in tmp_path.rglob("*")] == ["other.training", "about.json"]
    kept = Kept(tmp_path / "out.training", about)
    (tmp_path / "out.training" / "notes.txt").write_text("mine")
    discard(tmp_path / "out.training")
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["notes.txt"]


def test_what_cannot_be_deleted_stays_and_nothing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kept(tmp_path / "out.training", {"lazycompress": "0.1.0", "images": 2, "seed": 0, "budget": 2.0, "weights": ""})

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refused)
    discard(tmp_path / "out.training")
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["about.json"]


def test_learning_on_the_command_line_leaves_nothing_beside_its_folder(tmp_path: Path) -> None:
    settings = ["--set", "train.effort=0.01", "--set", "sampling.steps=4", "--set", "sampling.batch=2", "--json"]
    for seed in range(2):
        main(
            [
                "apply", "--model", str(WEIGHTS_DIR), "--recipe", "digits_dit.yaml", *settings, "--set",
                f"train.seed={seed}", "--overwrite", str(tmp_path / "plan"),
            ]
        )  # fmt: skip
        assert [path.name for path in tmp_path.iterdir()] == ["plan"]
