"""Models that are not what they should be, and a tiny one that is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lazycompress

from .harness import Try

WIDTH, CHANNELS, TOKENS, BATCH, STEPS = 8, 4, 3, 2, 3


class Block(nn.Module):
    """Self-attention and an MLP, shifted by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x) + condition).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x) + condition)))


class Tiny(nn.Module):
    """A denoiser of one block: latents x [batch, tokens, channels], timestep [batch], labels y [batch]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time, self.label = nn.Linear(1, WIDTH), nn.Embedding(4, WIDTH)
        self.block = Block()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        condition = (self.time(timestep.to(x.dtype).unsqueeze(1) / 1000) + self.label(y)).unsqueeze(1)
        return self.leave(self.drop(self.block(self.enter(x), condition)))


@functools.cache
def good() -> Tiny:
    """The one that is right; nobody changes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny().eval()


def like(change: Callable[[Tiny], object] = lambda model: None, kind: type[Tiny] = Tiny) -> Tiny:
    """Another one with the same weights, changed."""
    with torch.random.fork_rng(devices=[]):
        model = kind()
    model.load_state_dict(good().state_dict(), strict=False)
    model.eval()
    change(model)
    return model


def noise(batch: int = BATCH) -> Tensor:
    return torch.randn(batch, TOKENS, CHANNELS)


def times(value: float, batch: int = BATCH) -> Tensor:
    return torch.full((batch,), value)


def sample(model: Any, x: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """A denoising loop as it should be."""
    x = noise() if x is None else x
    parameters = list(model.parameters())
    x = x.to(parameters[0].dtype) if parameters else x
    for k in range(steps):
        x = x - 0.3 * model(x, times(900.0 - 300 * k, len(x)), torch.arange(len(x)) % 4)
    return x


LEARN: dict[str, Any] = {"target": 0.7, "train": {"effort": 0.1}}


def learn(model: Any = None, sampler: Any = sample, **options: Any) -> Any:
    """Learn as quickly as it goes."""
    recipe = options.pop("recipe", LEARN)
    return lazycompress.apply(
        model if model is not None else good(), recipe, sampler=sampler, progress=False, **options
    )


class Counts(Tiny):
    """Its output depends on how often it was called."""

    step, every = 0.01, 1

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x, timestep, y) * (1 + self.step * (self.calls // self.every))


class CountsSlowly(Counts):
    every = 3


class Draws(Tiny):
    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x), timestep, y)


class WritesLatents(Tiny):
    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9), timestep, y)


class WritesTimestep(Tiny):
    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, timestep.div_(2), y)


class WritesLabels(Tiny):
    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, timestep, y.fill_(1))


class Remembers(Tiny):
    """Adds what it gave last time."""

    last: Tensor | None = None

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        out = super().forward(x, timestep, y)
        given = out if self.last is None else out + 0.1 * self.last
        self.last = out.detach()
        return given


class BadAtTheEnd(Tiny):
    value = float("inf")

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        out = super().forward(x, timestep, y)
        return torch.where((timestep < 400)[:, None, None], torch.full_like(out, self.value), out)


class NanAtTheEnd(BadAtTheEnd):
    value = float("nan")


