"""One of each kind, added by a package beside this one: found by its entry points, used through the public functions."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress import ExportError, InputError, LazyCompressError, LazyModel, RecipeError
from lazycompress.cli import main
from lazycompress.export.check import start, verify
from lazycompress.integrations.digits.model import digits_sampler, draw_noise
from lazycompress.plan.calibration import Calibration
from lazycompress.plan.forecasts import forecast
from lazycompress.plan.plan import even
from lazycompress.plan.search import plan_for, predict
from lazycompress.recipe_loading import load_recipe
from tests.conftest import two_blocks

PACKAGE = Path(__file__).parent / "lazy_extras"
PAGE = Path(__file__).parents[2] / "docs" / "extending.md"

#: What the package brings: kind -> name.
BRINGS = {
    "forecasts": "cautious",
    "gates": "loudness",
    "runtimes": "pt2",
    "pruners": "overall",
    "pipelines": "studio",
}

STEPS = 6

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package where Python finds it, as pip does: its modules, and `*.dist-info` with its entry points."""

    def put(name: str, **entries: str) -> None:
        site = tmp_path / f"site of {name}"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        sections = [f"[lazycompress.{kind}]\n{line}\n" for kind, line in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(sections))
        shutil.copytree(PACKAGE, site / PACKAGE.name)
        monkeypatch.syspath_prepend(site)

    return put


@pytest.fixture
def extras(install: Install) -> None:
    install("lazy_extras", **{kind: f"{name} = lazy_extras.{name}" for kind, name in BRINGS.items()})


@pytest.fixture(scope="module")
def single() -> nn.Module:
    """One block of the bundled DiT, where a graph of it is exported."""
    model: Any = two_blocks()
    model.transformer_blocks = model.transformer_blocks[:1]
    return model  # type: ignore[no-any-return]


def sampler(model: Any) -> Tensor:
    noise = draw_noise(3, int(torch.randint(0, 1000, (1,))))
    return digits_sampler(noise, torch.arange(3), STEPS)(model)


def sampled(model: Any, seed: int = 5) -> Tensor:
    with torch.no_grad():
        return digits_sampler(draw_noise(3, seed), torch.arange(3), STEPS)(model)


def learned(model: nn.Module, recipe: dict[str, Any]) -> Any:
    return lazycompress.apply(model, recipe, sampler=sampler, progress=False)


# -- forecast -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("extras")
def test_a_forecast_is_learned_with_run_and_loaded_again(short: nn.Module, tmp_path: Path) -> None:
    lazy = learned(short, {"target": 0.5, "forecast": "cautious", "train": {"effort": 0.2}})
    assert lazy.plan.order == "cautious"
    found = sampled(lazy)
    assert 0 < lazy.summary().skip_ratio < 1
    assert torch.allclose(found, _followed(short, lazy.plan), atol=1e-5)
    lazycompress.save(lazy, tmp_path / "plan")
    again = lazycompress.load(short, tmp_path / "plan")
    assert torch.equal(sampled(again), found)
    assert again.set_target(0.8) > 0.5


def _followed(model: nn.Module, plan: Any) -> Tensor:
    """The forecast by hand, from what the docs say of it."""
    past: list[tuple[float, Tensor]] = []

    def call(**inputs: Any) -> Any:
        at = float(inputs["timestep"][0])
        if plan.computes[plan.timesteps.index(at)]:
            output = model(**inputs)
            past.insert(0, (at, output.sample))
            return output
        (t0, y0), *rest = past
        value = y0 + 0.5 * (at - t0) / (t0 - rest[0][0]) * (y0 - rest[0][1]) if rest else y0
        return type("Output", (), {"sample": value})

    return sampled(call)


