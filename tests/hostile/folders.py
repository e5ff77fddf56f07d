"""Folders of diffusers' models and pipelines, and of trainings: broken ones, and ones that name code to import."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lazycompress.integrations.diffusers import load_denoiser, load_lazy, load_pipeline
from lazycompress.integrations.digits.model import WEIGHTS_DIR
from lazycompress.train.checkpoint import ABOUT_FILE, Checkpoint, begin, discard
from lazycompress.train.distributed import Group

from . import made
from .harness import Try, command

_INDEX = "model_index.json"
_ABOUT: dict[str, Any] = {"lazycompress": "1", "recipe": {"target": 0.5}, "model": "m", "timesteps": [1.0]}


def _model(folder: Path) -> Path:
    return Path(shutil.copytree(WEIGHTS_DIR, folder / "model"))


def _config(text: str | bytes) -> Callable[[Path], object]:
    """Load a model with another `config.json`, by the command line."""

    def act(folder: Path) -> object:
        copy = _model(folder)
        (copy / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return command("locate", "--model", copy, "--recipe", "digits_dit.yaml")

    return act


def _weights(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Load a model whose weights were changed."""

    def act(folder: Path) -> object:
        copy = _model(folder)
        change(copy / "diffusion_pytorch_model.safetensors")
        return load_denoiser(copy)

    return act


def _index(
    text: str | bytes | dict[str, Any], load: Callable[[Path], object] = load_pipeline
) -> Callable[[Path], object]:
    """Load a pipeline with this `model_index.json`."""

    def act(folder: Path) -> object:
        data = json.dumps(text) if isinstance(text, dict) else text
        (folder / _INDEX).write_bytes(data if isinstance(data, bytes) else data.encode())
        (folder / "hostile_module.py").write_text("raise SystemExit('imported')")
        return load(folder)

    return act


def _by_command(folder: Path) -> object:
    return command("locate", "--model", folder)


@cache
def _pipeline() -> Any:
    from ..pipelines import make_dit

    with torch.random.fork_rng(devices=[]):
        return make_dit()


def _dit(**parts: Any) -> dict[str, Any]:
    return {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **parts,
    }


def _asks_for_code(folder: Path) -> object:
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Evil"}}')
    return _index(_dit())(folder)


