"""Three things that must never happen: something of the user's is lost, code that a file names is run, NaN is called good."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.cli import main
from lazycompress.export.check import verify
from lazycompress.integrations.digits.model import WEIGHTS_DIR

from .export_models import small_dit, small_lazy

QUICK = ["--set", "train.enabled=false", "--set", "sampling.steps=4", "--set", "sampling.batch=2"]


# -- lost -------------------------------------------------------------------------------------------------------------


def test_a_model_is_not_replaced_by_its_own_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(WEIGHTS_DIR, tmp_path / "my_dit"))
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(SystemExit) as left:
        main(["apply", "--model", str(model), "--recipe", "digits_dit.yaml", *QUICK, str(model)])
    assert left.value.code == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_the_working_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.py").write_text("ten years")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for place in (".", tmp_path, "", "photos/.."):
        with pytest.raises(LazyCompressError):
            lazycompress.save(small_lazy(), place)
    with pytest.raises(SystemExit):
        main(["apply", "--model", str(WEIGHTS_DIR), "--recipe", "digits_dit.yaml", *QUICK, "."])
    assert (tmp_path / "code.py").read_text() == "ten years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code.py", "photos"]


# -- run --------------------------------------------------------------------------------------------------------------


def test_gates_do_not_import_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As version 0.1 wrote them: torch's reader of structures imports the module of an enum."""
    lazy = small_lazy()
    folder = lazycompress.save(lazy, tmp_path / "gates")
    (tmp_path / "evil_module.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = folder / "gates.json"
    data = json.loads(path.read_text())
    for later in ("files", "model", "weights", "dtype"):
        data.pop(later, None)
    key = {"__enum__": True, "fqn": "evil_module:Evil", "name": "A"}
    words = {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": []}
    data["example"] = {"spec": json.dumps([1, words]), "tensors": [], "others": {}}
    path.write_text(json.dumps(data))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - what it is comes last
        lazycompress.load(small_dit(), folder)
    assert not (tmp_path / "ran").exists(), "a module that the file names was imported"
    assert "evil_module" not in sys.modules
    assert isinstance(caught.value, LazyCompressError)


# -- called good ------------------------------------------------------------------------------------------------------


def test_a_model_with_nan_is_not_exported(tmp_path: Path) -> None:
    lazy = small_lazy()
    with torch.no_grad():
        next(p for name, p in lazy.model.named_parameters() if name == "proj_out_2.weight").view(-1)[0] = float("nan")
    with pytest.raises(LazyCompressError, match=r"proj_out_2\.weight .*NaN"):
        lazycompress.export(lazy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_nan_and_a_changed_weight_are_not_called_good(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = lazycompress.export(small_lazy(), tmp_path / "out")
    assert verify(folder).ok
    record = folder / "lazycompress.check.safetensors"
    kept = record.read_bytes()
    tensors = load_file(record)
    save_file({n: torch.full_like(v, torch.nan) if ".out." in n else v.clone() for n, v in tensors.items()}, record)
    with pytest.raises(LazyCompressError):
        assert not verify(folder).ok, "NaN was called good"
    record.write_bytes(kept)
    weights = folder / "openvino_model.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(LazyCompressError, match="was changed since it was exported"):
        verify(folder)
