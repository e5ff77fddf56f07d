"""What a recipe asks of training: several targets, a share for each kind of branch, a static schedule; the paper's method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.recipe_loading import load_recipe
from lazycompress.runtime import LazyModel
from lazycompress.sampling import build_sampler
from lazycompress.train.budget import Budget
from lazycompress.train.latents import RealLatents
from lazycompress.train.paper import _distance, set_threshold
from tests.conftest import two_blocks

QUICK = {"units": "branches", "train.effort": 0.1, "sampling.steps": 10, "sampling.batch": 4}
PAPER = {**QUICK, "train.method": "paper", "forecast": 0, "guards.max_reuse": 1000}


def learn(digits: nn.Module, **overrides: Any) -> LazyModel:
    keys = {**QUICK, **{key.replace("__", "."): value for key, value in overrides.items()}}
    lazy: LazyModel = lazycompress.apply(digits, "digits_dit.yaml", overrides=keys, progress=False)
    return lazy


def sample(lazy: LazyModel, seed: int = 99, batch: int = 8) -> Tensor:
    """Reuse of each step and branch, [steps, branches], on fresh noise."""
    assert lazy.recipe is not None
    assert lazy.recipe.sampling is not None
    lazy.reset()
    torch.manual_seed(seed)
    with torch.no_grad():
        build_sampler(lazy.recipe.sampling.model_copy(update={"batch": batch}))(lazy)
    return lazy.usage.heatmap()[1]


# -- several targets -------------------------------------------------------------------------------------------------


@pytest.mark.slow(seconds=16)
def test_a_list_of_targets_leaves_a_schedule_for_each(digits: nn.Module, tmp_path: Path) -> None:
    lazy = learn(digits, target=[0.6, 0.4, 0.8])
    assert len(lazy.gates.frontier) == 3
    assert lazy.training_report.target == 0.6
    found = lazy.training_report.frontier
    assert found == pytest.approx([0.6, 0.4, 0.8], abs=0.02)
    assert all(ratio <= target + 1e-6 for ratio, target in zip(found, (0.6, 0.4, 0.8), strict=True))
    sample(lazy)
    assert lazy.summary().macs_ratio == pytest.approx(found[0], abs=1e-5)
    for target, schedule, ratio in zip((0.6, 0.4, 0.8), lazy.gates.frontier, found, strict=True):
        # Its very own schedule; what the target leaves may be used to compute more.
        assert ratio - 1e-5 <= lazy.set_target(target) <= target + 1e-6
        reused, own = sample(lazy)[1:] > 0, schedule.flip(1).T[1:]
        assert not (reused & ~own).any()
        assert int((own & ~reused).sum()) <= 3
    assert not torch.equal(lazy.gates.frontier[0], lazy.gates.frontier[1])
    saved = lazycompress.save(lazy, tmp_path / "gates")
    assert json.loads((saved / "gates.json").read_text())["targets"] == pytest.approx(found)
    again = lazycompress.load(digits, saved)
    assert [again.set_target(target) for target in (0.6, 0.4, 0.8)] == pytest.approx([0.6, 0.4, 0.8], abs=0.02)


@pytest.mark.parametrize("target", [[], [0.5, 1.5], [0.5, "half"], "half", 0.0])
def test_a_target_that_is_no_share_is_one_line(target: object) -> None:
    with pytest.raises(LazyCompressError, match="key 'target") as caught:
        load_recipe({"target": target})
    assert "a share'" not in str(caught.value)
    assert "\n" not in str(caught.value)


# -- kinds ----------------------------------------------------------------------------------------------------------


def ratio_of(lazy: LazyModel, kind: str, reused: Tensor) -> float:
    chosen = [i for i, branch in enumerate(lazy.branches) if branch.kind == kind]
    macs = torch.tensor([float(lazy.branches[i].macs) for i in chosen])
    return 1.0 - float((reused[:, chosen] * macs).sum(dim=1).mean() / macs.sum())


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("kinds", [{"attention": 0.8}, {"mlp": 0.4, "attention": 0.65}])
def test_kinds_keep_shares_of_their_own_and_the_rest_meets_the_target(
    digits: nn.Module, kinds: dict[str, float]
) -> None:
    lazy = learn(digits, target=0.5, guards__kind_targets=kinds, sampling__steps=12)
    reused = sample(lazy)
    for kind, share in kinds.items():
        assert share - 0.08 <= ratio_of(lazy, kind, reused) <= share + 1e-6
    assert lazy.summary().macs_ratio <= 0.5 + 1e-6
    if "mlp" not in kinds:
        assert lazy.summary().macs_ratio >= 0.5 - 0.04


def test_without_kinds_all_branches_share_one_budget(short: nn.Module) -> None:
    lazy = learn(short, train__enabled=False)
    budget = Budget.of(lazy.branches, 0.5, {})
    assert [portion.name for portion in budget.groups] == ["all branches"]
    assert budget.groups[0].share == pytest.approx(0.5)
    assert budget.groups[0].members.all()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"guards.kind_targets": {"mpl": 0.4}},
            r"guards\.kind_targets: no branch is of kind 'mpl'; there are attention, mlp",
        ),
        (
            {"guards.kind_targets": {"mlp": 0.9}},
            r"mlp compute 0\.\d\d\d of the branches' MACs by themselves, target is 0\.5",
        ),
        ({"guards.kind_targets": {"mlp": 2.0}}, r"key 'guards\.kind_targets\.mlp'"),
        ({"guards.kind_targets": {"mlp": 0.1}, "guards.max_reuse": 1}, "of the branch MACs of mlp to reuse"),
        ({"schedule": "gates"}, r"schedule: gates needs train\.method: paper"),
        ({"train.method": "paper", "target": [0.5, 0.4]}, "target: a list needs schedule: static"),
        ({"train.method": "paper", "guards.kind_targets": {"mlp": 0.4}}, r"guards\.kind_targets needs"),
        ({"train.latents": "x.npz"}, r"train\.latents needs train\.method: paper"),
    ],
)
def test_what_cannot_be_is_one_line(short: nn.Module, overrides: dict[str, object], expected: str) -> None:
    with pytest.raises(LazyCompressError, match=expected) as caught:
        lazycompress.apply(short, "digits_dit.yaml", overrides={**QUICK, **overrides}, progress=False)
    assert "\n" not in str(caught.value)


# -- the paper's method, and a schedule from its gates ---------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic() -> LazyModel:
    lazy: LazyModel = lazycompress.apply(two_blocks(), "digits_dit.yaml", overrides=PAPER, progress=False)
    return lazy


def test_the_papers_gates_look_at_the_sample_unless_the_schedule_is_static(dynamic: LazyModel) -> None:
    assert not int(dynamic.gates.static)
    assert dynamic.training_report.unfrozen is None
    shares = sample(dynamic)
    assert ((shares > 0) & (shares < 1)).any(), "all samples decide alike: the test would show nothing"
    report = dynamic.training_report
    assert report.macs_ratio == pytest.approx(0.5, abs=0.1)


def test_a_static_schedule_is_what_most_samples_did_and_says_what_it_costs(dynamic: LazyModel) -> None:
    from lazycompress.train.freeze import freeze

    assert dynamic.recipe is not None
    assert dynamic.recipe.sampling is not None
    sampler = build_sampler(dynamic.recipe.sampling)
    trained = dynamic.gates
    shares = sample(dynamic, batch=64)
    recipe = load_recipe(dynamic.recipe, {"schedule": "static", "target": [0.8, 0.5]})
    torch.manual_seed(7)
    report = freeze(dynamic, sampler, recipe, dynamic.training_report)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(7)))
    try:
        assert int(dynamic.gates.static)
        reused = sample(dynamic, batch=8)
        assert set(reused.unique().tolist()) <= {0.0, 1.0}
        assert dynamic.summary().macs_ratio == pytest.approx(report.macs_ratio, abs=1e-5)
        assert report.macs_ratio <= 0.8 + 1e-6
        # What is reused, most samples reused; what is not, fewer did.
        assert float(shares[reused > 0].mean()) > 0.9
        assert float(shares[reused > 0].mean()) > float(shares[reused == 0].mean()) + 0.3
        assert report.frontier == pytest.approx([0.8, 0.5], abs=0.03)
        assert report.unfrozen is not None
        assert 0 < report.unfrozen != report.error > 0
        assert f"frozen from gates with error {report.unfrozen:.1e}" in str(report)
        frozen = dynamic.gates
        dynamic.set_gates(trained)
        from lazycompress.train.runs import errors_of_gates

        first = recipe.train.seed * 1_000_003 + 500_001
        assert report.unfrozen == pytest.approx(
            float(errors_of_gates(dynamic, sampler, [first, first + 1]).errors.mean())
        )
        dynamic.set_gates(frozen)
        assert report.error == pytest.approx(float(errors_of_gates(dynamic, sampler, [first, first + 1]).errors.mean()))
    finally:
        dynamic.set_gates(trained)


@pytest.mark.slow
def test_a_recipe_with_a_static_schedule_freezes_the_papers_gates(short: nn.Module) -> None:
    overrides = {**PAPER, "train.effort": 0.02, "schedule": "static", "target": 0.7}
    lazy = lazycompress.apply(short, "digits_dit.yaml", overrides=overrides, progress=False)
    assert int(lazy.gates.static)
    assert lazy.training_report.unfrozen is not None
    assert len(lazy.gates.frontier) == 1


def test_the_blend_takes_its_caches_from_the_step_before(short: nn.Module) -> None:
    """A score of one half everywhere: the output differs from the dense one, or the caches are not old."""
    lazy = learn(short, train__enabled=False)
    with torch.no_grad():
        lazy.gates.bias.zero_()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 1, 8, 8, generator=generator)
    labels = torch.arange(4)

    def call(timestep: int) -> tuple[tuple[()], dict[str, Tensor]]:
        return (), {
            "hidden_states": latents * (1 + timestep / 1000),
            "timestep": torch.full((4,), timestep),
            "class_labels": labels,
        }

    error, scores = _distance(lazy, call(600), call(300))
    assert float(error.detach()) > 1e-4
    assert all(score.tolist() == [0.5] * 4 for score in scores.values())
    same, _ = _distance(lazy, call(600), call(600))
    assert float(same.detach()) < 1e-10


# -- real images ------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "images.safetensors"
    tensors = {"latents": torch.rand(20, 1, 8, 8, generator=generator) * 2 - 1, "class_labels": torch.arange(20) % 10}
    # So that a row can be told from its label.
    tensors["latents"][:, 0, 0, 0] = tensors["class_labels"].float()
    save_file(tensors, path)
    np.savez(tmp_path / "images.npz", **{name: value.numpy() for name, value in tensors.items()})
    return path


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("DDIMScheduler", {"clip_sample": False}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_pairs_of_calls_from_real_images_are_one_step_apart(
    short: nn.Module, images: Path, scheduler: str, config: dict[str, Any]
) -> None:
    lazy = learn(short, train__enabled=False)
    assert lazy.recipe is not None
    changed = {"sampling.scheduler": scheduler, "sampling.scheduler_config": config, "sampling.batch": 6}
    sampling = load_recipe(lazy.recipe, changed).sampling
    assert sampling is not None
    source = RealLatents(images, sampling, lazy)
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for _ in range(12):
        (_, before), (_, now) = source.pair(generator)
        first, then = float(before["timestep"][0]), float(now["timestep"][0])
        seen.add(first)
        assert first > then
        assert torch.equal(before["class_labels"], now["class_labels"])
        assert before["hidden_states"].shape == now["hidden_states"].shape == (6, 1, 8, 8)
        assert not torch.equal(before["hidden_states"], now["hidden_states"])
        if scheduler == "FlowMatchEulerDiscreteScheduler":
            # The images are still there below the noise, each with its own label.
            noise = before["hidden_states"][:, 0, 0, 0] - (1 - first / 1000) * before["class_labels"]
            assert float(noise.abs().max()) < 4 * first / 1000
    assert len(seen) > 3
    again = source.pair(torch.Generator().manual_seed(1))
    assert torch.equal(
        again[0][1]["hidden_states"], source.pair(torch.Generator().manual_seed(1))[0][1]["hidden_states"]
    )


@pytest.mark.slow
def test_the_papers_gates_learn_from_real_images(short: nn.Module, images: Path) -> None:
    def weights(**more: Any) -> Tensor:
        overrides = {**PAPER, "train.effort": 0.01, **more}
        lazy = lazycompress.apply(short, "digits_dit.yaml", overrides=overrides, progress=False)
        return torch.cat([weight.detach() for weight in lazy.gates.weights])

    from_npz = weights(**{"train.latents": str(images.with_suffix(".npz"))})
    assert torch.equal(from_npz, weights(**{"train.latents": str(images)}))
    assert not torch.equal(from_npz, weights())


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"images": torch.zeros(2, 1, 8, 8)}, "holds images, but no 'latents'"),
        ({"latents": torch.zeros(2, 1, 4, 4)}, r"latents are \[2, 1, 4, 4\], the sampling section says \[N, 1, 8, 8\]"),
        ({"latents": torch.zeros(2, 1, 8, 8), "labels": torch.zeros(2)}, "holds 'labels'.*knows class_labels"),
        ({"latents": torch.zeros(2, 1, 8, 8), "class_labels": torch.zeros(3)}, "class_labels is for 3 images"),
        (None, "cannot be read as safetensors or npz"),
    ],
)
def test_a_file_of_images_that_does_not_fit_is_one_line(
    short: nn.Module, tmp_path: Path, tensors: dict[str, Tensor] | None, expected: str
) -> None:
    path = tmp_path / "images.safetensors"
    if tensors is not None:
        save_file(tensors, path)
    overrides = {**PAPER, "train.latents": str(path)}
    with pytest.raises(LazyCompressError, match=expected) as caught:
        lazycompress.apply(short, "digits_dit.yaml", overrides=overrides, progress=False)
    assert "\n" not in str(caught.value)


def test_the_threshold_puts_hard_decisions_at_the_target(dynamic: LazyModel) -> None:
    assert dynamic.recipe is not None
    assert dynamic.recipe.sampling is not None
    before = float(dynamic.gates.threshold)
    try:
        assert set_threshold(dynamic, build_sampler(dynamic.recipe.sampling), 0.8, 3) <= 0.8
    finally:
        dynamic.gates.threshold.fill_(before)