def _about(text: str | bytes) -> Callable[[Path], object]:
    """Take up a training whose `about.json` is this."""

    def act(folder: Path) -> object:
        (folder / ABOUT_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
        return Checkpoint(folder, _ABOUT)

    return act


def _about_with(key: str, value: Any) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        Checkpoint(folder, _ABOUT)
        made.change_json(folder / ABOUT_FILE, (key,), value)
        return Checkpoint(folder, _ABOUT)

    return act


def _result(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Read a result of a training whose file was changed."""

    def act(folder: Path) -> object:
        kept = Checkpoint(folder, _ABOUT)
        kept.put("run", {"x": torch.zeros(3), "n": 1.5, "many": [(1, None)], 7: True})
        (path,) = folder.glob("*.safetensors")
        path.write_bytes(change(path.read_bytes()))
        return kept.get("run")

    return act


def _discarded(folder: Path) -> None:
    """What is not a training's stays."""
    kept = Checkpoint(folder / "kept", _ABOUT)
    kept.put("run", torch.zeros(3))
    (folder / "kept" / "thesis.txt").write_text("ten years")
    discard(folder / "kept")
    assert [path.name for path in (folder / "kept").iterdir()] == ["thesis.txt"]


def _not_a_training(folder: Path) -> object:
    (folder / "thesis.txt").write_text("ten years")
    return Checkpoint(folder, _ABOUT)


def _full_circle(folder: Path) -> None:
    value = {"x": torch.arange(3), "n": 1.5, "bad": float("nan"), "many": [(1, None), "a"], 7: True}
    kept = Checkpoint(folder, _ABOUT)
    kept.put("run", value)
    found = kept.get("run")
    assert torch.equal(found.pop("x"), value.pop("x"))
    assert repr(found) == repr(value)


_DEEP = "[" * 100_000

TRIES = [
    *(
        Try(f"folders: config.json {name}", _config(text), says)
        for name, text, says in (
            ("empty", "", "config.json is not JSON"),
            ("broken", "{", "config.json is not JSON"),
            ("a list", "[]", "holds no JSON object"),
            ("a number", "7", "holds no JSON object"),
            ("null", "null", "holds no JSON object"),
            ("binary", b"\xff\x00", "is not UTF-8"),
            ("nested deeply", _DEEP, "nested too deeply"),
            ("without a class", "{}", "no model class 'None'"),
            ("of a class that is none", '{"_class_name": "Zzz"}', "no model class 'Zzz'"),
            ("of a list as class", '{"_class_name": ["DiTTransformer2DModel"]}', "no model class"),
            ("of a number as class", '{"_class_name": 7}', "no model class"),
            ("of a module as class", '{"_class_name": "pipelines"}', "no model class 'pipelines'"),
            ("of __class__", '{"_class_name": "__class__"}', "no model class"),
            ("of a dotted class", '{"_class_name": "os.system"}', "no model class 'os.system'"),
            ("of a pipeline's class", '{"_class_name": "DiTPipeline"}', "no model class 'DiTPipeline'"),
            ("with a class twice", '{"_class_name": "A", "_class_name": "B"}', "given twice"),
            ("of a huge model", '{"_class_name": "DiTTransformer2DModel", "num_layers": "many"}', "does not load"),
            ("of other sizes", '{"_class_name": "DiTTransformer2DModel", "num_layers": 1}', "does not load"),
        )
    ),
    *(
        Try(f"folders: weights {name}", _weights(change), "does not load")
        for name, change in (
            ("gone", lambda path: path.unlink()),
            ("empty", lambda path: path.write_bytes(b"")),
            ("random", lambda path: path.write_bytes(bytes(range(256)))),
            ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-1])),
            ("a pickle instead", lambda path: path.rename(path.with_name("diffusion_pytorch_model.bin"))),
            ("a folder", lambda path: (path.unlink(), path.mkdir())),
        )
    ),
    *(
        Try(f"folders: model_index.json {name}{how}", _index(text, load), says)
        for how, load in (
            ("", load_pipeline),
            (", one denoiser of it", load_denoiser),
            (", by the command line", _by_command),
        )
        for name, text, says in (
            ("empty", "", "is not JSON"),
            ("broken", "{", "is not JSON"),
            ("a list", "[]", "holds no JSON object"),
            ("binary", b"\xff\x00", "is not UTF-8"),
            ("nested deeply", _DEEP, "nested too deeply"),
            ("without a class", "{}", "no pipeline class 'None'"),
            ("of a class that is none", '{"_class_name": "Zzz"}', "no pipeline class 'Zzz'"),
            ("of a list as class", '{"_class_name": ["hostile_module", "Evil"]}', "no pipeline class"),
            ("of a model's class", '{"_class_name": "DiTTransformer2DModel"}', "no pipeline class"),
            ("with a name alone", _dit(transformer=["diffusers"]), "named by its package and its class"),
            ("with three names", _dit(transformer=["a", "b", "c"]), "named by its package and its class"),
            ("with a name and null", _dit(transformer=["diffusers", None]), "named by its package and its class"),
            ("with a module to import", _dit(vae=["hostile_module", "Evil"]), "of the package 'hostile_module'"),
            ("with os", _dit(scheduler=["os", "system"]), "of the package 'os'"),
            ("with a dotted module", _dit(scheduler=["os.path", "join"]), "of the package 'os.path'"),
            ("with a path as module", _dit(scheduler=["../evil", "Evil"]), "of the package '../evil'"),
            ("with a part that is not there", _dit(), "does not load|neither config.json nor"),
        )
        if not (load is _by_command and name in ("empty", "a list"))
    ),
    Try("folders: a part that asks for code of its own", _asks_for_code, "asks for code of its own"),
    Try("folders: a model from None", lambda _: load_denoiser(None), "a path is a string"),  # type: ignore[arg-type]
    Try("folders: a pipeline from None", lambda _: load_pipeline(None), "a path is a string"),  # type: ignore[arg-type]
    Try("folders: a model from an empty folder", lambda folder: load_denoiser(folder), "neither config.json nor"),
    Try(
        "folders: a model from a file",
        lambda folder: load_denoiser(_model(folder) / "config.json"),
        "neither config.json",
    ),
    Try("folders: a model from a long name", lambda folder: load_denoiser(folder / ("n" * 300)), "too long"),
    Try("folders: a model", lambda folder: load_denoiser(_model(folder)), None),
    Try("folders: gates of a pipeline from an empty folder", lambda folder: load_lazy(_pipeline(), folder), "no gates"),
    Try("folders: gates of a pipeline from None", lambda _: load_lazy(_pipeline(), None), "a path is a string"),  # type: ignore[arg-type]
    *(
        Try(f"folders: about.json of a training {name}", _about(text), says)
        for name, text, says in (
            ("empty", "", "is not JSON"),
            ("a list", "[]", "does not describe a training"),
            ("an empty object", "{}", "does not describe a training"),
            ("binary", b"\xff", "is not UTF-8"),
            ("nested deeply", _DEEP, "nested too deeply"),
        )
    ),
    *(
        Try(f"folders: {key} of a training is {what}", _about_with(key, value), "about.json|another training")
        for key in ("lazycompress", "recipe", "model", "timesteps")
        for what, value in made.WRONG.items()
    ),
    *(
        Try(f"folders: a result of a training {name}", _result(change), says)
        for name, change, says in (
            ("empty", lambda _: b"", "cannot be read.*delete it"),
            ("truncated", lambda data: data[:-1], "cannot be read.*delete it"),
            ("a pickle", lambda _: b"\x80\x04cos\nsystem\n.", "cannot be read.*delete it"),
            ("of a zip", lambda _: b"PK\x03\x04" + b"\0" * 60, "cannot be read.*delete it"),
            (
                "naming another tensor",
                lambda data: data.replace(b'\\"tensor\\": \\"0\\"', b'\\"tensor\\": \\"9\\"'),
                "not there",
            ),
            ("naming a call", lambda data: data.replace(b'\\"tensor\\"', b'\\"system\\"'), "'system'"),
            ("without a structure", lambda data: data.replace(b'"structure"', b'"structurE"'), "cannot be read"),
        )
    ),
    Try(
        "folders: a training in a folder of the user's", _not_a_training, "not empty and keeps no training.*thesis.txt"
    ),
    Try("folders: a training into 7", lambda _: Checkpoint(7, _ABOUT), "train.checkpoint: a path is a string"),  # type: ignore[arg-type]
    Try("folders: a training into a file", lambda f: Checkpoint(_model(f) / "config.json", _ABOUT), "cannot write"),
    Try("folders: nothing to resume", lambda f: begin("", f / "gates", True, Group()), "nothing to resume"),
    Try("folders: a training discarded", _discarded, None),
    Try("folders: a result read again", _full_circle, None),
]