@pytest.mark.usefixtures("extras")
def test_a_forecast_is_priced_by_the_weights_that_run() -> None:
    calls = 12
    times = tuple(float(t) for t in np.linspace(980, 20, calls))
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal((calls, 40)).cumsum(axis=0)
    gram = (outputs @ outputs.T / 40)[None]
    reach = rng.uniform(0.5, 1, calls)
    calibration = Calibration(times, (0,) * calls, gram, reach, np.ones(calls), np.ones(1))
    plan = plan_for(calibration, 0.4, orders=("cautious",))
    assert plan.order == "cautious"
    assert plan.share <= 0.4
    errors = []
    for k, (time, computes) in enumerate(zip(times, plan.computes, strict=True)):
        known = [p for p in range(k + 1) if plan.computes[p]]
        weights = forecast([times[p] for p in known], time, "cautious")
        value = outputs[k] if computes else sum(w * outputs[known[p]] for p, w in weights)
        errors.append(reach[k] * (value - outputs[k]))
    windows = np.abs(np.linspace(0, 5, calls) - np.arange(6)[:, None])
    shares = np.where(windows < 1, np.cos(windows * np.pi / 2), 0.0)
    expected = ((shares @ np.stack(errors)) ** 2).mean(axis=1).sum()
    assert predict(calibration, plan)[0] == pytest.approx(expected)
    assert predict(calibration, plan)[0] <= predict(calibration, even(times, 0.4, "cautious"))[0]


