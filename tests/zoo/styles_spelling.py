"""The same denoiser spelt differently: how the join is written, how blocks are kept and called, weights and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .specimen import Site, Specimen, built, per_block
from .styles_parts import (
    HEADS,
    WIDTH,
    AdaBlock,
    FusedAttention,
    ImageDenoiser,
    ImageFrame,
    Mlp,
    heads_apart,
    heads_together,
    image_inputs,
    image_style,
    modulate,
)

Join = Callable[[Tensor, Tensor, Tensor], Tensor]


def augmented(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """``x += gate * out``: the caller's tensor changes."""
    x += gate * out
    return x


def summed(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """``x = x + ...`` by a list that is summed, which starts from the integer zero."""
    return sum([x, gate * out])  # type: ignore[return-value]


JOINS: dict[str, Join] = {
    "torch-add": lambda x, gate, out: torch.add(x, gate * out),
    "torch-add-alpha": lambda x, gate, out: torch.add(x, gate * out, alpha=0.7),
    "augmented": augmented,
    "add-in-place": lambda x, gate, out: x.add_(gate * out),
    "branch-first": lambda x, gate, out: gate * out + x,
    "addcmul": lambda x, gate, out: torch.addcmul(x, gate, out),
    "addcmul-in-place": lambda x, gate, out: x.addcmul_(gate, out, value=0.5),
    "sum-of-list": summed,
    "subtracted": lambda x, gate, out: x - gate * out,
}


class JoinBlock(AdaBlock):
    """DiT's block with the join left open."""

    def __init__(self, width: int, heads: int, join: Join) -> None:
        super().__init__(width, heads)
        self.join = join

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = self.join(x, gate1, self.attn(self.norm1(x) * (1 + scale1) + shift1))
        return self.join(x, gate2, self.mlp(self.norm2(x) * (1 + scale2) + shift2))


def residual_join(x: Tensor, norm: nn.Module, branch: nn.Module, gate: Tensor) -> Tensor:
    """A residual join as a function that is handed the modules."""
    return x + gate.unsqueeze(1) * branch(norm(x))


class NamedParts(ImageFrame):
    """Norms and branches lie in one ``ModuleDict``; a plain list of names and modules says the order."""

    def __init__(self) -> None:
        super().__init__()
        names = [f"{kind}{index}" for index in range(2) for kind in ("attn", "mlp")]
        self.parts = nn.ModuleDict(
            {name: FusedAttention(WIDTH, HEADS) if name.startswith("attn") else Mlp(WIDTH) for name in names}
        )
        self.norms = nn.ModuleDict({name: nn.LayerNorm(WIDTH) for name in names})
        self.gates = nn.Linear(WIDTH, len(names) * WIDTH)
        self.order = [(self.norms[name], self.parts[name]) for name in names]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        gates = self.gates(F.silu(c)).chunk(len(self.order), dim=-1)
        for (norm, part), gate in zip(self.order, gates, strict=True):
            tokens = residual_join(tokens, norm, part, gate)
        return self.leave(tokens, c)


def attend(x: Tensor, weights: nn.ModuleDict, heads: int) -> Tensor:
    """Attention as a function over a dict of linears."""
    query, key, value = (heads_apart(part, heads) for part in weights["qkv"](x).chunk(3, dim=-1))
    return weights["out"](heads_together(F.scaled_dot_product_attention(query, key, value)))


class FunctionalDenoiser(ImageFrame):
    """No module is a block or a branch: linears lie in dicts, and everything else is functions in one loop."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 2), "down": (2, 1), "modulation": (1, 6)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(i * WIDTH, o * WIDTH) for name, (i, o) in sizes.items()}) for _ in range(2)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        for layer in self.layers:
            shift1, scale1, gate1, shift2, scale2, gate2 = layer["modulation"](F.silu(c)).chunk(6, dim=1)
            z = modulate(F.layer_norm(tokens, (WIDTH,)), shift1, scale1)
            tokens = tokens + gate1.unsqueeze(1) * attend(z, layer, HEADS)
            z = modulate(F.layer_norm(tokens, (WIDTH,)), shift2, scale2)
            tokens = tokens + gate2.unsqueeze(1) * layer["down"](F.gelu(layer["up"](z)))
        return self.leave(tokens, c)


class Residual(nn.Module):
    """A wrapper that adds what it wraps, after its own norm."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x)) + x


class WrappedDenoiser(ImageFrame):
    """The whole trunk is one ``nn.Sequential`` of residual wrappers around branches."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(2):
            parts += [Residual(WIDTH, FusedAttention(WIDTH, HEADS)), Residual(WIDTH, Mlp(WIDTH))]
        self.trunk = nn.Sequential(*parts)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        return self.leave(self.trunk(tokens + c.unsqueeze(1)), c)


class SharedDenoiser(ImageFrame):
    """One block's weights for every layer, as in the Universal Transformer (arXiv 1807.03819) and ALBERT (1909.11942).

    Args:
        listed: Keep the one block under three names of a ``ModuleList``, instead of calling it three times.
    """

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.block = AdaBlock(WIDTH, HEADS)
        self.steps = nn.Embedding(3, WIDTH)
        self.blocks = nn.ModuleList([self.block] * 3) if listed else None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        for index, block in enumerate(self.blocks or [self.block] * 3):
            tokens = block(tokens, c + self.steps.weight[index])
        return self.leave(tokens, c)


class SharedAttentionDenoiser(ImageFrame):
    """Blocks that share their attention but have MLPs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AdaBlock(WIDTH, HEADS) for _ in range(2))
        self.blocks[1].attn = self.blocks[0].attn

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.enter(x, t, y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.leave(tokens, c)


class HalfDenoiser(ImageDenoiser):
    """Every parameter and activation in bfloat16."""

    def __init__(self) -> None:
        super().__init__(AdaBlock)
        self.to(torch.bfloat16)


class MixedBlock(AdaBlock):
    """The stream, its norms and gates in float32, the branches in bfloat16, with casts on their way in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.attn.to(torch.bfloat16)
        self.mlp.to(torch.bfloat16)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        z = modulate(self.norm1(x), shift1, scale1).to(torch.bfloat16)
        x = x + gate1.unsqueeze(1) * self.attn(z).to(torch.float32)
        z = modulate(self.norm2(x), shift2, scale2).to(torch.bfloat16)
        return x + gate2.unsqueeze(1) * self.mlp(z).float()


class GateFirstBlock(AdaBlock):
    """Float32 only around the join: a bfloat16 model sums in float32 and rounds the stream again."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        out = self.attn(modulate(self.norm1(x), shift1, scale1))
        x = (x.float() + gate1.unsqueeze(1).float() * out.float()).type_as(x)
        out = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return (x.float() + gate2.unsqueeze(1).float() * out.float()).type_as(x)


class RoundedDenoiser(ImageDenoiser):
    """A bfloat16 model of such blocks."""

    def __init__(self) -> None:
        super().__init__(GateFirstBlock)
        self.to(torch.bfloat16)


def half_inputs(batch: int, step: int) -> dict[str, Any]:
    """The image in bfloat16, the timestep as it is."""
    inputs = image_inputs(batch, step)
    return inputs | {"x": inputs["x"].to(torch.bfloat16)}


def _style(
    name: str,
    model: Callable[[], nn.Module],
    sites: Callable[[nn.Module], list[Site]],
    attention: int = 2,
    mlp: int = 2,
    inputs: Callable[[int, int], dict[str, Any]] = image_inputs,
    note: str = "",
) -> Specimen:
    return Specimen(name, "style", model, inputs, attention, mlp, sites, note=note)


def _usual(model: nn.Module) -> list[Site]:
    return per_block("blocks", 2, attention="attn", mlp="mlp")


def _paths(**kinds: tuple[str, ...]) -> Callable[[nn.Module], list[Site]]:
    return lambda model: [Site(kind, (path,)) for kind, paths in kinds.items() for path in paths]


SPECIMENS: list[Specimen] = [
    *(image_style(f"join-{name}", partial(JoinBlock, join=join)) for name, join in JOINS.items()),
    _style(
        "module-dict",
        built(NamedParts),
        _paths(attention=("parts.attn0", "parts.attn1"), mlp=("parts.mlp0", "parts.mlp1")),
    ),
    _style("functional", built(FunctionalDenoiser), lambda model: per_block("layers", 2, attention="out", mlp="down")),
    _style(
        "residual-wrappers",
        built(WrappedDenoiser),
        _paths(attention=("trunk.0.inner", "trunk.2.inner"), mlp=("trunk.1.inner", "trunk.3.inner")),
    ),
    *(
        _style(
            name,
            built(SharedDenoiser, listed=listed),
            _paths(attention=("block.attn",), mlp=("block.mlp",)),
            attention=3,
            mlp=3,
            note="two sites, each called once per layer: three branches of each kind",
        )
        for name, listed in (("shared-block", False), ("shared-block-listed", True))
    ),
    _style(
        "shared-attention",
        built(SharedAttentionDenoiser),
        _paths(attention=("blocks.0.attn",), mlp=("blocks.0.mlp", "blocks.1.mlp")),
        note="one attention site, called twice",
    ),
    _style("bfloat16", built(HalfDenoiser), _usual, inputs=half_inputs),
    _style("bfloat16-float-join", built(RoundedDenoiser), _usual, inputs=half_inputs),
    _style("float-stream-bfloat16-branches", built(ImageDenoiser, block=MixedBlock), _usual),
]
