"""Folders of gates: every key of every file with every kind of wrong value, and files that are none."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lazycompress

from . import made
from .harness import Try

_JSON, _TENSORS = "gates.json", "gates.safetensors"


def _load(folder: Path, model: nn.Module | None = None, **options: Any) -> object:
    return lazycompress.load(model or made.dense(), folder, **options)


def _key(*keys: str | int, value: Any) -> Callable[[Path], object]:
    """Load gates whose `gates.json` has this value."""

    def act(folder: Path) -> object:
        made.change_json((copy := made.gates(folder)) / _JSON, keys, value)
        return _load(copy)

    return act


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """Load gates whose tensors were changed."""

    def act(folder: Path) -> object:
        made.change_tensors((copy := made.gates(folder)) / _TENSORS, change)
        return _load(copy)

    return act


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Load gates one of whose files has other bytes."""

    def act(folder: Path) -> object:
        path = made.gates(folder) / name
        path.write_bytes(change(path.read_bytes()))
        return _load(path.parent)

    return act


def _old(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Load gates as version 0.1 wrote them, the call in torch's words, with a change."""

    def act(folder: Path) -> object:
        path = made.gates(folder) / _JSON
        data = json.loads(path.read_text())
        for key in ("model", "weights", "dtype", "files"):
            del data[key]
        entries = data["example"]["dict"]
        leaf = {"type": None, "context": None, "children_spec": []}
        words = {
            "type": "builtins.dict",
            "context": json.dumps([name for name, _ in entries]),
            "children_spec": [leaf for _ in entries],
        }
        tensors = [{"name": name, **node["tensor"]} for name, node in entries]
        example = {"spec": words, "tensors": tensors, "others": {}}
        change(example)
        if not isinstance(example["spec"], str):
            example["spec"] = json.dumps([1, example["spec"]])
        path.write_text(json.dumps(data | {"example": example}))
        return _load(path.parent)

    return act


def _word(name: str) -> dict[str, Any]:
    return {"type": name, "context": "null", "children_spec": []}


#: Of these keys some of the wrong values are right: what is not given is not known, or is none.
_RIGHT = {
    "lazycompress": {"a string"},
    "model": {"missing"},
    "weights": {"missing"},
    "dtype": {"missing", "a string"},
    "recipe": {"null"},
    "timestep_input": {"null"},
    "moving": {"missing", "a list"},
    "targets": {"a list"},
    "files": {"missing"},
}

_BRANCH = ("name", "kind", "macs", "width")

_SETS: dict[str, tuple[str, Any, str]] = {
    "order 99": ("order", torch.tensor(99), r"'order' is 99; it may be 0 to 2"),
    "order -1": ("order", torch.tensor(-1), r"'order' is -1"),
    "order of floats": ("order", torch.tensor(1.0), r"'order' is F32"),
    "static 2": ("static", torch.tensor(2), r"'static' is 2"),
    "longest 0": ("longest", torch.tensor(0), r"'longest' is 0"),
    "direction 0": ("direction", torch.tensor(0.0), r"'direction' is 0"),
    "direction of the other way": ("direction", torch.tensor(-1.0), r"'direction' is -1"),
    "slope negative": ("slope", torch.tensor(-1.0), r"'slope' is -1"),
    "phase negative": ("phase", torch.tensor(-1.0), r"'phase' is -1"),
    "threshold NaN": ("threshold", torch.tensor(float("nan")), r"'threshold' holds NaN"),
    "threshold of two": ("threshold", torch.zeros(2), r"'threshold' is F32 \[2\]"),
    "grid empty": ("grid", torch.zeros(0), r"'grid' is F32 \[0\]"),
    "grid of another length": ("grid", torch.arange(7.0), r"'grid' is F32 \[7\]"),
    "grid falls": ("grid", torch.arange(50.0).flip(0), r"'grid' do not rise"),
    "grid of equal times": ("grid", torch.zeros(50), r"'grid' do not rise"),
    "grid of other times": ("grid", torch.arange(50.0), r"other timesteps than gates\.json"),
    "grid NaN": ("grid", torch.full((50,), float("nan")), r"'grid' holds NaN"),
    "bias NaN": ("bias", torch.full((2, 50), float("nan")), r"'bias' holds NaN"),
    "bias infinite": ("bias", torch.full((2, 50), float("inf")), r"'bias' holds NaN or infinity"),
    "bias of another shape": ("bias", torch.zeros(7, 3), r"'bias' is F32 \[7, 3\]"),
    "bias in float16": ("bias", torch.zeros(2, 50, dtype=torch.float16), r"'bias' is F16"),
    "rank NaN": ("rank", torch.full((2, 50), float("nan")), r"'rank' holds NaN"),
    "weights NaN": ("weights.0", torch.full((50, 32), float("nan")), r"'weights\.0' holds NaN"),
    "weights of another width": ("weights.1", torch.zeros(50, 7), r"'weights\.1' is F32 \[50, 7\]"),
    "frontier of floats": ("frontier", torch.zeros(0, 2, 50), r"'frontier' is F32"),
    "frontier of other branches": ("frontier", torch.zeros(1, 3, 50, dtype=torch.bool), r"'frontier' is BOOL \[1, 3"),
    "a tensor too many": ("evil", torch.zeros(1), r"unknown tensor 'evil'"),
    "a third branch's weights": ("weights.2", torch.zeros(50, 32), r"unknown tensor 'weights\.2'"),
}


def _other_weights(folder: Path) -> object:
    with made.weights_with(0.25):
        copy = lazycompress.save(made.lazy(), folder / "gates")
    return _load(copy)


_DEEP = "[" * 100_000 + "]" * 100_000

TRIES = [
    *(
        Try(
            f"gates: {key} is {what}",
            _key(key, value=value),
            rf"gates\.json.*({key}|NaN)|of a zzz|called 'zzz'|example",
        )
        for key in (
            "lazycompress",
            "model",
            "weights",
            "dtype",
            "recipe",
            "direction",
            "timestep_input",
            "branches",
            "grid",
            "targets",
            "example",
            "files",
        )
        for what, value in made.WRONG.items()
        if what not in _RIGHT.get(key, ())
    ),
    *(
        Try(
            f"gates: {key} of a branch is {what}",
            _key("branches", 0, key, value=value),
            r"gates\.json.*(branches\.0|NaN)",
        )
        for key in _BRANCH
        for what, value in made.WRONG.items()
        if (key, what) not in {("name", "a string"), ("kind", "a string")}
    ),
    *(
        Try(f"gates: {name}", _tensors(lambda tensors, key=key, value=value: tensors.update({key: value})), says)
        for name, (key, value, says) in _SETS.items()
    ),
    *(
        Try(f"gates: {key} missing", _tensors(lambda tensors, key=key: tensors.pop(key)), rf"'{key}' is missing")
        for key in (
            "grid",
            "bias",
            "rank",
            "frontier",
            "threshold",
            "direction",
            "slope",
            "phase",
            "order",
            "static",
            "longest",
            "weights.0",
            "weights.1",
        )
    ),
    *(
        Try(f"gates: safetensors {name}", _bytes(_TENSORS, change), says)
        for name, change, says in (
            ("empty", lambda _: b"", "no whole safetensors file"),
            ("of 4 bytes", lambda data: data[:4], "no whole safetensors file"),
            ("header only", lambda data: data[:8], "no whole safetensors file"),
            ("without its last byte", lambda data: data[:-1], "no whole safetensors file"),
            ("with a byte too many", lambda data: data + b"x", "no whole safetensors file"),
            ("with a huge header", lambda data: (2**62).to_bytes(8, "little") + data[8:], "no whole safetensors file"),
            (
                "with a header of a gigabyte",
                lambda data: (10**9).to_bytes(8, "little") + data[8:],
                "no whole safetensors",
            ),
            ("whose header is no JSON", lambda data: data[:8] + b"?" * (len(data) - 8), "no whole safetensors file"),
            ("random", lambda data: bytes(range(256)) * 8, "no whole safetensors file"),
            ("a pickle", lambda _: pickle.dumps({"grid": 1}), "no whole safetensors file"),
            ("a shell script", lambda _: b"#!/bin/sh\ntouch hacked\n", "no whole safetensors file"),
        )
    ),
    *(
        Try(f"gates: json {name}", _bytes(_JSON, change), says)
        for name, change, says in (
            ("empty", lambda _: b"", "is not JSON"),
            ("a list", lambda _: b"[]", "gates.json"),
            ("a number", lambda _: b"7", "gates.json"),
            ("null", lambda _: b"null", "gates.json"),
            ("truncated", lambda data: data[:100], "is not JSON"),
            ("binary", lambda _: b"\xff\x00\x80", "is not UTF-8"),
            ("UTF-16", lambda data: data.decode().encode("utf-16"), "is not UTF-8"),
            ("nested deeply", lambda _: _DEEP.encode(), "nested too deeply"),
            ("of deep objects", lambda _: b'{"a":' * 100_000, "nested too deeply"),
            ("with a key twice", lambda data: data.replace(b'"model"', b'"dtype"'), "'dtype' is given twice"),
            ("with a number of 10,000 digits", lambda data: data.replace(b"0.0,", b"9" * 10_000 + b","), "gates.json"),
            ("with an infinite number", lambda data: data.replace(b"0.0,", b"1e999,", 1), "gates.json: grid"),
            ("with an unknown key", lambda data: data.replace(b"{", b'{"evil": 1,', 1), "unknown key 'evil'"),
            ("of several models", lambda _: b'{"denoisers": ["a", "b"]}', "several models"),
        )
    ),
    *(
        Try(f"gates: example {name}", _key("example", value=node), says)
        for name, node, says in (
            (
                "with a huge shape",
                {"dict": [["x", {"tensor": {"shape": [10**9, 10**9], "dtype": "float32"}}]]},
                "bytes",
            ),
            ("with a negative shape", {"dict": [["x", {"tensor": {"shape": [-1], "dtype": "float32"}}]]}, "shape"),
            ("with an empty shape", {"dict": [["x", {"tensor": {"shape": [0, 4, 4], "dtype": "float32"}}]]}, "shape"),
            ("with a fractional shape", {"dict": [["x", {"tensor": {"shape": [1.5], "dtype": "float32"}}]]}, "shape"),
            ("with a rank of 40", {"dict": [["x", {"tensor": {"shape": [1] * 40, "dtype": "float32"}}]]}, "shape"),
            ("of dtype load", {"dict": [["x", {"tensor": {"shape": [1], "dtype": "load"}}]]}, "no dtype 'load'"),
            ("of dtype __class__", {"dict": [["x", {"tensor": {"shape": [1], "dtype": "__class__"}}]]}, "no dtype"),
            ("of dtype zzz", {"dict": [["x", {"tensor": {"shape": [1], "dtype": "zzz"}}]]}, "no dtype 'zzz'"),
            ("of a list as dtype", {"dict": [["x", {"tensor": {"shape": [1], "dtype": []}}]]}, "no dtype"),
            ("without a shape", {"dict": [["x", {"tensor": {"dtype": "float32"}}]]}, "without shape and dtype"),
            ("that is a list", [1, 2], "no dictionary of arguments"),
            ("with numbers as names", {"dict": [[1, 2]]}, "no dictionary of arguments"),
            ("with a key alone", {"dict": [["x"]]}, "no key and value"),
            ("with an unknown tag", {"call": "os.system"}, "'call'"),
            ("with two tags", {"list": [], "tuple": []}, "none of"),
            ("without the latents", {"dict": [["timestep", 1]]}, "inputs do not fit|without a floating-point tensor"),
            ("with a huge integer", {"dict": [["x", 10**30]]}, "64 bits"),
            ("of an unknown float", {"dict": [["x", {"float": "1"}]]}, "'float'"),
            ("with arguments of others", {"dict": [["zzz", 1]]}, "do not fit"),
        )
    ),
    *(
        Try(f"gates: of version 0.1, {name}", _old(change), says)
        for name, change, says in (
            ("naming a module", lambda e: e.update(spec=_word("os.system")), "'os.system'"),
            (
                "naming an enum",
                lambda e: e["spec"].update(context='{"__enum__": true, "fqn": "os"}'),
                "no list of keys",
            ),
            ("naming a namedtuple", lambda e: e.update(spec=_word("collections.namedtuple")), "none of dict"),
            ("naming a deque", lambda e: e.update(spec=_word("collections.deque")), "none of dict"),
            ("spec garbage", lambda e: e.update(spec="[9, {}]"), "none that version 0.1"),
            ("spec no JSON", lambda e: e.update(spec="{"), "not JSON"),
            (
                "spec a leaf",
                lambda e: e.update(spec={"type": None, "context": None, "children_spec": []}),
                "more tensors",
            ),
            ("too few tensors", lambda e: e["tensors"].pop(), "fewer tensors"),
            ("others by names", lambda e: e["others"].update(a=1), "'a', which is no number"),
            ("others beyond the end", lambda e: e["others"].update({"999": 1}), "place 999"),
            ("others an object", lambda e: e["others"].update({"0": {}}), "others holds"),
            ("others a list", lambda e: e.update(others=[]), "others an object"),
            ("a key too many", lambda e: e.update(evil=1), "keys other than"),
            ("dtype load", lambda e: e["tensors"][0].update(dtype="load"), "no dtype 'load'"),
            ("shape huge", lambda e: e["tensors"][0].update(shape=[10**9, 10**9]), "bytes"),
            ("tensors of null", lambda e: e.update(tensors=[None]), "without name"),
            ("as it was", lambda e: None, None),
        )
    ),
    Try("gates: recipe with an unknown key", _key("recipe", value={"evil": 1}), "recipe.*evil"),
    Try("gates: recipe with a target of 5", _key("recipe", value={"target": 5}), "recipe.*target"),
    Try("gates: width of 10^12", _key("branches", 0, "width", value=10**12), r"branches\.0\.width"),
    Try("gates: no branches", _key("branches", value=[]), "branches"),
    Try("gates: as they are", lambda folder: _load(made.gates(folder)), None),
    Try("gates: for a model of another class", lambda folder: _load(made.gates(folder), nn.ReLU()), "of a DiT.*ReLU"),
    Try("gates: for a model without parameters", lambda f: _load(made.gates(f), nn.Identity()), "of a DiT.*Identity"),
    Try(
        "gates: for a model without parameters, all the same",
        lambda folder: _load(made.gates(folder), nn.Identity(), strict=False),
        "do not fit",
    ),
    Try(
        "gates: for no model",
        lambda folder: lazycompress.load(7, made.gates(folder)),
        "diffusers pipeline; there was int",
    ),  # type: ignore[arg-type]
    Try("gates: of other weights", _other_weights, "other weights of DiT.*strict=False"),
    Try("gates: of an empty folder", lambda folder: _load(folder), "gates.safetensors is missing"),
    Try("gates: of no folder", lambda folder: _load(folder / "nothing"), "gates.safetensors is missing"),
    Try("gates: of a file", lambda folder: _load(made.gates(folder) / _JSON), "is missing"),
    Try("gates: of None", lambda _: _load(None), "a path is a string.*NoneType"),  # type: ignore[arg-type]
    Try("gates: of 7", lambda _: _load(7), "a path is a string.*int"),  # type: ignore[arg-type]
    Try("gates: of bytes", lambda _: _load(b"x"), "a path is a string.*bytes"),  # type: ignore[arg-type]
    Try("gates: of an empty path", lambda _: _load(""), "path is empty"),  # type: ignore[arg-type]
    Try("gates: of a path with a zero byte", lambda _: _load("a\0b"), "zero byte"),  # type: ignore[arg-type]
    Try("gates: of a name of 300 letters", lambda folder: _load(folder / ("n" * 300)), "too long"),
]
