"""Training on a real machine: on several processes, in less memory, and what it says meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress import LazyCompressError, free_memory
from lazycompress.recipe_loading import load_recipe
from lazycompress.runtime import LazyModel
from lazycompress.sampling import build_sampler
from lazycompress.train import memory, runs
from lazycompress.train.distributed import Group
from lazycompress.train.memory import bytes_of_a_call, check_memory, training_mode
from lazycompress.train.trajectory import linearise

from .quick import PAPER, QUICK, learn, same_gates

SLOW = pytest.mark.slow(seconds=8)


# -- several processes ------------------------------------------------------------------------------------------------

_SCRIPT = """
import sys
import torch
import lazycompress
from lazycompress.integrations.digits.model import load_bundled
from lazycompress.train import runs, paper
from lazycompress.train.distributed import Group

torch.set_num_threads(1)
group = Group.find()
assert group.size == 2
made = [0]
original = runs.linearise
def counting(*args, **kwargs):
    made[0] += 1
    return original(*args, **kwargs)
runs.linearise = counting
for name, overrides in {settings}.items():
    lazy = lazycompress.apply(load_bundled(), "digits_dit.yaml", overrides=overrides, progress=False)
    same = group.map([lambda: lazy.gates.bias.detach(), lambda: lazy.gates.bias.detach()])
    assert torch.equal(*same), "the processes have learned different gates"
    if group.main:
        torch.save({{"gates": lazy.gates.state_dict(), "made": made[0]}}, f"{folder}/{{name}}.pt")
def failing():
    if group.rank == 1:
        raise ValueError("of this process alone")
try:
    group.map([failing, failing])
except Exception as error:
    assert "of this process alone" in str(error), error
else:
    raise AssertionError("a failure elsewhere was not heard of")
if group.main:
    print("done")
