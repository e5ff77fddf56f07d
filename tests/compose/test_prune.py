"""Pruning: what gets narrower and by how much, what stays as it was, and what is said where nothing can be pruned."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lazycompress
from lazycompress import LazyCompressError, MissingExtraError
from lazycompress.compose.prune import prune
from lazycompress.integrations.digits.flow import flow_sampler, load_flow
from lazycompress.integrations.digits.metrics import mse_per_image
from lazycompress.integrations.digits.model import cycle_labels, digits_sampler, draw_noise
from lazycompress.recipe import Prune
from lazycompress.recipe_loading import load_recipe

INPUTS = {
    "hidden_states": torch.randn(2, 1, 8, 8),
    "timestep": torch.tensor([700, 300]),
    "class_labels": torch.tensor([1, 2]),
}


class Tiny(nn.Module):
    """A transformer of one block on tokens [B, 6, 16], with the MLP that `mlp` says."""

    def __init__(self, mlp: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = mlp
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16 + 32 * (mlp == "joined"), 16)
        self.head = nn.Identity()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens: Tensor, timestep: Tensor) -> Tensor:
        x = tokens + timestep.reshape(-1, 1, 1) / 1000
        z = self.norm(x)
        q, k, v = (layer(z).unflatten(2, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.mlp == "joined":
            return x + self.out(torch.cat([attended, F.gelu(self.up(z))], dim=2))
        x = x + self.out(attended)
        z = self.norm(x)
        if self.mlp == "gated":
            x = x + self.down(F.silu(self.gate(z)) * self.up(z))
        return self.head(x)


def tiny_sampler(model: Any) -> Tensor:
    x = torch.randn(3, 6, 16)
    for time in (900.0, 500.0, 100.0):
        x = x - 0.3 * model(tokens=x, timestep=torch.full((3,), time))
    return x


def test_widths_and_heads_shrink_as_asked_and_nothing_else_changes(digits: nn.Module) -> None:
    def sampler(model: Any) -> Tensor:
        return digits_sampler(torch.randn(2, 1, 8, 8), torch.arange(2), 3)(model)

    before, noise = copy.deepcopy(digits.state_dict()), torch.get_rng_state()
    pruned, report = prune(digits, sampler, Prune(mlp_width=0.25, heads=0.25, finetune_steps=0), progress=False)
    assert torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in digits.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in digits.modules())
    assert (report.stage, report.changed, report.left) == ("prune", 6 * 6, 6)
    branches = lazycompress.locate(pruned, INPUTS)
    # 16 tokens of width 128: four projections to three heads of 32 channels and two products; two matmuls with 384.
    assert {b.macs for b in branches if b.kind == "attention"} == {16 * 96 * (4 * 128 + 2 * 16)}
    assert {b.macs for b in branches if b.kind == "mlp"} == {16 * 2 * 128 * 384}
    with torch.no_grad():
        got, expected = pruned(**INPUTS).sample, digits(**INPUTS).sample
    assert got.shape == expected.shape
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.5


def test_a_gated_mlp_in_one_layer() -> None:
    model = load_flow()

    def sampler(denoiser: Any) -> Tensor:
        return flow_sampler(torch.randn(2, 1, 8, 8), torch.arange(2), 3)(denoiser)

    pruned, _ = prune(model, sampler, Prune(mlp_width=0.5, finetune_steps=0), progress=False)
    assert {(b.gate_up.out_features, b.down.in_features) for b in pruned.blocks} == {(256, 128)}
    assert pruned(**INPUTS).shape == (2, 1, 8, 8)


@pytest.mark.slow(seconds=13)
def test_fine_tuning_repairs_the_images(digits: nn.Module) -> None:
    def sampler(model: Any) -> Tensor:
        return digits_sampler(torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,)), 10)(model)

    def image_error(model: nn.Module) -> float:
        fresh = digits_sampler(draw_noise(20, 5), cycle_labels(20), 10)
        with torch.no_grad():
            return float(mse_per_image(fresh(model), fresh(digits)).mean())

    raw, tuned = (
        prune(digits, sampler, Prune(mlp_width=0.5, finetune_steps=steps, learning_rate=3e-4), progress=False)[0]
        for steps in (0, 30)
    )
    assert image_error(tuned) < 0.5 * image_error(raw)


def test_the_same_seed_gives_the_same_weights() -> None:
    options = Prune(mlp_width=0.5, finetune_steps=20, learning_rate=1e-3)
    first, again, other = (
        prune(Tiny("gated"), tiny_sampler, options, seed=seed, progress=False)[0].state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["up.weight"], other["up.weight"])


@pytest.mark.parametrize(("mlp", "hidden"), [("gated", 24), ("joined", 24)])
def test_mlps_of_two_layers_and_mlps_joined_with_attention(mlp: str, hidden: int) -> None:
    pruned, _ = prune(Tiny(mlp), tiny_sampler, Prune(mlp_width=0.25, finetune_steps=0), progress=False)
    assert pruned.up.out_features == hidden
    if mlp == "gated":
        assert (pruned.gate.out_features, pruned.down.in_features) == (hidden, hidden)
    else:
        assert (pruned.out.in_features, pruned.v.out_features) == (16 + hidden, 16)
    assert pruned(torch.zeros(2, 6, 16), torch.ones(2)).shape == (2, 6, 16)


def test_the_units_that_add_least_go_first() -> None:
    model = Tiny("gated")
    with torch.no_grad():
        model.down.weight[:, 5:13] *= 1e-4
    pruned, _ = prune(model, tiny_sampler, Prune(mlp_width=0.25, finetune_steps=0), progress=False)
    kept = [k for k in range(32) if not 5 <= k < 13]
    torch.testing.assert_close(pruned.gate.weight, model.gate.weight[kept])
    torch.testing.assert_close(pruned.down.weight, model.down.weight[:, kept])


def test_magnitude_pruning_zeroes_weights_of_branches_and_keeps_them_zero() -> None:
    options = Prune(method="magnitude", ratio=0.5, finetune_steps=20, learning_rate=1e-3)
    model = Tiny("gated")
    model.head = nn.Linear(16, 16)
    pruned, report = prune(model, tiny_sampler, options, progress=False)
    assert report.changed == 7
    for name, layer in pruned.named_children():
        if isinstance(layer, nn.Linear):
            assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5 * (name != "head"), abs=0.01), name
    assert not torch.equal(pruned.up.weight[pruned.up.weight != 0], model.up.weight[pruned.up.weight != 0])
    assert len(lazycompress.locate(pruned, {"tokens": torch.randn(2, 6, 16), "timestep": torch.ones(2)})) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Prune(), r"prune\.mlp_width: no MLP of Tiny .* has a hidden width.*set it to 0"),
        (Prune(mlp_width=0, heads=0.5), r"prune\.heads: the number of heads is fixed in the code of Tiny.*heads: 0"),
        (Prune(mlp_width=0), r"mlp_width and heads are both 0.*leave the section out"),
    ],
)
def test_nothing_to_prune_is_one_line_that_says_what_to_do(options: Prune, expected: str) -> None:
    with pytest.raises(LazyCompressError, match=expected) as caught:
        prune(Tiny("none"), tiny_sampler, options, progress=False)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_before_the_sampler_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(model: Any) -> Tensor:
        raise AssertionError("the sampler ran")

    for name in [name for name in sys.modules if name.split(".")[0] == "torch_pruning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"torch-pruning: pip install 'lazycompress\[prune\]'"):
        prune(Tiny("gated"), never, Prune(), progress=False)


def test_the_recipe_takes_a_pruning_section() -> None:
    section = load_recipe("lazy_dit_pruned_int8.yaml").prune
    assert section is not None
    assert (section.method, section.mlp_width) == ("structured", 0.25)
    with pytest.raises(LazyCompressError, match=r"'prune\.mlp_width'.*there was 1\.5"):
        load_recipe({"prune": {"mlp_width": 1.5}})
