"""A folder of hostile files is loaded in a process that ends at the first import, file or socket outside its list."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import lazycompress
from lazycompress.export.check import CHECK_FILE

from . import made

#: Imports all that loading needs, by loading what is good; then the hook; then everything hostile, each refused in a line.
_GUARDED = """
import os
import sys
from pathlib import Path
import torch
import lazycompress
from lazycompress import LazyCompressError
from lazycompress.cli.commands import read_inputs
from lazycompress.export.card import exports_in, read_card
from lazycompress.export.check import verify_all
from lazycompress.integrations.diffusers import load_denoiser, load_exported, load_lazy, load_pipeline
from lazycompress.recipe_loading import load_recipe
from lazycompress.train.checkpoint import Checkpoint
from tests.export_models import small_dit

torch.set_num_threads(1)
good, hostile = Path(sys.argv[1]), Path(sys.argv[2])
about = {"lazycompress": "1", "recipe": {}, "model": "m", "timesteps": []}
lazycompress.load(small_dit(), good / "gates")
assert all(report.ok for report in verify_all(good / "export"))
for load in (load_pipeline, load_denoiser, load_exported):
    try:
        load(hostile / "nothing")
    except LazyCompressError:
        pass

known = {name.partition(".")[0] for name in sys.modules}
packages = [str(Path(module.__file__).parents[1]) for module in (lazycompress, torch)]
readable = (str(hostile), sys.prefix, sys.base_prefix, *packages, "/proc/", "/sys/")
# What says which packages are installed, in place too: a name that is not known is compared with theirs.
installed = ("entry_points.txt", "__path_hook__")

def guard(event, arguments):
    if event == "import" and arguments[0].partition(".")[0] not in known:
        raise SystemExit(f"imported {arguments[0]}")
    if event == "open" and isinstance(arguments[0], str) and not (
        arguments[0].startswith(readable) or arguments[0].endswith(installed)
    ):
        raise SystemExit(f"opened {arguments[0]}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise SystemExit(f"wrote {arguments[0]}")
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "urllib.")):
        raise SystemExit(f"{event} {arguments}")

sys.path.insert(0, str(hostile))
sys.addaudithook(guard)
model = small_dit()
calls = []
for folder in sorted(hostile.iterdir()):
    kind = folder.name.partition("-")[0]
    calls += [(folder, call) for call in {
        "gates": [lambda f: lazycompress.load(model, f)],
        "export": [verify_all, lambda f: exports_in(f) and read_card(f) and verify_all(f)],
        "index": [load_pipeline, load_denoiser, load_exported],
        "model": [load_denoiser],
        "training": [lambda f: Checkpoint(f, about).get("run")],
        "recipe": [lambda f: load_recipe(f / "recipe.yaml")],
        "inputs": [lambda f: read_inputs(f / "inputs.safetensors")],
    }.get(kind, [])]
for folder, call in calls:
    try:
        call(folder)
    except LazyCompressError as error:
        assert "\\n" not in str(error), error
    except Exception as error:
        raise SystemExit(f"{folder.name}: {type(error).__name__}: {error}")
    else:
        raise SystemExit(f"{folder.name} was taken")
