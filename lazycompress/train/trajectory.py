"""What reuse would do to the final image: a linear model of a whole denoising trajectory.

The sampler runs once with gradients on, and every branch output y[t, b] that it uses becomes a node of the tape. For a
random probe v with E[v v^T] = I / D over the D values of the final image x, backward gives g[t, b] = d(v . x) / d y[t, b]
for all steps and branches at once. Had branch b reused at step t what it computed at step s, v . x would have changed by

    u[t, b, t - s] = < g[t, b], F[s, b] - y[t, b] >

to first order, with F the freshly computed outputs. For a set of decisions the effects add up, signs included, and the
mean over probes of the square of that sum is the mean squared error of the image (a Gauss-Newton model, with Hutchinson's
estimate of the trace). So one run and a few backward passes price every decision and every pair of decisions, where trying
them one by one would take steps x branches runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..runtime import LazyModel
from ..sampling import Sampler


@dataclass
class Effects:
    """First-order effects of decisions on the final image, around one schedule.

    Attributes:
        effects: [samples, probes, steps, branches, max_age + 1]; age 0 is the freshly computed output.
        offset: [samples, probes], the projected error of the schedule itself.
        error: [samples], its true mean squared error to the dense image.
        timesteps: of the steps, float32 [steps].
        may_reuse: steps at which a cache is valid, bool [steps].
        forwards: model calls that this took, a backward pass counted as two.
    """

    effects: Tensor
    offset: Tensor
    error: Tensor
    timesteps: Tensor
    may_reuse: Tensor
    forwards: float

    @staticmethod
    def join(parts: Sequence[Effects]) -> Effects:
        """Several batches as one.

        Raises:
            InputError: the sampler made another number of calls in one of them.
        """
        if len({part.effects.shape[2] for part in parts}) > 1:
            counts = sorted({part.effects.shape[2] for part in parts})
            raise InputError(f"the sampler calls the model {counts} times in different runs: gates need a fixed number")
        return Effects(
            torch.cat([p.effects for p in parts]),
            torch.cat([p.offset for p in parts]),
            torch.cat([p.error for p in parts]),
            parts[0].timesteps,
            parts[0].may_reuse,
            sum(p.forwards for p in parts),
        )


class _Tape:
    """Controller that follows a schedule and records what every branch computed and what was used of it."""

    def __init__(self, branches: int, schedule: Tensor | None, record: bool) -> None:
        self.branches = branches
        self.schedule = schedule
        self.record = record
        self.fresh: list[list[list[Tensor]]] = []
        self.used: list[list[list[Tensor]]] = []
        self.may_reuse: list[bool] = []
        self._kept: list[list[Tensor] | None] = [None] * branches

    def __call__(
        self, branch: int, score: Tensor, valid: Tensor, fresh: list[Tensor], caches: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        if branch == 0:
            self.may_reuse.append(bool(valid.all()))
            self.fresh.append([])
            self.used.append([])
        step = len(self.may_reuse) - 1
        reuse = self.schedule is not None and self.may_reuse[step] and bool(self.schedule[step, branch])
        kept = self._kept[branch]
        if not reuse or kept is None:
            if self.record:
                # Before the first step nothing depends on a gradient: the output becomes the tape's leaf.
                fresh_nodes = [f if f.requires_grad else f.detach().requires_grad_() for f in fresh]
            else:
                fresh_nodes = list(fresh)
            kept = self._kept[branch] = fresh_nodes
        outputs = [value.view_as(value) for value in kept]
        if self.record:
            self.fresh[step].append([f.detach() for f in fresh])
            self.used[step].append(outputs)
        return outputs, torch.full_like(valid, reuse)


def run(lazy: LazyModel, sampler: Sampler, schedule: Tensor | None) -> Tensor:
    """Final latents of one sampling run that follows a schedule, bool [steps, branches]; dense if it is None."""
    lazy.reset()
    with torch.no_grad(), lazy.controlled(_Tape(len(lazy.branches), schedule, record=False)):
        return sampler(lazy).detach()


def linearise(
    lazy: LazyModel, sampler: Sampler, schedule: Tensor | None, *, seed: int, probes: int, max_age: int
) -> Effects:
    """Effects around a schedule, bool [steps, branches] (None: dense), of one sampling run with the noise of `seed`.

    Raises:
        InputError: no gradient of the final image reaches the model: the sampler runs under `torch.no_grad`, or
            computes the image outside of torch.
    """
    branches = len(lazy.branches)
    dense: Tensor | None = None
    forwards = 0.0
    if schedule is not None:
        torch.manual_seed(seed)
        dense = run(lazy, sampler, None)
    tape = _Tape(branches, schedule, record=True)
    times: list[float] = []
    hook = lazy.register_forward_hook(lambda *_: times.append(float(lazy.past_timestep.max())))
    frozen = [p for p in lazy.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    lazy.reset()
    torch.manual_seed(seed)
    try:
        with torch.enable_grad(), lazy.controlled(tape):
            image = sampler(lazy)
    finally:
        hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    steps = len(times)
    if not isinstance(image, Tensor) or not image.requires_grad:
        raise InputError(
            "no gradient reaches the model through the sampler: it must return the final latents as a tensor, and must "
            "not run under torch.no_grad or torch.inference_mode"
        )
    nodes = [value for of_step in tape.used for of_branch in of_step for value in of_branch]
    samples = image.shape[0]
    flat = image.reshape(samples, -1)
    difference = torch.zeros_like(flat) if dense is None else (flat - dense.reshape(samples, -1)).detach()
    generator = torch.Generator().manual_seed(seed)
    effects = torch.zeros(samples, probes, steps, branches, max_age + 1)
    offset = torch.zeros(samples, probes)
    for k in range(probes):
        signs = torch.randint(0, 2, flat.shape, generator=generator).to(flat) * 2 - 1
        probe = signs / flat.shape[1] ** 0.5
        offset[:, k] = (difference * probe).sum(dim=1)
        gradients = iter(
            torch.autograd.grad((flat * probe).sum(), nodes, retain_graph=k < probes - 1, allow_unused=True)
        )
        for t in range(steps):
            for b in range(branches):
                for s, used in enumerate(tape.used[t][b]):
                    gradient = next(gradients)
                    if gradient is None:
                        continue
                    for age in range(min(max_age, t) + 1):
                        change = (tape.fresh[t - age][b][s] - used.detach()).float() * gradient.float()
                        effects[:, k, t, b, age] += change.reshape(samples, -1).sum(dim=1)
    forwards += steps * (1 + 2 * probes) + (steps if dense is not None else 0)
    return Effects(
        effects,
        offset,
        difference.square().mean(dim=1),
        torch.tensor(times),
        torch.tensor(tape.may_reuse),
        forwards,
    )
