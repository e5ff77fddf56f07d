"""Capture: the model stays as it is, other inputs are captured again, and what is in the way is named."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.errors import CaptureError, ExportError, LocateError
from lazycompress.export.trace import trace
from lazycompress.gates import Gates
from lazycompress.graph.capture import capture
from lazycompress.runtime import LazyModel, wrap
from tests.zoo.specimen import built, constant, falling, moving
from tests.zoo.styles_parts import HEADS, WIDTH, AdaBlock, Mlp, PreNormBlock, TimeEmbed

MakeGates = Callable[..., Gates]


class Tokens(nn.Module):
    """A denoiser of any number of tokens: two blocks, conditioned by timestep."""

    def __init__(self, mlp: Callable[[int], nn.Module] = Mlp) -> None:
        super().__init__()
        self.time = TimeEmbed(WIDTH)
        self.enter = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(AdaBlock(WIDTH, HEADS, mlp=mlp) for _ in range(2))
        self.leave = nn.Linear(WIDTH, 8)

    def condition(self, t: Tensor) -> Tensor:
        return self.time(t)

    def embed(self, x: Tensor) -> Tensor:
        return self.enter(x)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, c = self.embed(x), self.condition(t)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.leave(tokens)


def inputs(batch: int = 2, step: int = 0, tokens: int = 6) -> dict[str, Any]:
    return {"x": moving(batch, step, tokens, 8), "t": falling(batch, step, 1000)}


def dense(model: nn.Module, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**call)
    return result


# -- the model is left as it is -----------------------------------------------------------------------------------------


class Table:
    """Positions, made at the first call and kept; not a module."""

    def __init__(self) -> None:
        self.made: Tensor | None = None

    def __call__(self, tokens: int) -> Tensor:
        if self.made is None:
            self.made = torch.linspace(0, 1, 64).unsqueeze(1)
        return self.made[:tokens]


class Remembers(Tokens):
    """Keeps what it computes in every place that code of models keeps things in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.by_size: dict[int, Tensor] = {}
        self.sizes: list[int] = []
        self.last: Tensor | None = None
        self.register_buffer("calls", torch.zeros(()))

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def ramp(self, tokens: int) -> Tensor:
        return torch.linspace(-1, 1, tokens).unsqueeze(1)

    def embed(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if tokens not in self.by_size:
            self.by_size[tokens] = torch.linspace(0, 0.5, tokens).unsqueeze(1)
        self.sizes.append(tokens)
        self.calls += 1
        self.last = self.enter(x)
        return self.last + self.table(tokens) + self.ramp(tokens) + self.by_size[tokens]


class ReadsWhatItComputes(Remembers):
    """Goes one of two ways by a number that it computes: nothing that a graph could hold."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        return out if out.mean().item() > 0 else -out


def everything(model: nn.Module) -> dict[str, Any]:
    """What a user could find changed: attributes, contents of containers, hooks, flags and values."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = id(value)
            if isinstance(value, dict | list | set):
                found[f"{path}.{name} holds"] = [id(v) for v in (value.values() if isinstance(value, dict) else value)]
    found |= {f"value of {name}": value.clone() for name, value in model.state_dict().items()}
    return found


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    if before.keys() != after.keys():
        return False
    return all(torch.equal(a, after[k]) if isinstance(a, Tensor) else a == after[k] for k, a in before.items())


@pytest.mark.parametrize(
    ("fails", "training"),
    [
        (True, True),
        *(
            pytest.param(f, t, marks=pytest.mark.slow(seconds=10))
            for f, t in [(True, False), (False, True), (False, False)]
        ),
    ],
)
def test_the_model_is_left_as_it_is(fails: bool, training: bool) -> None:
    model = built(ReadsWhatItComputes if fails else Remembers)()
    model.train(training)
    handle = model.blocks[0].register_forward_hook(lambda module, args, output: None)
    before = everything(model)
    if fails:
        with pytest.raises(CaptureError):
            lazycompress.locate(model, inputs())
    else:
        assert len(lazycompress.locate(model, inputs())) == 4
    assert same(before, everything(model))
    assert isinstance(model.table, Table)
    assert model.table.made is None
    handle.remove()


@pytest.mark.parametrize("called_before", [pytest.param(False, marks=pytest.mark.slow(seconds=10)), True])
def test_the_model_runs_after_capture_as_before(called_before: bool) -> None:
    wanted = dense(built(Remembers)(), inputs())
    model = built(Remembers)()
    if called_before:
        dense(model, inputs())
    lazycompress.locate(model, inputs())
    assert torch.equal(dense(model, inputs()), wanted)


# -- other inputs are captured again ----------------------------------------------------------------------------------


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "captures" in record.getMessage()]
    caplog.clear()
    return found


