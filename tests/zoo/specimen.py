"""The form every zoo entry has: a tiny model, its inputs, and where its residual branches can be seen.

A *branch* is what a residual join ``x = x + f(x)`` adds, provided ``f`` holds a heavy operation. Joint attention over
several token streams is one branch with several streams; an MLP of its own for each stream is a branch of its own.
A join that cannot reach the model's output (the text half of a last block, say) is dead code and is not counted.

The counts in an entry come from reading the model's source, and the sites from naming the modules whose outputs
are the branch outputs. Neither looks at a traced graph, so both can judge a tool that does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MAX_BATCH = 8
"""Inputs are drawn for this many samples and then cut, so that sample 0 is the same sample in every batch."""

STEPS = 20
"""Length of the imagined sampling run that the timesteps belong to."""


@dataclass(frozen=True)
class Site:
    """Modules whose outputs are one branch's output, before any gate that depends on the timestep.

    Args:
        kind: ``"attention"``, ``"mlp"`` or ``"parallel"``.
        modules: Module paths; one, or several where the streams of one branch leave through different modules.
        pick: Positions of the branch's tensors if a module returns a tuple; ``None`` takes every tensor in it.
        call: Which of the module's calls within one forward it is, or ``None`` for each of them: a module that serves
            several branches remembers one output for each of its calls.
    """

    kind: str
    modules: tuple[str, ...]
    pick: tuple[int, ...] | None = None
    call: int | None = None


@dataclass(frozen=True)
class Specimen:
    """One tiny model of the zoo.

    Args:
        name: Unique and short.
        family: ``"image"``, ``"video"``, ``"audio"`` or ``"style"``.
        build: Makes the model: seeded, in eval mode, every parameter randomised.
        inputs: ``(batch, step)`` to forward's keyword arguments. Only latents and timestep depend on the step.
        attention: Number of attention branches by reading the source.
        mlp: Number of MLP branches.
        parallel: Number of blocks whose attention and MLP share one residual join.
        sites: Where each branch's output can be seen.
        note: Why a count is what it is.
        export: What ``torch.export`` manages: ``"dynamic"`` (any batch), ``"static"`` (the example's) or ``"none"``.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    attention: int
    mlp: int
    sites: Callable[[nn.Module], list[Site]]
    parallel: int = 0
    note: str = ""
    export: str = "dynamic"


def seeded(seed: int) -> torch.Generator:
    """A CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


def randomise(model: nn.Module, seed: int = 0, gain: float = 0.8) -> nn.Module:
    """Redraw every parameter, so that zero-initialised gates and projections do something, and switch to eval mode.

    Matrices get a spread that keeps the scale of what passes through; the weights of norms stay around one.
    """
    generator = seeded(seed)
    with torch.no_grad():
        for module in model.modules():
            norm = "norm" in type(module).__name__.lower()
            for name, parameter in module.named_parameters(recurse=False):
                draw = torch.randn(parameter.shape, generator=generator)
                if norm and parameter.ndim == 1 and name != "bias":
                    parameter.copy_(1 + 0.1 * draw)
                elif isinstance(module, nn.Embedding):
                    parameter.copy_(0.5 * draw)
                elif parameter.ndim >= 2 and name.endswith("weight"):
                    parameter.copy_(draw * gain / parameter[0].numel() ** 0.5)
                else:
                    parameter.copy_((0.1 if name == "bias" else 0.3) * draw)
    return model.eval().requires_grad_(False)


def built(cls: type[nn.Module], /, **config: Any) -> Callable[[], nn.Module]:
    """A builder for ``cls(**config)`` with randomised parameters that leaves the global random state alone."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return randomise(cls(**config))

    return build


def constant(batch: int, *shape: int, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    """Random conditioning of shape ``(batch, *shape)``, the same at every step."""
    return scale * torch.randn(MAX_BATCH, *shape, generator=seeded(seed))[:batch]


def moving(batch: int, step: int, *shape: int, seed: int = 2) -> torch.Tensor:
    """Random latents of shape ``(batch, *shape)`` that drift from step to step."""
    start = torch.randn(MAX_BATCH, *shape, generator=seeded(seed))
    drift = torch.randn(MAX_BATCH, *shape, generator=seeded(seed + 100))
    return (start + 0.3 * step * drift)[:batch]


def labels(batch: int, classes: int, *shape: int, seed: int = 3) -> torch.Tensor:
    """Random integers below ``classes``, the same at every step."""
    return torch.randint(classes, (MAX_BATCH, *shape), generator=seeded(seed))[:batch]


def prefix_mask(batch: int, length: int, shortest: int = 3, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A padding mask ``(batch, length)``: ones for each sample's own prefix, of which sample 0's is the whole."""
    lengths = torch.tensor([max(shortest, length - 2 * index) for index in range(MAX_BATCH)])
    return (torch.arange(length)[None] < lengths[:, None])[:batch].to(dtype)


def level(step: int, rising: bool = False) -> float:
    """The noise level of a step on 1..0, or 0..1 where a model counts the other way round."""
    done = (step + 0.5) / STEPS
    return done if rising else 1 - done


def falling(batch: int, step: int, scale: float = 1.0) -> torch.Tensor:
    """Timesteps ``(batch,)`` on ``scale``..0."""
    return torch.full((batch,), scale * level(step))


def countdown(batch: int, step: int) -> torch.Tensor:
    """Integer timesteps ``(batch,)`` on 1000..0, as DDIM-like schedulers give them."""
    return torch.full((batch,), round(1000 * level(step)), dtype=torch.int64)


def rising(batch: int, step: int, scale: float = 1.0) -> torch.Tensor:
    """Timesteps ``(batch,)`` on 0..``scale``."""
    return torch.full((batch,), scale * level(step, rising=True))


def per_block(blocks: str, layers: int, **kinds: str | tuple[str, ...]) -> list[Site]:
    """One site for each block and entry of ``kinds``, e.g. ``per_block("blocks", 2, attention="attn", mlp="ff")``.

    A tuple gives one site for each of its modules: two attentions of one block, or two MLPs.
    """
    return [
        Site(kind, (f"{blocks}.{index}.{module}",))
        for index in range(layers)
        for kind, modules in kinds.items()
        for module in ((modules,) if isinstance(modules, str) else modules)
    ]


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor in nested tuples, lists, dicts and dict-like outputs, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return [leaf for value in output.values() for leaf in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [leaf for value in output for leaf in tensors(value)]
    return []


def _merge(new: Any, old: Any, pick: tuple[int, ...] | None = None) -> Any:
    """``new`` with its tensors, or those at ``pick``, replaced by copies of those of ``old``."""
    if isinstance(new, torch.Tensor):
        return old.clone()
    if isinstance(new, (tuple, list)):
        wanted = range(len(new)) if pick is None else pick
        return type(new)(_merge(a, b) if i in wanted else a for i, (a, b) in enumerate(zip(new, old, strict=True)))
    return new


@contextmanager
def _watch(model: nn.Module, sites: Sequence[Site], memory: dict[tuple[str, int], Any], replay: bool) -> Iterator[None]:
    """Store what the sites give into ``memory``, or make them give what is stored there."""
    calls: Counter[str] = Counter()

    def forward_hook(path: str, picks: dict[int | None, tuple[int, ...] | None]) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            call, calls[path] = calls[path], calls[path] + 1
            if call not in picks and None not in picks:
                return None
            if replay:
                return _merge(output, memory[path, call], picks[call] if call in picks else picks[None])
            memory[path, call] = _merge(output, output)
            return None

        return hook

    wanted: dict[str, dict[int | None, tuple[int, ...] | None]] = {}
    for site in sites:
        for path in site.modules:
            wanted.setdefault(path, {})[site.call] = site.pick
    handles = [model.get_submodule(path).register_forward_hook(forward_hook(path, wanted[path])) for path in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reuse_reference(
    model: nn.Module, sites: Sequence[Site], inputs_first: dict[str, Any], inputs_second: dict[str, Any]
) -> list[torch.Tensor]:
    """The second call's output when every site gives again what it gave in the first call."""
    memory: dict[tuple[str, int], Any] = {}
    with torch.no_grad():
        with _watch(model, sites, memory, replay=False):
            model(**inputs_first)
        with _watch(model, sites, memory, replay=True):
            return tensors(model(**inputs_second))
