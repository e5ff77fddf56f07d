"""`optimum-cli export lazy-openvino`, and what optimum-intel makes of the folder in a process that knows nothing of us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("optimum.intel")

import openvino as ov

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.cli import main
from lazycompress.export.card import CARD_FILE
from lazycompress.export.check import CHECK_FILE, verify
from lazycompress.integrations.diffusers import export_folder, export_pipeline, optimum_knows, summary
from tests.export_models import small_dit
from tests.pipelines import PIPELINES

STEPS = 6

#: Runs three calls with OVDiffusionPipeline, the first twice, and says what was skipped in each.
_SCRIPT = """
import json, sys
import numpy as np, torch
from optimum.intel import OVDiffusionPipeline
folder, calls, out, steps = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
pipe = OVDiffusionPipeline.from_pretrained(folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
pipe.set_progress_bar_config(disable=True)
skips, forward = [], pipe.transformer.forward
def counted(*args, **kwargs):
    result = forward(*args, **{**kwargs, "return_dict": True})
    skips.append(float(result["lazy_decisions"].mean()) if "lazy_decisions" in result else -1.0)
    return (result["out_sample"],)
pipe.transformer.forward = counted
images = []
for call in (calls[0], calls[1], calls[0]):
    torch.manual_seed(0)
    images.append(pipe(**call, num_inference_steps=steps, output_type="np")[0])
np.savez(out, *images)
ours = [name for name in sys.modules if name.split(".")[0] == "lazycompress"]
print(json.dumps({"class": type(pipe).__name__, "skips": skips, "ours": ours}))
"""


def elsewhere(folder: Path, calls: list[dict[str, Any]]) -> tuple[list[np.ndarray], dict[str, Any]]:
    out = folder.parent / "images.npz"
    arguments = [sys.executable, "-c", _SCRIPT, str(folder), json.dumps(calls), str(out), str(STEPS)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as stored:
        return [stored[name] for name in stored.files], json.loads(done.stdout.splitlines()[-1])


def sample(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    torch.manual_seed(0)
    images: np.ndarray = pipe(**call, num_inference_steps=STEPS, output_type="np")[0]
    return images


def one_call_a_step(call: dict[str, Any]) -> dict[str, Any]:
    """The call without what makes a pipeline call its denoiser twice a step: `OVDiffusionPipeline` keeps one state."""
    return {key: value for key, value in call.items() if key not in ("negative_prompt", "true_cfg_scale")}


@pytest.mark.slow(seconds=150)
@pytest.mark.parametrize("name", ["sd3", "sana", "flux"])
def test_optimum_intel_runs_the_folder_unmodified(name: str, tmp_path: Path) -> None:
    specimen = PIPELINES[name]
    specimen = replace(specimen, call=one_call_a_step(specimen.call), other=one_call_a_step(specimen.other))
    pipe = specimen.make()
    dense = sample(pipe, specimen.call)
    call = {**specimen.call, "num_inference_steps": STEPS}
    lazycompress.apply(pipe, {"target": 0.6, "train": {"effort": 0.25}}, call_kwargs=call, progress=False)
    assert optimum_knows(type(pipe).__name__)
    export_pipeline(pipe, tmp_path / "out", "openvino", telemetry=True)
    report = verify(tmp_path / "out" / "transformer")
    assert report.ok
    assert report.flipped == 0
    lazycompress.reset(pipe)
    expected = [sample(pipe, specimen.call)]
    skipped = summary(pipe).skip_ratio
    expected.append(sample(pipe, specimen.other))

    found, said = elsewhere(tmp_path / "out", [specimen.call, specimen.other])
    assert said["ours"] == []
    assert said["class"].startswith("OV")
    for ours, theirs in zip(found, [*expected, expected[0]], strict=True):
        assert np.abs(ours - theirs).max() < 1 / 255
    assert np.array_equal(found[0], found[2])  # the second image left nothing for the third
    assert np.abs(expected[0] - dense).max() > 4 / 255
    first = said["skips"][: len(said["skips"]) // 3]
    assert np.mean(first) == pytest.approx(skipped, abs=0.02)
    assert skipped > 0.2


@pytest.mark.slow(seconds=100)
def test_the_command_line_writes_a_whole_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PIPELINES["sd3"].make().save_pretrained(tmp_path / "pipe")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "target: 0.7\ntrain: {effort: 0.25}\npipeline:\n  prompts: [a cat, red dog]\n"
        "  call: {height: 16, width: 16, max_sequence_length: 16}\n",
        encoding="utf-8",
    )
    arguments = ["--model", str(tmp_path / "pipe"), "--recipe", str(recipe)]
    arguments += ["--set", f"pipeline.call.num_inference_steps={STEPS}", str(tmp_path / "out")]
    done = optimum_cli("export", "lazy-openvino", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    model = ov.Core().read_model(tmp_path / "out" / "transformer" / "openvino_model.xml")
    assert [port.get_any_name() for port in model.inputs] == [
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep",
    ]  # fmt: skip
    assert [port.get_any_name() for port in model.outputs] == ["out_sample"]
    assert all(len(port.get_names()) == 1 for port in (*model.inputs, *model.outputs))
    parts = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model_index.json", "scheduler", "text_encoder_3", "tokenizer", "vae_decoder"} <= parts
    images, said = elsewhere(tmp_path / "out", [PIPELINES["sd3"].call, PIPELINES["sd3"].other])
    assert said["ours"] == []
    assert np.array_equal(images[0], images[2])

    # Our own commands know it for a pipeline.
    main(["verify", str(tmp_path / "out")])
    assert f"{tmp_path / 'out' / 'transformer'}: ok" in capsys.readouterr().out
    main(["summary", str(tmp_path / "out")])
    assert "transformer\n" in capsys.readouterr().out
    with pytest.raises(LazyCompressError, match=r"is a pipeline.*verify .*transformer"):
        verify(tmp_path / "out")
    weights = tmp_path / "out" / "transformer" / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / "out")])
    assert "export again" in capsys.readouterr().err


@pytest.mark.slow(seconds=90)
@pytest.mark.parametrize("name", ["sd3", "flux", "ltx"])
def test_calls_that_take_turns_skip_in_the_unmodified_pipeline(name: str, tmp_path: Path) -> None:
    """The dense file is wrapped: sizes stay open, and each pass of guidance has a state."""
    specimen = PIPELINES[name]
    pipe = specimen.make()
    dense = sample(pipe, specimen.call)
    call = {**specimen.call, "num_inference_steps": STEPS}
    lazycompress.apply(pipe, {"target": 0.6, "train": {"effort": 0.25}}, call_kwargs=call, progress=False)
    out = export_pipeline(pipe, tmp_path / "out", "openvino")
    report = verify(out / "transformer")
    assert report.ok
    assert report.flipped == 0
    lazycompress.reset(pipe)
    expected = [sample(pipe, specimen.call), sample(pipe, specimen.other)]
    found, said = elsewhere(out, [specimen.call, specimen.other])
    assert said["ours"] == []
    for ours, theirs in zip(found, [*expected, expected[0]], strict=True):
        assert np.abs(ours - theirs).max() < 1 / 255
    assert np.abs(expected[0] - dense).max() > 4 / 255
    model = ov.Core().read_model(out / "transformer" / "openvino_model.xml")
    assert model.input("hidden_states").get_partial_shape()[0].is_dynamic


@pytest.fixture(scope="module")
def sd3() -> Any:
    pipe = PIPELINES["sd3"].make()
    call = {**PIPELINES["sd3"].call, "num_inference_steps": STEPS}
    return lazycompress.apply(pipe, {"target": 0.6, "train": {"effort": 0.25}}, call_kwargs=call, progress=False)


@pytest.mark.slow(seconds=40)
def test_what_no_saved_pipeline_holds_is_in_the_file(
    sd3: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """optimum-intel exports what `save_pretrained` wrote: a module that was changed in memory is written from its graph."""
    plain = sd3.transformer.forward

    def louder(*args: Any, **kwargs: Any) -> Any:
        return (1.2 * plain(*args, **{**kwargs, "return_dict": False})[0],)

    monkeypatch.setattr(sd3.transformer, "forward", louder)
    out = export_pipeline(sd3, tmp_path / "out", "openvino")
    assert "writes transformer from its graph: what optimum-intel writes is not what the module gives" in caplog.text
    lazycompress.reset(sd3)
    expected = sample(sd3, PIPELINES["sd3"].call)
    found, _ = elsewhere(out, [PIPELINES["sd3"].call, PIPELINES["sd3"].other])
    assert np.abs(found[0] - expected).max() < 1 / 255


@pytest.mark.slow(seconds=40)
def test_weights_of_large_parts_are_small_and_those_of_denoisers_exact(
    sd3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazycompress.integrations.diffusers.optimum_layout._LARGE", 1000)
    out = export_pipeline(sd3, tmp_path / "out", "openvino")

    def in_8_bits(part: str) -> bool:
        return 'element_type="u8"' in (out / part / "openvino_model.xml").read_text(encoding="utf-8")

    assert in_8_bits("text_encoder_3")
    assert not in_8_bits("transformer")
    found, _ = elsewhere(out, [PIPELINES["sd3"].call, PIPELINES["sd3"].other])
    assert np.isfinite(found[0]).all()


@pytest.mark.slow(seconds=40)
def test_recorded_calls_of_a_wrapped_file_say_what_differs(sd3: Any, tmp_path: Path) -> None:
    out = export_pipeline(sd3, tmp_path / "out", "openvino") / "transformer"
    recorded = load_file(out / CHECK_FILE)
    card = json.loads((out / CARD_FILE).read_text(encoding="utf-8"))
    del card["files"]  # which would tell that the calls are others
    (out / CARD_FILE).write_text(json.dumps(card), encoding="utf-8")

    def verified(name: str, value: torch.Tensor) -> Any:
        save_file({**recorded, name: value}, out / CHECK_FILE)
        return verify(out)

    assert verified("0.out.0", recorded["0.out.0"]).ok
    assert not verified("0.out.0", 1.1 * recorded["0.out.0"]).ok
    assert verified("1.computed", ~recorded["1.computed"]).flipped == 1
    with pytest.raises(LazyCompressError, match="call 0 are missing, NaN or infinity"):
        verified("0.out.0", recorded["0.out.0"] * torch.inf)
    with pytest.raises(LazyCompressError, match="does not run"):  # NumPy has no such numbers
        verified("1.in.timestep", recorded["1.in.timestep"].bfloat16())
    save_file({"0.out.0": recorded["0.out.0"]}, out / CHECK_FILE)
    with pytest.raises(LazyCompressError, match="no call is recorded"):
        verify(out)


@pytest.mark.slow(seconds=15)
def test_a_single_model_is_exported_alone(tmp_path: Path) -> None:
    model: Any = small_dit()
    model.save_pretrained(tmp_path / "model")
    quick = {"train.enabled": False, "sampling.batch": 2, "sampling.steps": 4}
    out = export_folder(tmp_path / "model", "digits_dit.yaml", tmp_path / "out", overrides=quick, progress=False)
    assert (out / "openvino_model.xml").is_file()


@pytest.mark.slow(seconds=10)
def test_a_hub_id_is_found_in_the_cache(tmp_path: Path) -> None:
    """In the layout of the hub's own cache, without a network."""
    cache = tmp_path / "models--someone--tiny-dit"
    PIPELINES["dit"].make().save_pretrained(cache / "snapshots" / "1234")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1234")
    code = """
from lazycompress import LazyCompressError
from lazycompress.integrations.diffusers import local_folder
print(local_folder("someone/tiny-dit"))
try:
    local_folder("someone/nothing")
except LazyCompressError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found, error = done.stdout.strip().splitlines()
    assert found == str(cache / "snapshots" / "1234")
    assert error.startswith("someone/nothing is no folder, and diffusers gets no pipeline of that id: ")


def test_bad_input_is_one_line_and_exit_code_one(tmp_path: Path) -> None:
    done = optimum_cli("export", "lazy-onnx", "--model", str(tmp_path), "--recipe", "nope", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "no recipe 'nope'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("broken", ["lazycompress", "optimum.commands.export.base"])
def test_optimum_cli_survives_whatever_is_missing(broken: str) -> None:
    code = f"""
import runpy, sys
import optimum.commands.export.base, optimum.commands.base
sys.modules[{broken!r}] = None
import importlib
shim = importlib.import_module("optimum.commands.register.register_lazycompress")
print(len(shim.REGISTER_COMMANDS))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == ("2" if broken == "lazycompress" else "0")


def test_the_shim_imports_nothing_heavy() -> None:
    code = (
        "import sys, optimum.commands.export.base; before = set(sys.modules); "
        "import optimum.commands.register.register_lazycompress; "
        "print(sorted({n.split('.')[0] for n in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['optimum']"


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