@pytest.mark.usefixtures("extras")
def test_a_forecast_from_outside_is_refused_where_only_polynomials_are(single: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cautious is for whole calls.*a graph takes 0, 1 or 2"):
        learned(single, {"forecast": "cautious", "units": "branches"})
    lazy = learned(single, {"target": 0.5, "forecast": "cautious", "train": {"enabled": False}})
    with pytest.raises(LazyCompressError, match=r"'cautious'.*files take forecasts of order 0, 1 and 2"):
        lazycompress.export(lazy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- gate ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow(seconds=20)
@pytest.mark.usefixtures("extras")
def test_a_gate_is_trained_run_saved_and_exported(single: nn.Module, tmp_path: Path) -> None:
    lazy = learned(single, {"target": 0.7, "train": {"method": "paper", "gate": "loudness", "effort": 0.02}})
    assert all(bool(weight.any()) for weight in lazy.gates.weights), "nothing was learned through the gate"
    found = sampled(lazy)
    assert 0 < lazy.summary().skip_ratio < 1

    lazycompress.save(lazy, tmp_path / "gates")
    again = lazycompress.load(single, tmp_path / "gates")
    assert isinstance(again, LazyModel)
    assert torch.equal(sampled(again), found)
    again.reset()
    folder = lazycompress.export(again, tmp_path / "out", format="onnx", telemetry=True)
    assert verify(folder).ok
    runner = start(folder)
    torch.testing.assert_close(sampled(runner), found, rtol=0, atol=1e-3)
    assert runner.summary().skip_ratio > 0

    # The same numbers in the package's own gate score otherwise: what ran is the one from outside.
    scores, gates = _scores(lazy), copy.deepcopy(lazy.gates)
    gates.kind = "linear"
    lazy.set_gates(gates)
    assert not torch.allclose(scores, _scores(lazy), atol=1e-4)


def _scores(lazy: LazyModel) -> Tensor:
    """What the gates of a lazy model say in one call: [branches, batch]."""
    found: dict[int, Tensor] = {}

    def keep(
        branch: int, score: Tensor, valid: Tensor, fresh: list[Tensor], caches: Any
    ) -> tuple[list[Tensor], Tensor]:
        found[branch] = score.detach()
        return fresh, torch.zeros_like(valid)

    inputs = {"hidden_states": draw_noise(3, 1), "timestep": torch.full((3,), 500), "class_labels": torch.arange(3)}
    lazy.reset()
    with lazy.programs.controlled(keep), torch.no_grad():
        lazy(**inputs)
    lazy.reset()
    return torch.stack([found[k] for k in sorted(found)])


# -- runtime ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("extras")
def test_a_format_is_exported_verified_and_run(single: nn.Module, tmp_path: Path) -> None:
    recipe = {"target": 0.5, "train": {"effort": 0.2}, "export": {"format": "pt2", "telemetry": True}}
    lazy = learned(single, recipe)
    folder = lazycompress.export(lazy, tmp_path / "out")
    assert (folder / "model.pt2").is_file()
    report = verify(folder)
    assert report.ok
    assert report.tolerance == 1e-5
    runner = start(folder)
    for seed in (5, 6, 5):  # a new image is noticed by the file
        torch.testing.assert_close(sampled(runner, seed), sampled(lazy, seed), rtol=0, atol=1e-3)
    assert 0 < runner.summary().skip_ratio < 1


# -- pruning ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("extras")
def test_a_pruning_method_is_a_recipe_away(single: nn.Module) -> None:
    recipe = {"train": {"enabled": False}, "prune": {"method": "overall", "options": {"share": 0.3}}}
    before = copy.deepcopy(single.state_dict())
    lazy = learned(single, recipe)
    assert all(torch.equal(value, before[name]) for name, value in single.state_dict().items())
    zeros = [int((w == 0).sum()) for name, w in lazy.model.named_parameters() if "attn" in name or ".ff." in name]
    assert sum(zeros) > 0
    assert "prune" in str(lazy.reports[0])
    with pytest.raises(LazyCompressError, match=r"prune\.options: method overall takes share.*there was \{'part': 1\}"):
        learned(single, {"prune": {"method": "overall", "options": {"part": 1}}})
    with pytest.raises(RecipeError, match=r"method: magnitude has none"):
        load_recipe({"prune": {"method": "magnitude", "options": {"share": 0.3}}})


# -- pipeline -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("extras")
def test_a_kind_of_pipeline_is_made_lazy_and_controlled(short: nn.Module) -> None:
    studio: Any = importlib.import_module("lazy_extras.studio").Studio(copy.deepcopy(short))
    labels = torch.arange(2)

    def painted() -> Tensor:
        torch.manual_seed(3)
        return studio.paint(labels, steps=STEPS)  # type: ignore[no-any-return]

    dense = painted()
    with pytest.raises(InputError, match="Studio is not lazy"):
        lazycompress.summary(studio)
    recipe = {"target": 0.5, "train": {"effort": 0.2}}
    assert lazycompress.apply(studio, recipe, call_kwargs={"steps": STEPS}, progress=False) is studio
    lazy = painted()
    assert not torch.equal(lazy, dense)
    assert lazycompress.summary(studio)["net"].skip_ratio == pytest.approx(0.5)
    assert torch.equal(painted(), lazy), "a new image goes on with nothing"
    assert torch.equal(_switched_off(studio, painted), dense)
    lazycompress.reset(studio)
    lazycompress.set_target(studio, 1.0)
    with lazycompress.image(studio):
        assert torch.equal(painted(), dense)
    assert lazycompress.summary(studio).skip_ratio == 0
    with pytest.raises(RecipeError, match="a studio skips whole calls"):
        lazycompress.apply(studio, {"units": "branches"})


def _switched_off(studio: Any, painted: Callable[[], Tensor]) -> Tensor:
    lazycompress.disable(studio)
    found = painted()
    lazycompress.enable(studio)
    return found


# -- names --------------------------------------------------------------------------------------------------------------

#: A recipe that names one of each kind that recipes name.
NAMED: dict[str, Callable[[str], dict[str, Any]]] = {
    "forecasts": lambda name: {"forecast": name},
    "gates": lambda name: {"train": {"method": "paper", "gate": name}},
    "runtimes": lambda name: {"export": {"format": name}},
    "pruners": lambda name: {"prune": {"method": name}},
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_name_that_nobody_brings_is_one_line_with_all_that_are(kind: str, install: Install) -> None:
    with pytest.raises(RecipeError, match=r"there is no .*'nobodys'; there are ") as before:
        load_recipe(NAMED[kind]("nobodys"))
    assert BRINGS[kind] not in str(before.value)
    with pytest.raises(RecipeError):
        load_recipe(NAMED[kind](BRINGS[kind]))
    install("lazy_extras", **{kind: f"{BRINGS[kind]} = lazy_extras.{BRINGS[kind]}"})
    with pytest.raises(RecipeError, match=f"there are .*'{BRINGS[kind]}'"):
        load_recipe(NAMED[kind]("nobodys"))
    recipe = load_recipe(NAMED[kind](BRINGS[kind]))
    assert load_recipe(recipe) == recipe


@pytest.mark.usefixtures("extras")
def test_export_and_the_command_say_which_formats_there_are(
    short: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lazy = learned(short, {"train": {"enabled": False}})
    with pytest.raises(
        ExportError, match="no export format 'tflite'; there are 'openvino', 'onnx', 'executorch', 'pt2'"
    ):
        lazycompress.export(lazy, tmp_path / "out", format="tflite")
    with pytest.raises(SystemExit) as caught:
        main(["export", "--model", "m", "--format", "tflite", "out"])
    assert caught.value.code == 2
    assert "there are 'openvino', 'onnx', 'executorch', 'pt2'" in capsys.readouterr().err


def test_one_that_does_not_load_is_one_line_that_names_it(single: nn.Module, install: Install, tmp_path: Path) -> None:
    install(
        "lazy_broken",
        forecasts="torn = lazy_extras.nowhere",
        runtimes="torn = lazy_extras.cautious:absent",
        pruners="torn = lazy_extras.cautious",
        gates="torn = lazy_extras.cautious",
        pipelines="torn = lazy_extras.nowhere",
    )
    tries: dict[str, Callable[[], object]] = {
        r"forecast 'torn', entry point 'lazy_extras\.nowhere' of lazycompress\.forecasts": lambda: even(
            [2, 1], 0.5, "torn"
        ),
        r"format 'torn', entry point 'lazy_extras\.cautious:absent' of lazycompress\.runtimes": lambda: (
            lazycompress.export(_lazy(single), tmp_path / "out", "torn")
        ),
        r"pruning method 'torn' lacks need, prune": lambda: _pruned(single),
        r"gate 'torn' has to have score": lambda: _gated(single),
        r"kind of pipeline 'torn', entry point 'lazy_extras\.nowhere'": lambda: lazycompress.apply(object()),
    }
    for said, act in tries.items():
        with pytest.raises(LazyCompressError, match=said) as caught:
            act()
        assert "\n" not in str(caught.value)


def _lazy(model: nn.Module) -> Any:
    from lazycompress.runtime import wrap

    return wrap(model, (draw_noise(2), torch.full((2,), 980), torch.arange(2)), {})


def _gated(model: nn.Module) -> None:
    lazy = _lazy(model)
    gates = copy.deepcopy(lazy.gates)
    gates.kind = "torn"
    lazy.set_gates(gates)


def _pruned(model: nn.Module) -> None:
    from lazycompress.compose.prune import prune
    from lazycompress.recipe import Prune

    prune(model, sampler, Prune(method="torn"), progress=False)


def test_names_of_the_package_are_not_taken(install: Install) -> None:
    from lazycompress.export.runtimes import runtime_of

    install("lazy_thief", runtimes="onnx = lazy_extras.pt2", forecasts="1 = lazy_extras.cautious")
    assert runtime_of("onnx").ROUNDING == 1e-4
    assert forecast([3.0, 2.0], 1.0, 1) == [(1, 2.0), (0, -1.0)]


def test_the_page_shows_what_is_tried_here() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.glob("[a-z]*.py")):
        assert f"```python\n{path.read_text(encoding='utf-8')}```" in text, path.name
    for kind, name in BRINGS.items():
        assert f'[project.entry-points."lazycompress.{kind}"]\n{name} = "lazy_extras.{name}"' in text