print(len(calls), "refused", flush=True)
os._exit(0)  # what torch does at its end is not looked at
"""

_PICKLE = b"cevil_module\nEvil\n."


def test_nothing_that_a_file_names_is_imported_opened_or_called(tmp_path: Path) -> None:
    good, hostile = tmp_path / "good", tmp_path / "hostile"
    good.mkdir()
    hostile.mkdir()
    made.gates(good)
    made.export(good)
    (hostile / "evil_module.py").write_text("raise SystemExit('the module ran')\n")
    count = 0

    def folder(name: str, **files: bytes | str) -> Path:
        nonlocal count
        count += {"export": 2, "index": 3}.get(name.partition("-")[0], 1)
        made_here = hostile / name
        made_here.mkdir()
        for file, data in files.items():
            text = file.replace("__", ".")
            (made_here / text).write_bytes(data if isinstance(data, bytes) else data.encode())
        return made_here

    gates = json.loads((good / "gates" / "gates.json").read_text())
    tensors = (good / "gates" / "gates.safetensors").read_bytes()
    enum = {"__enum__": True, "fqn": "evil_module:Evil", "name": "A"}
    words = {"type": "builtins.dict", "context": json.dumps([enum]), "children_spec": []}
    for k, example in enumerate(
        (
            {"spec": json.dumps([1, words]), "tensors": [], "others": {}},
            {"spec": json.dumps([1, {**words, "type": "evil_module.Evil"}]), "tensors": [], "others": {}},
            {"spec": json.dumps([1, {**words, "type": "collections.namedtuple"}]), "tensors": [], "others": {}},
            {"dict": [["x", {"tensor": {"shape": [1], "dtype": "evil_module.Evil"}}]]},
            {"dict": [["x", {"dtype": "load"}]]},
            {"evil_module.Evil": []},
        )
    ):
        folder(f"gates-{k}", gates__json=json.dumps(gates | {"example": example}), gates__safetensors=tensors)
    folder("gates-pickle", gates__json=json.dumps(gates), gates__safetensors=_PICKLE)
    folder(
        "gates-recipe",
        gates__json=json.dumps(gates | {"recipe": {"sampling": "evil_module"}}),
        gates__safetensors=tensors,
    )

    card = json.loads((good / "export" / "lazycompress.json").read_text())
    folder("export-format", lazycompress__json=json.dumps(card | {"format": "evil_module"}))
    folder("export-files", lazycompress__json=json.dumps(card | {"files": {"../../../etc/passwd": 1}}))
    folder(
        "export-dtype", lazycompress__json=json.dumps(card | {"state": [{**card["state"][0], "dtype": "evil_module"}]})
    )
    pipeline = {
        "lazycompress": "0",
        "format": "onnx",
        "pipeline": "P",
        "denoisers": ["../../x"],
        "loader": "evil_module.load",
    }
    folder("export-loader", lazycompress__json=json.dumps(pipeline))
    record = folder("export-record", lazycompress__json=json.dumps({**card, "files": {}}))
    (record / CHECK_FILE).write_bytes(pickle.dumps({"0.decisions": 1}))

    index = {
        "_class_name": "DiTPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    for k, change in enumerate(
        (
            {"transformer": ["evil_module", "Evil"]},
            {"scheduler": ["evil_module.inner", "Evil"]},
            {"_class_name": ["evil_module", "Evil"]},
            {"_class_name": "evil_module.Evil"},
        )
    ):
        folder(f"index-{k}", model_index__json=json.dumps(index | change))
    folder("model-class", config__json='{"_class_name": "evil_module.Evil"}')
    folder("model-map", config__json='{"_class_name": "Evil", "auto_map": {"AutoModel": "evil_module.Evil"}}')
    folder(
        "model-pickle", config__json='{"_class_name": "DiTTransformer2DModel"}', diffusion_pytorch_model__bin=_PICKLE
    )

    about = '{"lazycompress": "1", "recipe": {}, "model": "m", "timesteps": []}'
    name = "acba25512100f80b56fc3ccd14c65be55d94800cda77585c5f41a887e398f9be"[:32]  # of "run"
    training = folder("training-pickle", about__json=about)
    (training / f"{name}.safetensors").write_bytes(_PICKLE)
    folder("training-about", about__json='{"lazycompress": "evil_module"}')
    folder("recipe-tag", recipe__yaml="target: !!python/object/apply:evil_module.Evil []")
    folder("recipe-name", recipe__yaml="target: !!python/name:evil_module.Evil")
    folder("inputs-pickle", inputs__safetensors=_PICKLE)

    root = Path(lazycompress.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", _GUARDED, str(good), str(hostile)],
        capture_output=True, text=True, timeout=300, check=False, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.splitlines()[-1] == f"{count} refused"