class FixedSize(Tokens):
    """Makes its positions in Python, for the one number of tokens that it sees."""

    def embed(self, x: Tensor) -> Tensor:
        return self.enter(x) + torch.tensor([[k / 10] for k in range(x.shape[1])])


def test_another_size_is_captured_once_with_one_notice(
    lively_gates: MakeGates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lazycompress")
    model = built(FixedSize)()
    lazy = wrap(model, (), inputs(), lively_gates)
    gates, parameters = lazy.gates, {id(p) for p in model.parameters()}
    lazy.policy = "compute"
    assert notices(caplog) == []
    for tokens, wanted in ((6, 0), (10, 1), (10, 0), (6, 0), (7, 1), (10, 0)):
        call = inputs(tokens=tokens)
        assert torch.equal(dense(lazy, call), dense(model, call))
        found = notices(caplog)
        assert len(found) == wanted
        assert all("\n" not in line and "shared" in line for line in found)
    assert lazy.gates is gates
    # Weights of every capture are those of the model, gates of every capture are one.
    assert {id(p) for name, p in lazy.named_parameters() if not name.startswith("gates.")} == parameters
    with torch.no_grad():
        model.leave.weight.mul_(2)
        gates.bias.fill_(-1e4)
    lazy.policy = "learned"
    lazy.reset()
    for tokens in (6, 10, 7):
        for step in (0, 1):
            call = inputs(step=step, tokens=tokens)
            assert torch.equal(dense(lazy, call), dense(model, call))
        assert lazy.summary().skip_ratio == 0


def test_gates_decide_in_a_second_capture_as_in_the_first(lively_gates: MakeGates) -> None:
    model = built(FixedSize)()
    calls = [inputs(step=step, tokens=10) for step in range(4)]
    first = wrap(model, (), calls[0], lively_gates)
    second = wrap(model, (), inputs(), lively_gates)
    for call in calls:
        assert torch.equal(dense(first, call), dense(second, call))
    assert 0 < first.summary().skip_ratio == second.summary().skip_ratio


class TextTokens(Tokens):
    """Text in front of the tokens, from a stack of layers [layers, batch, words, channels]: the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        tokens, c = torch.cat([self.words(text.mean(dim=0)), self.embed(x)], dim=1), self.condition(t)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.leave(tokens[:, text.shape[2] :])


def test_a_batch_in_the_second_dimension_is_dynamic(lively_gates: MakeGates, caplog: pytest.LogCaptureFixture) -> None:
    model = built(TextTokens)()

    def call(batch: int, step: int = 0) -> dict[str, Any]:
        return {**inputs(batch, step), "text": constant(batch, 4, 3, 12).transpose(0, 1)}

    lazy = wrap(model, (), call(2), lively_gates)
    lazy.policy = "compute"
    for batch in (3, 5, 2):
        assert torch.equal(dense(lazy, call(batch)), dense(model, call(batch)))
    assert notices(caplog) == []


class PromptLength(TextTokens):
    """Drops the padding of its text, whose length it reads from a mask."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(dim=1).max().item())
        return super().forward(x, t, text[:, :, :longest])


def test_another_prompt_length_is_captured_again(lively_gates: MakeGates, caplog: pytest.LogCaptureFixture) -> None:
    model = built(PromptLength)()

    def call(length: int) -> dict[str, Any]:
        mask = (torch.arange(5) < length).long().expand(2, 5)
        return {**inputs(), "text": constant(2, 4, 5, 12).transpose(0, 1), "mask": mask}

    lazy = wrap(model, (), call(3), lively_gates)
    lazy.policy = "compute"
    for length, wanted in ((3, 0), (4, 1), (3, 0), (4, 0)):
        assert torch.equal(dense(lazy, call(length)), dense(model, call(length)))
        assert len(notices(caplog)) == wanted


# -- what cannot be traced ---------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Each token goes to one of three experts; who gets how many is read on the host, in NumPy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.route = nn.Linear(width, 3)
        self.experts = nn.ModuleList(Mlp(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = self.route(flat).argmax(dim=1)
        out = torch.zeros_like(flat)
        for expert, count in zip(self.experts, chosen.bincount(minlength=3).cpu().numpy(), strict=True):
            if count == 0:
                continue
            number = list(self.experts).index(expert)
            rows = (chosen == number).nonzero().squeeze(1)
            out = out.index_copy(0, rows, expert(flat[rows]))
        return out.reshape(x.shape)


@pytest.mark.slow(seconds=10)
def test_experts_read_on_the_host_run_untraced_inside_their_branch(
    lively_gates: MakeGates, caplog: pytest.LogCaptureFixture
) -> None:
    model = built(Tokens, mlp=Experts)()
    lazy = wrap(model, (), inputs(), lively_gates)
    said = [record.getMessage() for record in caplog.records if "untraced" in record.getMessage()]
    assert len(said) == 1
    assert "blocks.0.mlp" in said[0]
    assert "\n" not in said[0]
    assert [branch.kind for branch in lazy.branches] == ["attention", "mlp"] * 2
    # Router and one expert for each of 6 tokens.
    assert lazy.branches[1].macs == 6 * (WIDTH * 3 + sum(p.numel() for p in Mlp(WIDTH).parameters() if p.dim() == 2))
    last = {}
    for batch in (3, 1):
        lazy.reset()
        for step in range(4):
            last[batch] = dense(lazy, inputs(batch, step))
        assert 0 < lazy.summary().skip_ratio < 1
    assert torch.allclose(last[1], last[3][:1], atol=1e-5)
    lazy.reset()
    lazy.policy = "compute"
    for step in range(2):
        assert torch.equal(dense(lazy, inputs(2, step)), dense(model, inputs(2, step)))
    with pytest.raises(ExportError, match=r"torch\.export"):
        trace(lazy)
    # What the first capture found out, another one begins with, and it is not said again.
    way = lazy.program(lazy.example).captured.way
    caplog.clear()
    assert capture(model, lazy.example, earlier=way).way == way
    assert not any("untraced" in record.getMessage() for record in caplog.records)


class BatchOfTheExample(Tokens):
    """Goes through its samples one by one: its batch is no size that a graph could leave open."""

    def embed(self, x: Tensor) -> Tensor:
        return torch.stack([super(BatchOfTheExample, self).embed(x[k]) for k in range(x.shape[0])])


def test_another_batch_goes_the_way_of_the_first_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many ways of exporting had to fail first, they fail once."""
    exports: list[bool] = []
    export = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        exports.append(True)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    model = built(BatchOfTheExample)()
    lazy = wrap(model, (), inputs(2))
    lazy.policy = "compute"
    first = len(exports)
    assert first > 1
    assert torch.equal(dense(lazy, inputs(3)), dense(model, inputs(3)))
    assert len(exports) == first + 1


class WholeBlock(PreNormBlock):
    """A block that reads its tokens on the host, so that its joins cannot be seen either."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for count in x.argmax(dim=-1).flatten().bincount(minlength=WIDTH).cpu().numpy():
            if count > 1:
                x = x * (1 + 1e-6 * int(count))
        return super().forward(x, c)


def test_a_module_that_holds_whole_branches_is_not_taken_untraced() -> None:
    model = built(Tokens)()
    model.blocks[1] = built(WholeBlock, width=WIDTH, heads=HEADS)()
    with pytest.raises(LocateError, match=r"blocks\.1 ") as caught:
        lazycompress.locate(model, inputs())
    assert "\n" not in str(caught.value)


def test_failure_names_operation_and_source_line() -> None:
    with pytest.raises(LazyCompressError) as caught:
        lazycompress.locate(built(ReadsWhatItComputes)(), inputs())
    line = next(k for k, text in enumerate(open(__file__), 1) if "out.mean().item() > 0" in text)  # noqa: SIM115
    message = str(caught.value)
    assert "\n" not in message
    assert f"ReadsWhatItComputes at {os.path.abspath(__file__)}:{line}" in message
    assert "item" in message or "data-dependent" in message


def test_lists_with_one_tensor_a_sample() -> None:
    class Listed(Tokens):
        """Takes and gives samples in lists."""

        def forward(self, x: list[Tensor], t: Tensor) -> list[Tensor]:  # type: ignore[override]
            return list(super().forward(torch.cat(x), t).unbind(0))

    model = built(Listed)()

    def call(batch: int, step: int) -> dict[str, Any]:
        plain = inputs(batch, step)
        return {"x": list(plain["x"].unsqueeze(1).unbind(0)), "t": plain["t"]}

    lazy: LazyModel = wrap(model, (), call(2, 0))
    for step in (0, 1):
        with torch.no_grad():
            got, wanted = lazy(**call(2, step)), model(**call(2, step))
        assert isinstance(got, list)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
