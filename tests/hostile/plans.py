"""Tries: plans that are made from what was learned before, and wrapped files beside their dense ones."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from safetensors.torch import save_file
from torch import nn

import lazycompress
from lazycompress.cli import main
from lazycompress.errors import LazyCompressError
from lazycompress.lazy.calls import Reader
from lazycompress.lazy.engine import Engine
from lazycompress.lazy.learn import Search
from lazycompress.lazy.model import LazyModule
from lazycompress.lazy.presets import presets
from lazycompress.plan.calibration import Calibration
from lazycompress.plan.plan import even
from lazycompress.recipe import Guards
from lazycompress.wrap.verify import verify_wrapped

from ..lazy.models import Denoiser
from ..wrap.models import openvino_model
from .harness import Try

TIMES = tuple(1000.0 - 100 * k for k in range(10))


@functools.cache
def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return Denoiser()


def _lazy(calibration: Calibration | None = None) -> LazyModule:
    planner = None if calibration is None else Search(calibration, 2, Guards())
    return LazyModule(_model(), Engine(Reader.of(_model()), even(TIMES, 0.5), planner))


@functools.cache
def _shelf() -> Path:
    """A plan with its calibration, a wrapped file and its dense one; made once, copied for each try."""
    root = Path(tempfile.mkdtemp())
    waves = np.exp(-np.abs(np.subtract.outer(np.arange(10), np.arange(10))) / 5)
    calibration = Calibration(TIMES, (0,) * 10, waves[None], np.ones(10), np.ones(10), np.ones(1))
    lazycompress.save(_lazy(calibration), root / "plan")
    ov.save_model(openvino_model(), root / "dense.xml")
    lazycompress.wrap(root / "dense.xml", even(TIMES, 0.5), root / "wrapped")
    return root


def _there(folder: Path) -> Path:
    shutil.copytree(_shelf(), folder / "all")
    return folder / "all"


def _spoilt(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Presets of the plan's folder, a file of which is another one."""

    def act(folder: Path) -> object:
        path = _there(folder) / "plan" / name
        path.write_bytes(change(path.read_bytes()))
        return presets(folder / "all" / "plan")

    return act


def _key(file: str, key: str, value: Any) -> Callable[[Path], object]:
    return _spoilt(file, lambda old: json.dumps(json.loads(old) | {key: value}).encode())


def _planned(*arguments: str) -> Callable[[Path], object]:
    """A plan for a target, and perhaps for timesteps, both as JSON."""

    def act(folder: Path) -> object:
        (preset,) = presets(_there(folder) / "plan").values()
        return preset.search.plan(*(json.loads(argument) for argument in arguments))

    return act


def _verified(wrapped: str, dense: str, **more: str) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        there = _there(folder)
        (there / "empty").mkdir()
        (there / "text.xml").write_text("no model", encoding="utf-8")
        (there / "text.onnx").write_text("no model", encoding="utf-8")
        (there / "text.safetensors").write_text("no tensors", encoding="utf-8")
        half = {"hidden_states": torch.zeros(1, 4, 5, 5), "timestep": torch.ones(1, dtype=torch.bfloat16)}
        save_file(half, there / "half.safetensors")
        ov.save_model(openvino_model(channels=8), there / "wider.xml")
        return verify_wrapped(there / wrapped, there / dense, **{key: there / value for key, value in more.items()})

    return act


def _started(
    calibration: Callable[[Path], Any], model: nn.Module | None = None, **recipe: Any
) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        return lazycompress.apply(model or _model(), recipe, calibration=calibration(_there(folder)))

    return act


def _usage(folder: Path) -> object:
    """Wrong usage exits with 2; what is said there is argparse's."""
    try:
        main(["plan", "--calibration", str(_there(folder) / "plan"), "--steps", "-3"])
    except SystemExit as error:
        raise LazyCompressError(f"exit code {error.code}") from None
    return None


