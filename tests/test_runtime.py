"""The lazy model in torch: what it equals, what it forgets, and that samples do not see one another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lazycompress import LazyCompressError
from lazycompress.gates import Gates
from lazycompress.graph.lower import lower
from lazycompress.integrations.digits.model import digits_sampler, draw_noise
from lazycompress.runtime import LazyModel, wrap

MakeGates = Callable[..., Gates]


def call(batch: int, timestep: int, seed: int = 0, noise: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed if noise is None else noise)
    return {
        "hidden_states": torch.randn(8, 1, 8, 8, generator=generator)[:batch],
        "timestep": torch.full((batch,), timestep),
        "class_labels": (torch.arange(8) + seed)[:batch] % 10,
    }


@pytest.fixture(scope="module")
def captured(short: nn.Module) -> LazyModel:
    return wrap(short, (), call(2, 980))


@pytest.fixture
def lazy(captured: LazyModel, lively_gates: MakeGates) -> LazyModel:
    """Captured once; for each test with new gates, and nothing kept."""
    captured.set_gates(lively_gates(captured.branches))
    captured.policy = "learned"
    captured.reset()
    return captured


def trajectory(model: nn.Module, batch: int, steps: int = 12, seed: int = 0, first: int = 0) -> Tensor:
    noise = draw_noise(8, seed)[first : first + batch]
    labels = torch.arange(8)[first : first + batch]
    with torch.no_grad():
        return digits_sampler(noise, labels, steps)(model)


def test_it_looks_like_the_original(lazy: LazyModel, short: nn.Module) -> None:
    assert lazy.config is short.config
    assert lazy.dtype is torch.float32
    assert lazy.device.type == "cpu"
    inputs = call(2, 980)
    with torch.no_grad():
        assert type(lazy(**inputs)) is type(short(**inputs))
        assert isinstance(lazy(**inputs, return_dict=False), tuple)
        positional = lazy(inputs["hidden_states"], inputs["timestep"], inputs["class_labels"]).sample
    assert positional.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_policy_compute_equals_the_original_bit_for_bit(lazy: LazyModel, short: nn.Module, batch: int) -> None:
    lazy.policy = "compute"
    assert torch.equal(trajectory(lazy, batch), trajectory(short, batch))
    assert lazy.summary().skip_ratio == 0.0
    assert lazy.summary().macs_ratio == 1.0


def test_policy_reuse_computes_the_first_step_only(lazy: LazyModel) -> None:
    lazy.policy = "reuse"
    trajectory(lazy, 2, steps=10)
    assert lazy.summary().skip_ratio == pytest.approx(0.9)


def test_reused_branches_are_not_executed(lazy: LazyModel) -> None:
    from lazycompress.graph.lower import lazy_branches

    program = lazy.program(lazy.example)
    runs: list[int] = []
    for branch in lazy_branches(program.lowered):
        branch.core.register_forward_pre_hook(lambda *_, index=branch.index: runs.append(index))
    lazy.policy = "reuse"
    with torch.no_grad():
        lazy(**call(2, 980))
        assert runs == list(range(len(lazy.branches)))
        lazy(**call(2, 960))
    assert runs == list(range(len(lazy.branches)))


def test_lowered_graph_equals_the_flat_graph_decision_for_decision(lazy: LazyModel) -> None:
    program = lazy.program(lazy.example)
    state = [spec.fresh(4, torch.device("cpu")) for spec in program.flat.state]
    kept = [value.clone() for value in state]
    seen = 0
    for timestep in range(980, 0, -70):
        inputs = [*call(4, timestep, seed=3).values()]
        with torch.no_grad():
            flat = program.flat.graph_module(*inputs, torch.tensor(0.5), *state)
            low = lower(program.flat).graph_module(*inputs, torch.tensor(0.5), *kept)
        assert torch.equal(flat[-1], low[-1])
        torch.testing.assert_close(flat[0], low[0], rtol=0, atol=2e-6)
        state, kept = list(flat[1:-1]), list(low[1:-1])
        seen += int(flat[-1].sum())
    assert 0.2 < seen / (14 * len(lazy.branches) * 4) < 0.8


def test_batch_equals_singles_decision_for_decision(lazy: LazyModel) -> None:
    together = trajectory(lazy, 8)
    of_batch = lazy.usage.heatmap()[1]
    lazy.reset()
    singles = torch.cat([trajectory(lazy, 1, first=i) for i in range(8)])
    torch.testing.assert_close(together, singles, rtol=0, atol=1e-5)
    assert torch.equal(of_batch, lazy.usage.heatmap()[1])
    assert 0.0 < of_batch[1:].mean() < 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_went_wrong_does_not_reach_the_next(lazy: LazyModel, value: float) -> None:
    lazy.set_gates(lazy.gates.like(order=2, static=1))
    with torch.no_grad():
        lazy.gates.bias[:] = 3.0  # all alike: outputs are forecast
        lazy.gates.bias[:, ::2] = -3.0
    fresh = trajectory(lazy, 2)
    assert lazy.summary().skip_ratio > 0.2
    with torch.no_grad():
        for timestep in (700, 600, 500, 400):
            lazy(
                **{
                    **call(2, timestep),
                    "hidden_states": torch.full((2, 1, 8, 8), value),
                    "class_labels": torch.arange(2),
                }
            )
    assert torch.equal(trajectory(lazy, 2), fresh)


def test_two_images_in_a_row_equal_two_fresh_starts(lazy: LazyModel) -> None:
    fresh = []
    for seed in (1, 2):
        lazy.reset()
        fresh.append(trajectory(lazy, 2, seed=seed))
    lazy.reset()
    in_a_row = [trajectory(lazy, 2, seed=seed) for seed in (1, 2)]
    for a, b in zip(fresh, in_a_row, strict=True):
        assert torch.equal(a, b)


steps = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([900, 700, 500, 300]), st.integers(0, 2), st.booleans()),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(steps)
def test_any_sequence_of_calls_equals_a_model_that_sees_only_its_own_image(
    short: nn.Module, sequence: list[tuple[int, int, int, bool]]
) -> None:
    """Interrupted runs, other prompts, other batch sizes, repeated steps: nothing of one image reaches the next.

    Each has noise of its own.
    """
    lazy = _cached(short)
    lazy.policy = "reuse"
    lazy.reset()
    images: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}  # what each image under way has seen
    for k, (batch, timestep, seed, reset) in enumerate(sequence):
        if reset:
            lazy.reset()
            images = {}
        past = images.get((batch, seed), [])
        past = past if past and timestep < past[-1][1] else []
        turn = {timestep, past[-1][1] if past else timestep}
        # Guidance in two calls looks like this: another prompt at the same timestep. All else is over.
        images = {key: calls for key, calls in images.items() if calls[-1][1] in turn}
        now = (batch, timestep, seed, past[-1][3] if past else 100 + k)
        images[batch, seed] = [*past, now]
        with torch.no_grad():
            found = lazy(**call(*now)).sample
            alone = _alone(short)
            alone.policy = "reuse"
            alone.reset()
            for seen in images[batch, seed]:
                expected = alone(**call(*seen)).sample
        assert torch.equal(found, expected)


_models: dict[str, LazyModel] = {}


def _cached(short: nn.Module, name: str = "one") -> LazyModel:
    if name not in _models:
        _models[name] = wrap(short, (), call(2, 980))
    return _models[name]


def _alone(short: nn.Module) -> LazyModel:
    return _cached(short, "alone")


def test_the_original_is_left_as_it_is(short: nn.Module) -> None:
    before = {name: value.clone() for name, value in short.state_dict().items()}
    modules = [type(m) for m in short.modules()]
    wrap(short, (), call(2, 980))
    assert [type(m) for m in short.modules()] == modules
    assert all(torch.equal(before[name], value) for name, value in short.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in short.modules())


def test_weights_are_shared_not_copied(lazy: LazyModel, short: nn.Module) -> None:
    own = {p.data_ptr() for p in short.parameters()}
    program = lazy.program(lazy.example)
    used = {p.data_ptr() for n, p in program.lowered.graph_module.named_parameters() if "lazy_gates" not in n}
    assert used <= own


def test_an_unknown_policy_is_refused(lazy: LazyModel) -> None:
    with pytest.raises(LazyCompressError, match="'learned', 'compute' or 'reuse'"):
        lazy.policy = "sometimes"  # type: ignore[assignment]


def test_summary_is_a_table_of_all_branches(lazy: LazyModel) -> None:
    trajectory(lazy, 2)
    text = str(lazy.summary())
    assert all(branch.name in text for branch in lazy.branches)
    assert "attention" in text
    assert "mlp" in text
