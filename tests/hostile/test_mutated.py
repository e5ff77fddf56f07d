"""Folders that differ anywhere from what was written: each is read, or refused in one line, and nothing large is made of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lazycompress.encoding import EncodingError, Zeros, decode, encode, outline
from lazycompress.errors import LazyCompressError
from lazycompress.export.card import CARD_FILE, check_files, read_card
from lazycompress.export.check import CHECK_FILE, recorded_calls
from lazycompress.files import read_tensors
from lazycompress.gates_file import decoded_example, read_gates, read_gates_card, read_recipe
from lazycompress.train.checkpoint import Checkpoint

from . import made

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from _places(inner, (*path, key))


@st.composite
def _changed_json(draw: st.DrawFn, text: str) -> str:
    """The same JSON with up to three values put in, taken out, or replaced."""
    data = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(data))
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        inner = data
        for key in path:
            inner = inner[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                inner[last] = draw(_VALUES)
            case "remove":
                del inner[last]
            case "add" if isinstance(inner, dict):
                inner[draw(st.text(max_size=10))] = draw(_VALUES)
            case _:
                inner.append(draw(_VALUES)) if isinstance(inner, list) else None
    return json.dumps(data)


@st.composite
def _changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The same bytes with some flipped, cut off, put in or doubled."""
    at = draw(st.integers(0, len(data) - 1))
    piece = draw(st.binary(max_size=16))
    return draw(
        st.sampled_from(
            [
                data[:at],
                data[at:],
                data[:at] + piece + data[at:],
                data[:at] + piece + data[at + len(piece) :],
                data + data,
            ]
        )
    )


@contextmanager
def _in_one_line() -> Iterator[None]:
    said = "nothing"
    try:
        yield
    except LazyCompressError as error:
        said = str(error)
    assert "\n" not in said
    assert 0 < len(said) <= 1000


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_gates(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gates = made.gates(Path(folder))
        card, tensors = gates / "gates.json", gates / "gates.safetensors"
        what = data.draw(st.sampled_from(["json", "json bytes", "tensors"]))
        if what == "json":
            card.write_text(data.draw(_changed_json(card.read_text())))
        else:
            path = card if what == "json bytes" else tensors
            path.write_bytes(data.draw(_changed_bytes(path.read_bytes())))
        with _in_one_line():
            found = read_gates_card(gates)
            read_recipe(found.recipe, card)
            assert read_gates(gates, found).grid.isfinite().all()
            decoded_example(found, card, Zeros(torch.device("meta")))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_exports(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export = made.export(Path(folder))
        card, record = export / CARD_FILE, export / CHECK_FILE
        if data.draw(st.booleans()):
            card.write_text(data.draw(_changed_json(card.read_text())))
        else:
            path = data.draw(st.sampled_from([card, record, export / "openvino_model.bin"]))
            before = path.read_bytes()
            path.write_bytes(data.draw(_changed_bytes(before)))
            if path != card and path.read_bytes() != before:
                with pytest.raises(LazyCompressError, match=r"should be|was changed"):
                    check_files(export, read_card(export))
        with _in_one_line():
            found = read_card(export)
            if "denoisers" not in found:
                recorded_calls(read_tensors(record), found, str(record))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trainings(data: st.DataObject) -> None:
    about = {"lazycompress": "1", "recipe": {"target": 0.5}, "model": "m", "timesteps": [1.0]}
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoint(folder, about)
        kept.put("run", {"x": torch.arange(3), "many": [1.5, (None, "a")]})
        path = data.draw(st.sampled_from(sorted(Path(folder).iterdir())))
        path.write_bytes(data.draw(_changed_bytes(path.read_bytes())))
        with _in_one_line():
            Checkpoint(folder, about).get("run")


_KEPT = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=10) | st.integers(-9, 9), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(_KEPT)
def test_what_is_kept_is_read_as_it_was(value: Any) -> None:
    def again(text: str) -> Any:
        return decode(json.loads(text), Zeros(torch.device("cpu")))

    assert again(json.dumps(encode(value, outline), allow_nan=False)) == value
    assert type(again(json.dumps(encode(value, outline)))) is type(value)


@settings(deadline=None)
@given(_VALUES)
def test_what_is_no_encoding_is_refused_or_harmless(node: Any) -> None:
    said = ""
    try:
        decode(node, Zeros(torch.device("meta")))
    except EncodingError as error:
        said = str(error)
    assert len(said) < 300
