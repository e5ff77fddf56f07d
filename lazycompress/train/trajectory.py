"""What reuse would do to the final image: a linear model of a whole denoising trajectory.

The sampler runs once with gradients on, and every branch output y[t, b] that it uses becomes a node of the tape. For a
random probe v with E[v v^T] = I / D over the D values of the final image x, backward gives g[t, b] = d(v . x) / d y[t, b]
for all steps and branches at once. Had branch b reused at step t what it computed at step s, v . x would have changed by

    u[t, b, t - s] = < g[t, b], F[s, b] - y[t, b] >

to first order, with F the freshly computed outputs. A forecast is a weighted sum of computed outputs, (1 + q) F[s] - q F[r] with
q = (t - s) / (s - r) in time if it is a line, so its effect is (1 + q) u[t, b, t - s] - q u[t, b, t - r]: the same
table prices it. For a set of decisions the effects add up, signs included, and the
mean over probes of the square of that sum is the mean squared error of the image (a Gauss-Newton model, with Hutchinson's
estimate of the trace). So one run and a few backward passes price every decision and every pair of decisions, where trying
them one by one would take steps x branches runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..models import not_finite
from ..runtime import LazyModel
from ..sampling import Sampler
from .forecast import forecast_weights


@dataclass
class Effects:
    """First-order effects of decisions on the final image, around one schedule.

    Attributes:
        effects: [samples, probes, steps, branches, ages]; age 0 is the freshly computed output.
        whole: the same for the model's output in place of a branch's, [samples, probes, steps, 1, ages]: what it does to
            reuse all branches at once, and to forecast that output.
        offset: [samples, probes], the projected error of the schedule itself.
        error: [samples], its true mean squared error to the dense image.
        timesteps: of the steps, float32 [steps].
        times: the same, but strictly monotonous: a second call at one timestep counts as later, float64 [steps].
        may_reuse: steps at which a cache is valid, bool [steps].
        forwards: model calls that this took, a backward pass counted as two.
        final: the final latents, [samples, ...].
    """

    effects: Tensor
    whole: Tensor
    offset: Tensor
    error: Tensor
    timesteps: Tensor
    times: Tensor
    may_reuse: Tensor
    forwards: float
    final: Tensor

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
            torch.cat([p.whole for p in parts]),
            torch.cat([p.offset for p in parts]),
            torch.cat([p.error for p in parts]),
            parts[0].timesteps,
            parts[0].times,
            parts[0].may_reuse,
            sum(p.forwards for p in parts),
            torch.cat([p.final for p in parts]),
        )


class _Tape:
    """Controller that follows a schedule and records what every branch computed and what was used of it.

    A step is one call of each state that takes turns (guidance in two calls): they share the schedule, not the caches.
    """

    def __init__(self, lazy: LazyModel, schedule: Tensor | None, record: bool) -> None:
        self.lazy = lazy
        self.schedule = schedule
        self.record = record
        self.order = int(lazy.gates.order)
        self.phase = float(lazy.gates.direction) * float(lazy.gates.phase)
        #: Per step and state: branch -> outputs.
        self.fresh: list[dict[int, dict[int, list[Tensor]]]] = []
        self.used: list[dict[int, dict[int, list[Tensor]]]] = []
        self.may_reuse: list[bool] = []
        self.timesteps: list[float] = []
        #: The same, with a second call at one timestep later than the first.
        self.times: list[float] = []
        self.batch = 1
        self._call = -1
        self._context = 0
        self._goes_on = False
        #: Nothing is computed in this call: the model's output is forecast.
        self._whole = False
        #: The last computed outputs, newest last, with their steps: as many as a forecast needs.
        self._kept: dict[tuple[int, int], list[tuple[int, list[Tensor]]]] = {}

    @property
    def steps(self) -> int:
        return len(self.times)

    def __call__(
        self, branch: int, score: Tensor, valid: Tensor, fresh: list[Tensor], caches: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        if self._call != self.lazy.usage.calls:
            self._begin(bool(valid.all()), valid.shape[0])
        # The graph's own forecast stands back: it sees no call without computation.
        computed = torch.zeros_like(valid)
        if self._whole:
            fresh = [value.detach() for value in fresh]
            self._record(branch, fresh, fresh)
            return fresh, computed
        reuse = self._goes_on and self.schedule is not None and bool(self.schedule[self.steps - 1, branch])
        return self._use(branch, fresh, reuse, order=0), computed

    def outputs(self, values: list[Tensor]) -> list[Tensor]:
        """The model's outputs, as those of one more branch that is reused where all are.

        Raises:
            InputError: the dense model's are not finite. Under a schedule they may be: that is one of its errors.
        """
        found = next(filter(None, map(not_finite, values)), "") if self.schedule is None else ""
        if found:
            raise InputError(
                f"call {self.lazy.usage.calls + 1} of a sampling run, at timestep {self.timesteps[-1]:g}: the dense model's "
                f"output holds {found}"
            )
        return self._use(len(self.lazy.branches), values, self._whole, self.order)

    def _use(self, branch: int, fresh: list[Tensor], reuse: bool, order: int) -> list[Tensor]:
        """What is used for what was computed."""
        step, key = self.steps - 1, (self._context, branch)
        if not (reuse and key in self._kept):
            # Before the first step nothing depends on a gradient: the output becomes the tape's leaf.
            leaves = [f if f.requires_grad or not self.record else f.detach().requires_grad_() for f in fresh]
            before = self._kept[key][-order:] if order and self._goes_on and key in self._kept else []
            self._kept[key] = [*before, (step, leaves)]
        used = self._outputs(self._kept[key], step)
        self._record(branch, fresh, used)
        return used

    def _record(self, branch: int, fresh: list[Tensor], used: list[Tensor]) -> None:
        if self.record:
            self.fresh[-1][self._context][branch] = [f.detach() for f in fresh]
            self.used[-1][self._context][branch] = used

    def _outputs(self, kept: list[tuple[int, list[Tensor]]], step: int) -> list[Tensor]:
        last, values = kept[-1]
        if step == last or len(kept) < 2:
            return [value.view_as(value) for value in values]
        computed = np.array([at for at, _ in kept])
        found = forecast_weights(np.array(self.times), computed, np.array([step]), len(kept) - 1)
        weights = [float(weight[0]) for weight, _ in reversed(found)]
        parts = zip(*(values for _, values in kept), strict=True)
        return [sum_of(weights, part) for part in parts]

    def _begin(self, may_reuse: bool, batch: int) -> None:
        self._call, self._context, self.batch = self.lazy.usage.calls, self.lazy.context, batch
        if not self.used or self._context in self.used[-1]:
            self.fresh.append({})
            self.used.append({})
            self.may_reuse.append(True)
            again = bool(self.timesteps) and self.timesteps[-1] == self.lazy.timestep
            self.timesteps.append(self.lazy.timestep)
            self.times.append(self.lazy.timestep - self.phase * again)
        if self.schedule is not None and self.steps > len(self.schedule):
            self.check_steps()
        self.fresh[-1][self._context] = {}
        self.used[-1][self._context] = {}
        self.may_reuse[-1] &= may_reuse
        self._goes_on = may_reuse
        reused = self.schedule is not None and bool(self.schedule[self.steps - 1].all())
        self._whole = self.order > 0 and may_reuse and reused

    def check_steps(self) -> None:
        """Raises:
        InputError: the run has another number of steps than the schedule that it follows.
        """
        if self.schedule is not None and self.steps != len(self.schedule):
            raise InputError(
                f"the sampler made {self.steps} steps in one run and {len(self.schedule)} in another: gates need a fixed number"
            )

    def per_image(self, values: Tensor, images: int) -> Tensor:
        """Sums per image, [images, ...], of values per sample of a call, [batch, ...].

        Guidance in one batch repeats all images: the whole set without the prompt, then the whole set with it.
        """
        if self.batch % images:
            return (values.sum(dim=0) / images).expand(images, *values.shape[1:]).cpu()
        return values.reshape(-1, images, *values.shape[1:]).sum(dim=0).cpu()


def sum_of(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The weighted sum of some tensors."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def run(lazy: LazyModel, sampler: Sampler, schedule: Tensor | None) -> Tensor:
    """Final latents of one sampling run that follows a schedule, bool [steps, branches]; dense if it is None."""
    lazy.reset()
    tape = _Tape(lazy, schedule, record=False)
    with torch.no_grad(), lazy.programs.controlled(tape, tape.outputs):
        image = sampler(lazy).detach()
    tape.check_steps()
    return image


def linearise(
    lazy: LazyModel,
    sampler: Sampler,
    schedule: Tensor | None,
    *,
    seed: int,
    probes: int,
    max_age: int,
    dense: Tensor | None = None,
) -> Effects:
    """Effects around a schedule, bool [steps, branches] (None: dense), of one sampling run with the noise of `seed`.

    Args:
        lazy: the model; every branch is computed whatever its gate says.
        sampler: one denoising loop, with gradients.
        schedule: what is reused.
        seed: of torch's global generator.
        probes: random projections of the final latents, each a backward pass.
        max_age: of reuse, in steps.
        dense: final latents of the dense model for this seed; left out, sampled now where a schedule needs them.

    Raises:
        InputError: no gradient of the final image reaches the model: the sampler runs under `torch.no_grad`, or
            computes the image outside of torch.
    """
    branches = len(lazy.branches)
    sampled = schedule is not None and dense is None
    if sampled:
        torch.manual_seed(seed)
        dense = run(lazy, sampler, None)
    tape = _Tape(lazy, schedule, record=True)
    frozen = [p for p in lazy.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    lazy.reset()
    torch.manual_seed(seed)
    try:
        with torch.enable_grad(), lazy.programs.controlled(tape, tape.outputs):
            image = sampler(lazy)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    steps = tape.steps
    tape.check_steps()
    if not isinstance(image, Tensor) or not image.requires_grad:
        raise InputError(
            "no gradient reaches the model through the sampler: it must return the final latents as a tensor, and must "
            "not run under torch.no_grad or torch.inference_mode"
        )
    used_at = [
        (t, context, b, s, used)
        for t, of_step in enumerate(tape.used)
        for context, of_context in of_step.items()
        for b, of_branch in of_context.items()
        for s, used in enumerate(of_branch)
    ]
    nodes = [used for *_, used in used_at if used.requires_grad]
    streams = list(dict.fromkeys((context, b, s) for _, context, b, s, _ in used_at))
    samples = image.shape[0]
    flat = image.reshape(samples, -1)
    difference = torch.zeros_like(flat) if dense is None else (flat - dense.reshape(samples, -1)).detach()
    generator = torch.Generator().manual_seed(seed)
    ages = (max_age + 1) * (1 + tape.order)
    effects = torch.zeros(samples, probes, steps, branches + 1, ages, dtype=torch.float32)
    offset = torch.zeros(samples, probes, dtype=torch.float32)
    for k in range(probes):
        signs = torch.randint(0, 2, flat.shape, generator=generator).to(flat) * 2 - 1
        probe = signs / flat.shape[1] ** 0.5
        offset[:, k] = (difference * probe).sum(dim=1)
        gradients = torch.autograd.grad((flat * probe).sum(), nodes, retain_graph=k < probes - 1, allow_unused=True)
        found = dict(zip((at[:4] for at in used_at if at[4].requires_grad), gradients, strict=True))
        for context, b, s in streams:
            # Only the output is forecast, from computations further back.
            reach = ages if b == branches else max_age + 1
            effects[:, k, :, b, :reach] += _effects_of(tape, found, (context, b, s), samples, reach)
    forwards = steps * (1.0 + 2 * probes + sampled)
    return Effects(
        effects[..., :branches, :],
        effects[..., branches:, :],
        offset,
        difference.square().mean(dim=1),
        torch.tensor(tape.timesteps, dtype=torch.float32),
        torch.tensor(tape.times, dtype=torch.float64),
        torch.tensor(tape.may_reuse),
        forwards,
        image.detach(),
    )


def _effects_of(
    tape: _Tape,
    gradients: Mapping[tuple[int, int, int, int], Tensor | None],
    stream: tuple[int, int, int],
    images: int,
    ages: int,
) -> Tensor:
    """Effects of one stream of one branch, of a state: [images, steps, ages]."""
    context, b, s = stream
    at = [t for t in range(tape.steps) if b in tape.used[t].get(context, {})]
    used, fresh = ([tape_of[t][context][b][s] for t in at] for tape_of in (tape.used, tape.fresh))

    def rows(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([v.detach().float().reshape(tape.batch, -1) for v in values], dim=1)

    g = rows(
        [
            torch.zeros_like(u) if (d := gradients.get((t, *stream))) is None else d
            for t, u in zip(at, used, strict=True)
        ]
    )
    y, f = rows(used), rows(fresh)
    own = (g * y).sum(dim=2)
    found = torch.zeros(tape.batch, tape.steps, ages, dtype=torch.float32, device=g.device)
    # Of the products of all steps with all steps only those near the diagonal are needed: block by block.
    for start in range(0, len(at), ages):
        first = max(0, start - ages + 1)
        products = g[:, start : start + ages] @ f[:, first : start + ages].transpose(1, 2)
        pairs = [
            (i, j, t, t - then)
            for i, t in enumerate(at[start : start + ages])
            for j, then in enumerate(at[first : start + i + 1])
            if t - then < ages
        ]
        row, column, step, age = (torch.tensor(numbers, device=g.device) for numbers in zip(*pairs, strict=True))
        found[:, step, age] = products[:, row, column] - own[:, start + row]
    return tape.per_image(found, images)
