"""`wrap`: a file, or a pipeline's folder, made lazy."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, InputError
from ..export.card import CARD_FILE
from ..graph.insert import is_timestep_name
from ..places import EXPORT, seal, whole_folder
from ..plan.plan import Plan
from .controller import Controller
from .plans import of_all_passes
from .ports import Port, find_roles
from .timetable import Timetable

if TYPE_CHECKING:
    import openvino as ov

#: Looks at a file that was wrapped, before its folder is sealed: its path, and what the card says; what that is to say, too.
Check = Callable[[Path, Mapping[str, Any]], Mapping[str, Any]]

#: What a model that was handed over in memory is called, as optimum-intel does.
_MODEL_FILE = "openvino_model.xml"

#: Smaller files are copied, so that who edits a configuration edits one.
_LINKED = 1 << 20


@dataclass(frozen=True)
class Options:
    """How denoisers are wrapped.

    Attributes:
        plan: what they follow.
        timestep_input: the timestep's name; None: found by its name.
        moving: inputs that change within an image, and so do not tell images apart.
        streams: images, or passes of guidance, that may take turns.
        past_defaults: the inputs of an ONNX model that hold its past may be left out.
    """

    plan: Plan
    timestep_input: str | None = None
    moving: tuple[str, ...] = ()
    streams: int = 2
    past_defaults: bool = True

    def controller(self, inputs: Sequence[Port], outputs: Sequence[Port]) -> Controller:
        """What goes around a model of these inputs and outputs.

        Raises:
            InputError: they are no denoiser's, or a plan that no file can follow.
        """
        roles = find_roles(inputs, outputs, self.timestep_input, self.moving)
        return Controller(Timetable.of(self.plan), self.plan.polynomial, self.streams, roles, tuple(outputs))


def wrap(
    file: str | Path | ov.Model,
    plan: Plan,
    out: str | Path,
    *,
    timestep_input: str | None = None,
    moving: Sequence[str] = (),
    streams: int = 2,
    past_defaults: bool = True,
    overwrite: bool = False,
) -> Path:
    """Make a denoiser lazy that exists as a file: it then follows a plan by itself.

    The new file has the inputs and outputs of the old one, in its order, with its names, sizes, layouts and notes. What it
    keeps from call to call is a state (OpenVINO) or inputs `past_*`, which may be left out, and outputs `present_*` (ONNX).

    Args:
        file: an OpenVINO IR (`.xml`) or ONNX model (`.onnx`, opset 13 or later) in any precision, or an `ov.Model`, which is left
            as it is; or a folder with one, or with a pipeline in optimum-intel's layout, all of whose denoisers are wrapped.
        plan: of whole calls.
        out: the new folder; written whole or not at all. What else is in a folder that is wrapped comes with it: large
            files as hard links, where the file system has them.
        timestep_input: the timestep's name; None: found by its name.
        moving: inputs that change within an image (a ControlNet's residuals), and so do not tell images apart.
        streams: images, or passes of guidance in calls of their own, that may take turns.
        past_defaults: ONNX only: `past_*` may be left out at the first call. ONNX Runtime for JavaScript does not take inputs
            that have a default: with False they have none, and the first call is handed zeros.
        overwrite: replace an export in `out`.

    Returns:
        The folder.

    Raises:
        InputError: there is no such file, it is no denoiser, or keeps a state of its own; or a plan that no file can follow.
        ExportError: `out` is not ours to take, or cannot be written.
        MissingExtraError: the packages of the format are not installed.
    """
    if isinstance(streams, bool) or not isinstance(streams, int) or streams < 1:
        raise InputError(f"streams: a number of at least 1 is needed, there was {streams!r}")
    options = Options(of_all_passes(plan), timestep_input, tuple(moving), streams, past_defaults)
    target = Path(out)
    if not isinstance(file, str | Path):
        with whole_folder(target, EXPORT, overwrite) as folder:
            _wrap_openvino(file, folder / _MODEL_FILE, options)
        return target
    source = Path(file)
    if source.is_dir():
        found = _denoisers(source, options)
        if target.resolve().is_relative_to(source.resolve()):
            raise InputError(f"{target} is in the folder that is wrapped, {source}: choose one outside of it")
        with whole_folder(target, EXPORT, overwrite) as folder:
            _bring(source, folder, {path.relative_to(source) for path in found})
            for path in found:
                wrap_file(path, folder / path.relative_to(source), options)
            if [path.parent for path in found] != [source]:
                kind = "openvino" if found[0].suffix == ".xml" else "onnx"
                names = [path.parent.relative_to(source).as_posix() for path in found]
                about = {"format": kind, "pipeline": source.name, "denoisers": names, "loader": "its own"}
                seal(folder, EXPORT, about)
        return target
    if not source.is_file():
        raise InputError(f"there is no file {source}")
    if source.suffix not in (".xml", ".onnx"):
        raise InputError(f"{source} is neither an OpenVINO IR (.xml) nor an ONNX model (.onnx)")
    with whole_folder(target, EXPORT, overwrite) as folder:
        wrap_file(source, folder / source.name, options)
    return target


def wrap_file(source: Path, target: Path, options: Options, check: Check | None = None) -> None:
    """Wrap one file, and seal the folder that it is written to; see `wrap`.

    Args:
        source: the dense file.
        target: the new one, in a folder that exists.
        options: how.
        check: see `Check`.
    """
    if source.suffix == ".xml":
        from .openvino import read

        _wrap_openvino(read(source), target, options, check)
        return
    from . import onnx as format

    model = format.read(source)
    controller = options.controller(*format.ports(model))
    for name in format.data_files(model):
        if not (source.parent / name).is_file():
            raise InputError(f"the weights of {source} are in {name}, which is not there")
        _link(source.parent / name, target.parent / name)
    format.write(format.wrapped(model, controller, options.past_defaults), target)
    _seal(target, _about("onnx", target, controller, options), check)


def _wrap_openvino(model: ov.Model, target: Path, options: Options, check: Check | None = None) -> None:
    from . import openvino as format

    if not options.past_defaults:
        raise InputError(
            "past_defaults: an OpenVINO file keeps its past as a state and has no inputs past_*; leave it out"
        )
    controller = options.controller(*format.ports(model))
    format.write(format.wrapped(model, controller), target)
    _seal(target, _about("openvino", target, controller, options), check)


def _seal(target: Path, card: dict[str, Any], check: Check | None) -> None:
    seal(target.parent, EXPORT, card if check is None else card | dict(check(target, card)))


def _denoisers(source: Path, options: Options) -> list[Path]:
    """The models in a folder, or in its sub-folders, that have a timestep."""
    for pattern in ("*", "*/*"):
        models = sorted(path for path in source.glob(pattern) if path.suffix in (".xml", ".onnx"))
        found = [path for path in models if _has_timestep(path, options)]
        if found:
            parents = [path.parent for path in found]
            if len(set(parents)) < len(parents):
                raise InputError(f"{found[0].parent} holds several denoisers: name one of {', '.join(map(str, found))}")
            return found
    raise InputError(
        f"neither {source} nor its sub-folders hold an OpenVINO IR or ONNX model with a timestep: name the file, and pass "
        "timestep_input"
    )


def _has_timestep(path: Path, options: Options) -> bool:
    if path.suffix == ".xml":
        from . import openvino as format_openvino

        if "tokenizer" in path.stem:  # needs an extension to be read, and is no denoiser
            return False
        names = [name for port in format_openvino.read(path).inputs for name in port.get_names()]
    else:
        from . import onnx as format_onnx

        names = [info.name for info in format_onnx.read(path).graph.input]
    return options.timestep_input in names or any(map(is_timestep_name, names))


def _bring(source: Path, folder: Path, wrapped: set[Path]) -> None:
    """Copy what is in a folder, but for the models that are wrapped and their weights beside them."""
    gone = wrapped | {path.with_suffix(".bin") for path in wrapped}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and name not in gone and name.name != CARD_FILE:
            _link(path, folder / name)


def _link(source: Path, target: Path) -> None:
    """A file with the contents of another; where it is large, the same one under another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    real = source.resolve()
    if real.stat().st_size >= _LINKED:
        try:
            os.link(real, target)
            return
        except OSError:  # another disk, or a file system without links
            pass
    try:
        shutil.copyfile(real, target)
    except OSError as error:
        raise ExportError(f"cannot copy {source}: {error.strerror or error}") from None


def _about(format: str, path: Path, controller: Controller, options: Options) -> dict[str, Any]:
    """What the card says of a wrapped file."""
    roles = controller.roles
    return {
        "format": format,
        "model": path.name,
        "plan": asdict(options.plan),
        "share": options.plan.share,
        "streams": options.streams,
        "timestep": roles.timestep.name,
        "latents": roles.latents.name,
        "conditions": [port.name for port in roles.conditions],
        "moving": list(options.moving),
        "outputs": [port.name for port in controller.outputs],
        "clock": controller.layout,
        "versions": {name: _version(name) for name in ("openvino", "onnx", "nncf")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


__all__ = ["Check", "Options", "wrap", "wrap_file"]