class NoWeights(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return x * 0.1


class Raises(Tiny):
    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        if float(timestep[0]) < 700:
            raise ValueError("no such\ntimestep")
        return super().forward(x, timestep, y)


class Normed(Tiny):
    """Keeps running statistics in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(TOKENS)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.statistics(x), timestep, y)


class OtherName(Tiny):
    """Has no argument that looks like a timestep."""

    def forward(self, x: Tensor, when: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, when, y)


class Positional(Tiny):
    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(*inputs)


class GivesNothing(Tiny):
    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Any:
        super().forward(x, timestep, y)
        return None


class Wide(Tiny):
    """A signature that its callers know nothing of."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, need: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, timestep, y) + need


def set_weight(name: str, value: float) -> Callable[[Tiny], None]:
    def change(model: Tiny) -> None:
        with torch.no_grad():
            dict(model.named_parameters())[name].flatten()[0] = value

    return change


def model(name: str, make: Callable[[], Any], says: str | None, sampler: Any = sample) -> Try:
    def act(_: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            made = make()
        learn(made, sampler)

    return Try(f"model: {name}", act, says)


def in_training_mode(
    change: Callable[[Tiny], object] = lambda model: None, kind: type[Tiny] = Tiny
) -> Callable[[Path], None]:
    """The lazy model computes what the dense one does in evaluation mode, and the dense one is as it was."""

    def act(_: Path) -> None:
        dense = like(change, kind).train()
        dense.block.norm1.eval()
        state, modes = {k: v.clone() for k, v in dense.state_dict().items()}, [m.training for m in dense.modules()]
        lazy = learn(dense)
        if [m.training for m in dense.modules()] != modes:
            raise AssertionError("the modes of the model's parts changed")
        if not all(torch.equal(state[k], v) for k, v in dense.state_dict().items()):
            raise AssertionError("the model's state changed")
        lazy.policy = "compute"
        x, y = torch.ones(BATCH, TOKENS, CHANNELS), torch.zeros(BATCH, dtype=torch.int64)
        with torch.no_grad():
            difference = (lazy(x, times(900.0), y) - dense.eval()(x, times(900.0), y)).abs().max()
        if float(difference) > 1e-5:
            raise AssertionError(f"not the model in evaluation mode: {float(difference)}")

    return act


def huge_labels(model: Any) -> Tensor:
    return noise() - model(noise(), times(900.0), torch.tensor([1, 99]))


TRIES = [
    model("as it should be", good, None),
    model(
        "NaN in a weight",
        lambda: like(set_weight("block.qkv.weight", float("nan"))),
        r"its weight block\.qkv\.weight holds NaN",
    ),
    model("inf in a weight", lambda: like(set_weight("leave.bias", float("inf"))), r"its weight leave\.bias holds inf"),
    model(
        "inf at the last step only",
        lambda: like(kind=BadAtTheEnd),
        r"call 3 of the sampling run: the output of BadAtTheEnd holds inf",
    ),
    model(
        "NaN at the last step only",
        lambda: like(kind=NanAtTheEnd),
        r"call 3 of the sampling run: the output of NanAtTheEnd holds NaN",
    ),
    model(
        "overflow in half precision",
        lambda: like(set_weight("leave.weight", 6e4)).half(),
        r"output of Tiny holds (inf|NaN)",
    ),
    model(
        "labels out of range",
        good,
        r"call 1 of .*: Tiny raised IndexError: .*; it was given .*y int64\[2\] from 1 to 99",
        huge_labels,
    ),
    model(
        "raises in the middle",
        lambda: like(kind=Raises),
        r"call 2 of the sampling run: Raises raised ValueError: no such timestep",
    ),
    model(
        "counts its calls",
        lambda: like(kind=Counts),
        "Counts gave two outputs for the same call: it draws random numbers, counts",
    ),
    model(
        "counts its calls by threes",
        lambda: like(kind=CountsSlowly),
        "CountsSlowly gave another output the second time|gave two outputs",
    ),
    model("draws random numbers", lambda: like(kind=Draws), "Draws gave two outputs for the same call"),
    model("remembers its last output", lambda: like(kind=Remembers), "Remembers gave two outputs for the same call"),
    model(
        "changes its latents in place", lambda: like(kind=WritesLatents), "WritesLatents changes its input x in place"
    ),
    model(
        "changes its timestep in place",
        lambda: like(kind=WritesTimestep),
        "WritesTimestep changes its input timestep in place",
    ),
    model("changes its labels in place", lambda: like(kind=WritesLabels), "WritesLabels changes its input y in place"),
    model(
        "a torch.jit script",
        lambda: torch.jit.trace(good(), (noise(), times(9.0), torch.zeros(2, dtype=torch.int64)), check_trace=False),
        "a torch.jit script",
    ),
    model(
        "a partial function",
        lambda: functools.partial(good()),
        r"apply takes an nn\.Module or a diffusers pipeline, there was partial",
    ),
    model("a function", lambda: good().forward, r"apply takes an nn\.Module or a diffusers pipeline"),
    model("a class", lambda: Tiny, r"apply takes an nn\.Module or a diffusers pipeline, there was type"),
    model("a state dict", lambda: good().state_dict(), "there was OrderedDict"),
    model("a path", lambda: "model/", "there was str"),
    model("no weights", NoWeights, None),
    model("on the meta device", lambda: like().to("meta"), "on the meta device"),
    model(
        "no timestep among its arguments",
        lambda: like(kind=OtherName),
        "none of the inputs when, y of OtherName looks like the timestep",
    ),
    model(
        "takes anything",
        lambda: like(kind=Positional),
        "none of the inputs argument 1, argument 2 of Positional",
    ),
    model(
        "gives nothing",
        lambda: like(kind=GivesNothing),
        "the sampler raised TypeError|returned NoneType|holds no tensor",
    ),
    model("needs one more argument", lambda: like(kind=Wide), "Wide.*missing a required argument: 'need'"),
    model("a linear layer", lambda: nn.Linear(4, 4), "do not fit"),
    model("an empty module", nn.Module, "call|forward|signature"),
    model("a container", lambda: nn.Sequential(nn.Linear(4, 4)), "do not fit"),
    Try("model: in training mode, with dropout", in_training_mode(lambda m: setattr(m.drop, "p", 0.5)), None),
    Try("model: in training mode, with running statistics", in_training_mode(kind=Normed), None),
    Try("model: a batch of no samples", lambda _: learn(sampler=lambda model: sample(model, noise(0))), "no samples"),
    Try(
        "model: integers as latents",
        lambda _: learn(sampler=lambda model: model(noise().long(), times(9.0), torch.tensor([0, 1]))),
        "Tiny|without a floating-point",
    ),
    Try(
        "model: latents without tokens",
        lambda _: learn(sampler=lambda model: sample(model, torch.randn(2, 4))),
        "without a floating-point tensor of rank 3|tensor of rank 3",
    ),
]
