"""Calibrations on disk: they come back as they were, and files of others are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lazycompress.errors import InputError
from lazycompress.plan.calibration import (
    ABOUT_FILE,
    TENSORS_FILE,
    Calibration,
    hash_of,
    load_calibration,
    save_calibration,
)

from .toy import Toy


def made(calls: int = 5, images: int = 2) -> Calibration:
    values = np.random.default_rng(0).normal(size=(images, calls, 3))
    return Calibration(
        timesteps=tuple(float(calls - k) for k in range(calls)),
        streams=(0,) * calls,
        gram=values @ values.swapaxes(1, 2),
        reach=np.full(calls, 0.1),
        gain=np.full(calls, 0.5),
        image=np.ones(images),
        weights=hash_of(Toy()),
        calls=44,
        scale=(1.0, 2.5, 20.0),
    )


def test_a_calibration_comes_back_as_it_was(tmp_path: Path) -> None:
    before = made()
    after = load_calibration(save_calibration(before, tmp_path / "it"))
    for name in ("timesteps", "streams", "weights", "calls", "scale"):
        assert getattr(after, name) == getattr(before, name)
    for name in ("gram", "reach", "gain", "image"):
        assert np.array_equal(getattr(after, name), getattr(before, name))


def test_weights_have_a_hash_of_their_own() -> None:
    other = Toy()
    other.first.data += 1
    assert hash_of(Toy()) == hash_of(Toy().forward) != hash_of(other)
    assert hash_of(lambda x: x) == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format 2"),
        ({"timesteps": "5"}, "timesteps is no list of numbers"),
        ({"scale": [1.0, 2.0]}, "a scale above 0 for each order"),
        ({"scale": [1.0, 0.0, 2.0]}, "a scale above 0 for each order"),
        ({"scale": [True, 1.0, 2.0]}, "scale is no list of numbers"),
        ({"timesteps": [1, 2, True, 4, 5]}, "timesteps is no list of numbers"),
        ({"timesteps": [1.0, 2.0]}, "is damaged"),
        ({"timesteps": [10**400, 2, 3, 4, 5]}, "too large"),
        ({"streams": [0.5] * 5}, "streams is no list"),
        ({"weights": 3}, "weights is a text"),
        ({"calls": None}, "calls a whole number"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = save_calibration(made(), tmp_path / "it")
    about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    (folder / ABOUT_FILE).write_text(json.dumps(about | change), encoding="utf-8")
    with pytest.raises(InputError, match=says) as caught:
        load_calibration(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', "\x00", "NaN", "[" * 100_000])
def test_descriptions_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    folder = save_calibration(made(), tmp_path / "it")
    (folder / ABOUT_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_calibration(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gram": np.ones((2, 5, 4))}, "gram of shape"),
        ({"gram": np.ones(3)}, "gram of 1 dimensions"),
        ({"gain": np.zeros(5)}, "above 0"),
        ({"gain": np.array([1.0, 2.0, np.nan, 1.0, 1.0])}, "finite"),
        ({"reach": np.ones(5, dtype=np.int64)}, "floating-point"),
        ({"image": np.ones(0)}, "calls and images"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = save_calibration(made(), tmp_path / "it")
    before = made()
    tensors = {name: getattr(before, name) for name in ("gram", "reach", "gain", "image")}
    save_file(tensors | change, folder / TENSORS_FILE)
    with pytest.raises(InputError, match=says):
        load_calibration(folder)


def test_tensors_that_are_missing_or_cut_off_are_refused(tmp_path: Path) -> None:
    folder = save_calibration(made(), tmp_path / "it")
    data = (folder / TENSORS_FILE).read_bytes()
    for wrong in (b"", data[:20], data[:-8], b"\xff" * 200):
        (folder / TENSORS_FILE).write_bytes(wrong)
        with pytest.raises(InputError, match="cannot be read"):
            load_calibration(folder)
    (folder / TENSORS_FILE).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_calibration(folder)
    with pytest.raises(InputError, match="holds no calibration"):
        load_calibration(tmp_path / "nowhere")
