"""A lazy graph follows the module that it was captured from: what changes there is captured again, or the module itself runs."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.profiler import profile

from lazycompress.errors import LazyCompressError
from lazycompress.runtime import LazyModel, wrap

from .export_models import alike
from .zoo.specimen import randomise

TIMES = torch.arange(900, 0, -100).float()


class Counting(SD3Transformer2DModel):
    """Knows how often it was called, and remembers the last time."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.table = {"last": self.calls}
        return super().forward(*args, **kwargs)


class Halving(JointAttnProcessor2_0):
    """Attention of half the size."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(value / 2 for value in super().__call__(*args, **kwargs))


def make(kind: type[SD3Transformer2DModel] = SD3Transformer2DModel) -> SD3Transformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
        )  # fmt: skip
        return randomise(model)  # type: ignore[return-value]


def call(time: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.full((2,), time),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(99)),
        "pooled_projections": torch.randn(2, 12, generator=torch.Generator().manual_seed(98)),
        "return_dict": False,
        **more,
    }


def make_lazy(model: nn.Module) -> LazyModel:
    return wrap(model, (), call(900.0), alike(TIMES))


@torch.no_grad()
def image(model: nn.Module, **more: Any) -> list[Tensor]:
    return [model(**call(float(time), seed=k, **more))[0] for k, time in enumerate(TIMES)]


def equals_the_model(lazy: LazyModel, **more: Any) -> bool:
    """Whether it gives what its model gives, computing all, and skips something else."""
    lazy.policy = "compute"
    lazy.reset()
    equal = all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(image(lazy, **more), image(lazy.model, **more), strict=True)
    )
    lazy.policy = "learned"
    lazy.reset()
    image(lazy, **more)
    return equal and lazy.summary().skip_ratio > 0.2


@pytest.fixture
def lazy() -> LazyModel:
    return make_lazy(make())


def changed(lazy: LazyModel) -> SD3Transformer2DModel:
    assert equals_the_model(lazy)
    model = lazy.model
    assert isinstance(model, SD3Transformer2DModel)
    return model


def test_a_weight_that_is_assigned_is_followed(lazy: LazyModel, caplog: pytest.LogCaptureFixture) -> None:
    model = changed(lazy)
    block: Any = model.transformer_blocks[1]
    block.attn.to_q.weight = nn.Parameter(block.attn.to_q.weight * 2)
    assert equals_the_model(lazy)
    assert [r.message for r in caplog.records if "again" in r.message] == [
        "lazycompress captures SD3Transformer2DModel again: its transformer_blocks.1.attn.to_q.weight is another one than at "
        "the last capture"
    ]


def test_weights_that_get_other_values_in_place_are_the_same(lazy: LazyModel, caplog: pytest.LogCaptureFixture) -> None:
    model = changed(lazy)
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
    assert equals_the_model(lazy)
    assert not [r for r in caplog.records if "lazycompress" in r.message]


def test_another_processor_is_followed_and_so_is_a_module_in_the_place_of_one(lazy: LazyModel) -> None:
    model = changed(lazy)
    model.set_attn_processor(Halving())
    assert equals_the_model(lazy)
    block: Any = model.transformer_blocks[0]
    block.ff = nn.Sequential(block.ff, nn.LayerNorm(16))
    assert equals_the_model(lazy)


def test_an_adapter_is_followed_scaled_switched_off_and_taken_out(lazy: LazyModel) -> None:
    model = changed(lazy)
    dense = image(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
        model.add_adapter(config, adapter_name="a")
    assert equals_the_model(lazy)
    assert not torch.equal(image(model)[0], dense[0])
    model.set_adapters("a", 0.5)
    assert equals_the_model(lazy)
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling["a"] = 3.0  # in place
    assert equals_the_model(lazy)
    model.disable_adapters()
    assert equals_the_model(lazy)
    assert torch.equal(image(model)[0], dense[0])
    model.delete_adapters("a")
    assert equals_the_model(lazy)


def test_hooks_are_run_by_the_module_itself(lazy: LazyModel, caplog: pytest.LogCaptureFixture) -> None:
    model = changed(lazy)
    seen: list[Tensor] = []
    hook = model.transformer_blocks[0].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    lazy.reset()
    assert all(torch.equal(a, b) for a, b in zip(image(lazy), image(model), strict=True))
    assert len(seen) == 2 * len(TIMES)
    assert lazy.summary().dense == len(TIMES)
    assert lazy.summary().skip_ratio == 0.0
    assert "run as they are" in str(lazy.summary())
    assert len([r for r in caplog.records if "hooks" in r.message]) == 1
    hook.remove()
    assert equals_the_model(lazy)


def test_a_module_in_training_mode_runs_itself_until_it_is_out_of_it(lazy: LazyModel) -> None:
    model = changed(lazy)
    model.train()
    lazy.reset()
    image(lazy)
    assert lazy.summary().dense == len(TIMES)
    model.eval()
    assert equals_the_model(lazy)


def test_a_call_with_other_branches_runs_as_it_is_between_those_of_an_image(lazy: LazyModel) -> None:
    lazy.reset()
    alone = image(lazy)
    skipped = lazy.summary().skip_ratio
    lazy.reset()
    with torch.no_grad():
        for k, time in enumerate(TIMES):
            assert torch.equal(lazy(**call(float(time), seed=k))[0], alone[k])
            fewer = call(float(time), seed=k, skip_layers=[1])
            assert torch.equal(lazy(**fewer)[0], lazy.model(**fewer)[0])
    summary = lazy.summary()
    assert (summary.calls, summary.dense) == (2 * len(TIMES), len(TIMES))
    assert summary.skip_ratio == pytest.approx(skipped / 2)


def test_what_runs_as_it_is_does_so_until_the_model_is_another(lazy: LazyModel) -> None:
    model = changed(lazy)
    fewer = call(900.0, skip_layers=[1])
    with torch.no_grad():
        lazy(**fewer)
        block: Any = model.transformer_blocks[1]
        block.attn.to_q.weight = nn.Parameter(block.attn.to_q.weight * 2)
        assert torch.equal(lazy(**fewer)[0], model(**fewer)[0])
    assert equals_the_model(lazy)


def test_what_calls_change_themselves_is_no_change(caplog: pytest.LogCaptureFixture) -> None:
    lazy = make_lazy(make(Counting))
    for _ in range(3):
        image(lazy.model)  # counts
        assert equals_the_model(lazy)
    assert len([r for r in caplog.records if "again" in r.message]) == 0


class Thirds(nn.Module):
    """A model that splits its batch, as guidance of several kinds does; a graph knows into how many parts."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        parts = x.chunk(3)
        x = torch.cat([parts[0], *parts[1:]]) + 0.001 * t[:, None, None]
        x = x + nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), x)
        return x + self.second(torch.relu(self.first(x)))


@torch.no_grad()
def test_what_no_graph_runs_and_the_model_does_is_run_by_the_model(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Thirds()
    lazy = wrap(model, (torch.randn(6, 5, 4), torch.full((6,), 900.0)), {})
    splits = []
    for time in (800.0, 700.0):
        x = torch.randn(4, 5, 4)  # two parts
        expected = model(x, torch.full((4,), time))
        with profile() as profiler:
            assert torch.equal(lazy(x, torch.full((4,), time)), expected)
        splits.append(sum(event.count for event in profiler.key_averages() if event.key == "aten::split"))
        assert len(lazy._states) == 0
    assert splits == [2, 1]  # no graph is tried a second time
    summary = lazy.summary()
    assert summary.calls == summary.dense == 2
    assert [record.message.count("such calls run as they are") for record in caplog.records].count(1) == 1
    with pytest.raises(LazyCompressError, match="cannot capture Thirds"):  # and neither does the model
        lazy(torch.randn(4, 5, 3), torch.full((4,), 600.0))
