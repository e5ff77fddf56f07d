"""Exports: every key of the card with every kind of wrong value, records that say nothing, files that were changed, NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lazycompress
from lazycompress.errors import ExportError
from lazycompress.export.check import CHECK_FILE, verify
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.integrations.diffusers import load_exported
from lazycompress.places import EXPORT

from . import made
from .harness import Try, command

_CARD = EXPORT.marker


def _good(folder: Path) -> object:
    """As the command does: what differs is a line."""
    report = verify(folder)
    if not report.ok:
        raise ExportError(str(report))
    return report


def _key(*keys: str | int, value: Any) -> Callable[[Path], object]:
    """Verify an export whose card has this value."""

    def act(folder: Path) -> object:
        made.change_json((copy := made.export(folder)) / _CARD, keys, value)
        return _good(copy)

    return act


def _record(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """Verify an export with another record, whose hash the card has."""

    def act(folder: Path) -> object:
        copy = made.export(folder)
        made.change_tensors(copy / CHECK_FILE, change)
        made.sealed_again(copy, EXPORT)
        return _good(copy)

    return act


def _bytes(name: str, change: Callable[[bytes], bytes], sealed: bool = False) -> Callable[[Path], object]:
    """Verify an export one of whose files has other bytes; sealed, the card has their hash."""

    def act(folder: Path) -> object:
        path = made.export(folder) / name
        path.write_bytes(change(path.read_bytes()))
        if sealed:
            made.sealed_again(path.parent, EXPORT)
        return _good(path.parent)

    return act


def _set(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[0].fill_(value)


#: A weight that is large enough to be stored in half the size.
_LARGE = "transformer_blocks.0.ff.net.0.proj.weight"


def _put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


def _export_with(value: float, where: str = "proj_out_2.weight", **options: Any) -> Callable[[Path], object]:
    """Export a model one of whose weights is this."""

    def act(folder: Path) -> object:
        with made.weights_with(value, where) as lazy:
            try:
                return lazycompress.export(lazy, folder / "out", **options)
            finally:
                assert not list(folder.iterdir()), "something was left"

    return act


def _flipped(data: bytes, at: int) -> bytes:
    """One bit of one weight."""
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def _gates_with_nan(act: Callable[[Path], object]) -> Callable[[Path], object]:
    def tried(folder: Path) -> object:
        gates = made.lazy().gates
        kept = gates.bias.detach().clone()
        with torch.no_grad():
            gates.bias[0, 0] = float("nan")
        try:
            return act(folder)
        finally:
            with torch.no_grad():
                gates.bias.copy_(kept)

    return tried


#: Of these keys some of the wrong values are right; of `parity` what is missing was not asked for.
_RIGHT = {
    "lazycompress": {"a string"},
    "stages": {"a list"},
    "recipe": {"null", "an object"},
    "files": {"missing", "an object"},
    "versions": {"an object"},
    "dense_macs": set[str](),
}

_KEYS = (
    "lazycompress", "format", "files", "stateful", "telemetry", "weights", "decide", "stages", "versions", "recipe", "inputs",
    "outputs", "timestep", "latents", "state", "branches", "dense_macs", "threshold", "grid", "expected_macs_ratio",
    "parity",
)  # fmt: skip

#: What is taken, because it says less and nothing wrong.
_TAKEN = {
    ("telemetry", "true"),
    ("stateful", "true"),
    ("threshold", "negative"),
    ("threshold", "huge"),
    ("state", "a list"),
}

TRIES = [
    *(
        Try(
            f"files: {key} of the card is {what}",
            _key(key, value=value),
            rf"lazycompress\.json.*({key}|NaN)|recorded calls|{key}",
        )
        for key in _KEYS
        for what, value in made.WRONG.items()
        if what not in _RIGHT.get(key, ()) and (key, what) not in _TAKEN
    ),
    *(
        Try(
            f"files: {key} of the card's state is {what}",
            _key("state", 0, key, value=value),
            r"state\.0|NaN|does not name",
        )
        for key in ("name", "shape", "dtype", "fill", "scale")
        for what, value in made.WRONG.items()
        if (key, what) not in {("fill", "negative"), ("fill", "huge"), ("shape", "a list"), ("name", "a string")}
    ),
    *(
        Try(f"files: {key} of the card's parity is {what}", _key("parity", key, value=value), r"parity|NaN")
        for key in ("difference", "largest", "tolerance", "flipped")
        for what, value in made.WRONG.items()
        if (key, what) != ("flipped", "null")
        and not (key in ("difference", "largest") and what in ("negative", "huge"))
    ),
    *(
        Try(f"files: the record {name}", _record(change), says)
        for name, change, says in (
            ("is empty", lambda t: t.clear(), "says nothing: no call is recorded"),
            ("has no decisions", lambda t: [t.pop(k) for k in list(t) if k.endswith("decisions")], "says nothing"),
            ("begins with call 1", lambda t: t.pop("0.decisions"), "says nothing"),
            ("holds NaN in an output", _set("2.out.0", float("nan")), "output sample of recorded call 2 holds NaN"),
            (
                "holds infinity in an output",
                _set("1.out.0", float("inf")),
                "output sample of recorded call 1 holds NaN or inf",
            ),
            (
                "holds NaN in the latents",
                _set("0.in.hidden_states", float("nan")),
                "hidden_states of recorded call 0 holds NaN",
            ),
            ("holds another output", _set("3.out.0", 1e3), "DIFFERS"),
            ("lacks an output", lambda t: t.pop("1.out.0"), "output sample of recorded call 1 is missing"),
            ("lacks an input", lambda t: t.pop("1.in.timestep"), "input timestep of recorded call 1 is missing"),
            (
                "has an empty output",
                _put("0.out.0", torch.zeros(0)),
                "sample of recorded call 0 is missing",
            ),
            ("has outputs of other sizes", _put("0.out.0", torch.ones(1, 2, 3)), "with the sizes"),
            (
                "has latents of rank 1",
                _put("0.in.hidden_states", torch.ones(3)),
                "hidden_states: the dimensions",
            ),
            (
                "has labels beyond the table",
                _put("0.in.class_labels", torch.tensor([10**6, 1])),
                "DIFFERS|does not run",
            ),
            ("has labels in floats", _put("0.in.class_labels", torch.ones(2)), "does not run|DIFFERS"),
            (
                "has decisions of other branches",
                _put("0.decisions", torch.zeros(9, 2)),
                "decisions of recorded call 0",
            ),
            (
                "has decisions of rank 1",
                _put("0.decisions", torch.zeros(2)),
                "decisions of recorded call 0",
            ),
        )
    ),
    *(
        Try(f"files: {name}", _bytes(file, change), says)
        for name, file, change, says in (
            (
                "a bit of a weight flipped",
                "openvino_model.bin",
                lambda d: _flipped(d, len(d) // 2),
                "was changed since",
            ),
            (
                "a bit of the last weight flipped",
                "openvino_model.bin",
                lambda d: _flipped(d, len(d) - 1),
                "was changed since",
            ),
            ("weights a byte short", "openvino_model.bin", lambda d: d[:-1], "should be"),
            ("weights gone", "openvino_model.bin", lambda d: b"", "should be"),
            ("the XML changed", "openvino_model.xml", lambda d: d.replace(b"If", b"fI", 1), "was changed since"),
            ("the record changed", CHECK_FILE, lambda d: _flipped(d, len(d) - 1), "was changed since"),
            ("the record a byte short", CHECK_FILE, lambda d: d[:-1], "should be"),
        )
    ),
    *(
        Try(f"files: with hashes to match, {name}", _bytes(file, change, sealed=True), says)
        for name, file, change, says in (
            ("the XML empty", "openvino_model.xml", lambda d: b"", "does not load"),
            ("the XML truncated", "openvino_model.xml", lambda d: d[: len(d) // 2], "does not load"),
            ("the XML random", "openvino_model.xml", lambda d: bytes(range(256)), "does not load"),
            ("weights empty", "openvino_model.bin", lambda d: b"", "does not load"),
            ("weights half", "openvino_model.bin", lambda d: d[: len(d) // 2], "does not load"),
            ("the record empty", CHECK_FILE, lambda d: b"", "no whole safetensors file"),
            ("the record random", CHECK_FILE, lambda d: bytes(range(256)), "no whole safetensors file"),
            ("weights NaN", "openvino_model.bin", lambda d: b"\xff" * len(d), "DIFFERS|does not load|does not run"),
        )
    ),
    Try("files: the card names a file above", _key("files", "../x", value=1), "not in the folder"),
    Try("files: the card names a file of the root", _key("files", "/etc/passwd", value=1), "not in the folder"),
    Try(
        "files: the card names a file that is not there",
        _key("files", "x.bin", value=1),
        "should be 1 bytes, there is nothing",
    ),
    Try("files: the card allows any difference", _key("parity", "tolerance", value=1e9), r"parity\.tolerance"),
    Try("files: the card names other latents", _key("latents", value="class_labels2"), "none of the inputs"),
    Try(
        "files: the card lacks an input of the file",
        _key("inputs", value=["hidden_states", "timestep"]),
        "class_labels",
    ),
    Try("files: the card is of several denoisers above", _key("denoisers", value=["../../x"]), r"lazycompress\.json"),
    Try("files: as it is", lambda folder: _good(made.export(folder)), None),
    Try("files: verify an empty folder", lambda folder: verify(folder), "is no export of lazycompress"),
    Try("files: verify None", lambda _: verify(None), "a path is a string"),  # type: ignore[arg-type]
    Try("files: verify a name of 300 letters", lambda folder: verify(folder / ("n" * 300)), "too long"),
    Try("files: verify a file", lambda folder: verify(made.export(folder) / _CARD), "is no export"),
    Try("files: verify gates", lambda folder: verify(made.gates(folder)), "is no export of lazycompress"),
    Try("files: run an empty folder in OpenVINO", lambda folder: OpenVINORunner(folder), "holds no openvino_model.xml"),
    Try("files: run an empty folder in ONNX", lambda folder: OnnxRunner(folder), "holds no model.onnx"),
    Try("files: run None", lambda _: OpenVINORunner(None), "a path is a string"),  # type: ignore[arg-type]
    Try(
        "files: a pipeline from one model's export",
        lambda folder: load_exported(made.export(folder)),
        "not for load_exported",
    ),
    Try("files: a pipeline from None", lambda _: load_exported(None), "a path is a string"),  # type: ignore[arg-type]
    *(
        Try(
            f"files: the command {name} of {what}",
            lambda folder, name=name, make=make: command(name, make(folder)),
            says,
        )
        for name in ("verify", "summary")
        for what, make, says in (
            ("an empty folder", lambda folder: folder, "is no export"),
            ("gates", made.gates, "is no export"),
            ("a file", lambda folder: made.export(folder) / _CARD, "is no export"),
            ("a name of 300 letters", lambda folder: folder / ("n" * 300), "too long"),
        )
    ),
    Try("files: export with NaN in a weight", _export_with(float("nan")), r"weight proj_out_2\.weight .*NaN"),
    Try(
        "files: export with infinity in a weight", _export_with(float("inf")), r"weight proj_out_2\.weight .*NaN or inf"
    ),
    Try(
        "files: export with NaN in a weight that the example does not read",
        _export_with(float("nan"), "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"),
        r"weight .*embedding_table.weight .*NaN",
    ),
    Try(
        "files: export in f16 with a weight beyond it",
        _export_with(1e6, _LARGE, weights="f16"),
        r"goes up to 1e\+06, beyond",
    ),
    Try(
        "files: export in f16 to ONNX with a weight beyond it",
        _export_with(1e6, _LARGE, weights="f16", format="onnx"),
        r"goes up to 1e\+06, beyond",
    ),
    Try(
        "files: export with NaN in the gates",
        _gates_with_nan(lambda folder: lazycompress.export(made.lazy(), folder / "out")),
        "bias of the gates holds NaN",
    ),
    Try(
        "files: save with NaN in the gates",
        _gates_with_nan(lambda folder: lazycompress.save(made.lazy(), folder / "out")),
        "gates' bias holds NaN",
    ),
]