TRIES = [
    Try("plans: as they are", lambda folder: presets(_there(folder) / "plan"), None),
    Try("plans: the calibration alone", lambda folder: presets(_there(folder) / "plan" / "calibration"), None),
    Try("plans: from None", lambda _: presets(None), "a path is a string"),  # type: ignore[arg-type]
    Try("plans: from an empty folder", lambda folder: presets(folder), "no plan and no calibration"),
    Try("plans: from a file", lambda folder: presets(_there(folder) / "dense.xml"), "no plan and no calibration"),
    *(
        Try(f"plans: {name} {what}", _spoilt(name, change), says)
        for name, says in (
            ("plan.json", "plan.json"),
            ("calibration/calibration.json", "calibrat"),
            ("calibration/calibration.safetensors", "calibrat"),
        )
        for what, change in (
            ("empty", lambda _: b""),
            ("binary", lambda _: b"\xff\x00\xfe"),
            ("cut in half", lambda old: old[: len(old) // 2]),
            ("a list", lambda _: b"[]"),
        )
    ),
    *(
        Try(
            f"plans: {key} of the calibration is {value!r}",
            _key("calibration/calibration.json", key, value),
            "calibrat",
        )
        for key, value in (
            ("format", 99),
            ("format", None),
            ("timesteps", "x"),
            ("timesteps", []),
            ("timesteps", [1.0]),
            ("streams", [0.5]),
            ("streams", None),
            ("scale", [0, 0, 0]),
            ("scale", {}),
            ("weights", 7),
            ("calls", "many"),
            ("timesteps", [1e999] * 10),
        )
    ),
    *(
        Try(f"plans: a target of {target}", _planned(target), "target is a share")
        for target in ("0", "1.5", "-1", "NaN")
    ),
    *(
        Try(f"plans: timesteps {times}", _planned("0.5", times), says)
        for times, says in (
            ("[]", "one timestep or more"),
            ("[NaN]", "finite"),
            ("[1, Infinity]", "finite"),
            (json.dumps([float(k) for k in range(100_000)]), "at most"),
        )
    ),
    Try("plans: three steps less than none", _usage, "exit code 2"),
    Try("plans: apply from a number", _started(lambda _: 7), "a path is a string"),
    Try("plans: apply from an empty string", _started(lambda _: ""), "path"),
    Try(
        "plans: apply from a calibration alone",
        _started(lambda there: there / "plan" / "calibration"),
        "lazycompress.save writes",
    ),
    Try("plans: apply to another model", _started(lambda there: there / "plan", nn.ReLU()), "of a Denoiser.*ReLU"),
    Try("plans: apply as it is", _started(lambda there: there / "plan"), None),
    Try("plans: apply with a PSNR to keep", _started(lambda there: there / "plan", psnr=30), "need runs of the model"),
    Try(
        "plans: apply below what computes always",
        _started(lambda there: there / "plan", target=0.05),
        "raise the target",
    ),
    Try("plans: verify beside None", lambda f: verify_wrapped(_there(f) / "wrapped", None), "a path is a string"),  # type: ignore[arg-type]
    Try("plans: verify beside nothing", _verified("wrapped", "nowhere"), "there is no file"),
    Try("plans: verify beside an empty folder", _verified("wrapped", "empty"), "there is no file"),
    Try("plans: verify beside a text", _verified("wrapped", "text.xml"), "cannot read"),
    Try("plans: verify beside a text as ONNX", _verified("wrapped", "text.onnx"), "does not load"),
    Try("plans: verify beside a file of weights", _verified("wrapped", "dense.bin"), "neither an OpenVINO IR"),
    Try("plans: verify what is no export", _verified("plan", "dense.xml"), "plan"),
    Try("plans: verify an empty folder", _verified("empty", "dense.xml"), "empty"),
    Try(
        "plans: verify with a text for inputs",
        _verified("wrapped", "dense.xml", inputs="text.safetensors"),
        "text.safetensors",
    ),
    Try(
        "plans: verify with inputs in bfloat16",
        _verified("wrapped", "dense.xml", inputs="half.safetensors"),
        "timestep is torch.bfloat16",
    ),
    Try("plans: verify beside a model of more channels", _verified("wrapped", "wider.xml"), "outputs of the sizes"),
    Try(
        "plans: apply to what is lazy",
        lambda f: lazycompress.apply(_lazy(), calibration=_there(f) / "plan"),
        "is lazy already",
    ),
    Try("plans: verify as it is", _verified("wrapped", "dense.xml"), None),
]