"""


@pytest.mark.slow(seconds=60)
def test_two_processes_learn_what_one_does(digits: nn.Module, whole: LazyModel, tmp_path: Path) -> None:
    settings = {"loop": QUICK, "paper": {**PAPER, "train.effort": 0.02}}
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT.format(settings=settings, folder=tmp_path))
    # On machines without a GPU, too, this is what starts several processes: --cpu alone wants MPI.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, *options, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "loop.pt", weights_only=True)
    runs_of_one = whole.training_report.runs
    assert two["made"] == runs_of_one // 2, "the runs were not shared"
    for name, value in whole.gates.state_dict().items():
        torch.testing.assert_close(two["gates"][name], value, rtol=0, atol=1e-3, msg=name)
    alone = learn(digits, settings["paper"])
    together = torch.load(tmp_path / "paper.pt", weights_only=True)["gates"]
    weights = [name for name in together if name.startswith("weights")]
    # Twice as many pairs for each update: not the same weights, but the same in kind.
    sizes = [
        sum(float(gates[name].square().sum()) for name in weights) for gates in (together, alone.gates.state_dict())
    ]
    assert 0.3 < sizes[0] / sizes[1] < 3.0


def test_one_process_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    group = Group.find()
    assert (group.rank, group.size, group.main) == (0, 1, True)
    assert group.map([lambda: 1, lambda: 2]) == [1, 2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(
        LazyCompressError, match=r"several processes needs accelerate: pip install 'lazycompress\[train\]'"
    ):
        Group.find()


# -- memory and precision ---------------------------------------------------------------------------------------------


@pytest.fixture
def lazy(short: nn.Module) -> LazyModel:
    return learn(short, {**QUICK, "train.enabled": False})


def kept_bytes(lazy: LazyModel, overrides: dict[str, Any]) -> tuple[int, Tensor]:
    """Bytes of the tensors that a sampling run keeps for its backward pass, and the effects it gives."""
    recipe = load_recipe("digits_dit.yaml", {**QUICK, **overrides})
    assert recipe.sampling is not None
    weights = {p.untyped_storage().data_ptr() for p in lazy.model.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(value)
        return value

    lazy.gates.order.fill_(1)
    schedule = torch.rand(8, len(lazy.branches), generator=torch.Generator().manual_seed(0)) < 0.5
    with training_mode(lazy, recipe), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        found = linearise(lazy, build_sampler(recipe.sampling), schedule, seed=3, probes=1, max_age=2)
    return sum(sizes.values()), found.effects


def test_branches_that_are_computed_again_give_the_same_in_less_memory(lazy: LazyModel) -> None:
    requires = [p.requires_grad for p in lazy.parameters()]
    whole, effects = kept_bytes(lazy, {})
    less, again = kept_bytes(lazy, {"train.checkpointing": True})
    assert less < 0.6 * whole
    torch.testing.assert_close(again, effects, rtol=1e-5, atol=1e-7)
    after, _ = kept_bytes(lazy, {})
    assert after == whole, "it does not end with the block"
    assert [p.requires_grad for p in lazy.parameters()] == requires


def test_autocast_runs_in_half_precision_and_finds_nearly_the_same(lazy: LazyModel) -> None:
    whole, effects = kept_bytes(lazy, {})
    less, cast = kept_bytes(lazy, {"train.precision": "bfloat16"})
    assert less < 0.85 * whole
    assert not torch.equal(cast, effects)
    both = torch.stack([effects.flatten(), cast.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.99


@pytest.mark.slow(seconds=30)
def test_learning_in_less_memory_meets_the_target(digits: nn.Module, whole: LazyModel) -> None:
    small = learn(digits, {**QUICK, "train.precision": "bfloat16", "train.checkpointing": True})
    assert small.training_report.macs_ratio <= 0.5
    assert small.training_report.error < 2 * whole.training_report.error
    same_gates(whole, learn(digits, {**QUICK, "train.checkpointing": True}), atol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [{}, *(pytest.param(o, marks=SLOW) for o in ({"train.checkpointing": True}, {"train.precision": "bfloat16"}))],
)
def test_the_estimate_of_memory_is_what_a_run_keeps(lazy: LazyModel, overrides: dict[str, Any]) -> None:
    recipe = load_recipe("digits_dit.yaml", {**QUICK, **overrides})
    assert recipe.sampling is not None
    with training_mode(lazy, recipe):
        call = bytes_of_a_call(lazy, build_sampler(recipe.sampling))
    kept, _ = kept_bytes(lazy, overrides)
    # The gradients of all outputs come on top of what is kept, and outputs that no backward pass needs.
    outputs = sum(4 * 4 * 16 * 128 for _ in lazy.branches) * 8
    assert kept < call * 8 < 1.25 * (kept + 2 * outputs)


def test_a_model_that_is_too_large_is_said_before_anything_is_learned(
    digits: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("learning has begun")

    monkeypatch.setattr(memory, "available", lambda device, sharing: 20_000_000 // sharing)
    monkeypatch.setattr(runs, "linearise", never)
    with pytest.raises(LazyCompressError) as caught:
        learn(digits, QUICK)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("learning needs about", "8 calls", "20.0 MB are free", "sampling.batch", "train.checkpointing: true"):
        assert part in message, message


def test_processes_on_one_machine_share_its_memory(lazy: LazyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("digits_dit.yaml", QUICK)
    assert recipe.sampling is not None
    sampler = build_sampler(recipe.sampling)
    need = bytes_of_a_call(lazy, sampler) * 8
    monkeypatch.setattr(free_memory, "_of_the_machine", lambda: int(need * 1.5))
    monkeypatch.setattr(free_memory, "_of_the_container", lambda: None)
    check_memory(lazy, sampler, recipe, 8, Group())
    with pytest.raises(LazyCompressError, match="for each of 2 processes"):
        check_memory(lazy, sampler, recipe, 8, Group(0, 2, 2))
    monkeypatch.setattr(free_memory, "_of_the_container", lambda: need // 2)
    with pytest.raises(LazyCompressError, match="learning needs about"):
        check_memory(lazy, sampler, recipe, 8, Group())
    monkeypatch.setattr(free_memory, "_of_the_machine", lambda: None)
    monkeypatch.setattr(free_memory, "_of_the_container", lambda: None)
    check_memory(lazy, sampler, recipe, 8, Group())


def test_the_machine_says_what_is_free() -> None:
    found = memory.available(torch.device("cpu"))
    assert found is None or 10**6 < found < 10**15


# -- what it says meanwhile ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        pytest.param(QUICK, ("error=", "skipped=", "run/s"), marks=SLOW),
        ({**PAPER, "train.effort": 0.01}, ("error=", "skipped=", "penalty=", "step/s")),
    ],
)
def test_the_progress_bar_counts_to_its_end_and_shows_error_reuse_and_time_left(
    short: nn.Module, capsys: pytest.CaptureFixture[str], overrides: dict[str, Any], parts: tuple[str, ...]
) -> None:
    lazycompress.apply(short, "digits_dit.yaml", overrides=overrides)
    last = capsys.readouterr().err.replace("\n", "\r").strip("\r").split("\r")[-1]
    assert "100%" in last
    done, total = last.split("| ")[1].split(" ")[0].split("/")
    assert done == total
    assert "<00:00" in last
    for part in parts:
        assert part in last or part.replace("/s", "") in last
    lazycompress.apply(short, "digits_dit.yaml", overrides=overrides, progress=False)
    assert "learning" not in capsys.readouterr().err
