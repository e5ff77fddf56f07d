"""`Gates`: the trained part of a lazy model, and the decisions that it takes over one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .gate import NEVER, PRINT, SOONEST, clock, decide, elapsed, hat, times, valid

#: What the logarithm of the elapsed time counts in gates that follow a schedule.
SLOPE = 8.0

#: How long an output keeps that is never reused, as a share of the time to the next computation: at twice as many steps, where
#: that time is two steps, it is not reused either.
SHORT = 0.4

#: Bias of a decision that must not be taken: below any threshold, whatever the elapsed time.
FORBIDDEN = -1e4


class Gates(nn.Module):
    """The trained part of a lazy model: one linear gate per branch and grid timestep.

    Attributes:
        grid: ascending timesteps, float32 [grid].
        weights: per branch, float32 [grid, channels].
        bias: float32 [branches, grid]; large and negative means that the branch always computes there.
        threshold: scalar; a branch reuses where its score is above.
        direction: 1 where timesteps fall while sampling, -1 where they rise.
        slope: how much the logarithm of the time since the last computation counts; 0: not at all.
        phase: how much later a second call at the same timestep is; 0: such a call begins a new image.
        rank: in which order reuse is taken up when the budget shrinks, float32 [branches, grid]; infinite where it is
            forbidden, and everywhere if the gates have no such order.
        frontier: schedules that training found for several budgets, bool [budgets, branches, grid].
        longest: how many steps of the grid one output may be reused for.
        static: 1 where the weights are left out: all samples at a timestep share one decision, and no stream is read for it.
        kind: how a branch is scored, see `kinds`; not looked at where gates are static.
        holds: whether outputs are forecast at order 0 too: a call without computation gives the last output again.
        order: of the polynomial through the last computed outputs that a call without computation goes on along, 1 or 2; 0:
            none, the caches give its output, unless the gates hold it.
        fitted: what fitted forecasts add to the polynomial at the plan's own calls, float32 [grid, 5]: the time since an output
            was computed and since one was before that, for which it is; shares of value, slope and half the curvature. Zeros
            where there is nothing to add.
    """

    grid: Tensor
    threshold: Tensor
    direction: Tensor
    slope: Tensor
    phase: Tensor
    rank: Tensor
    order: Tensor
    static: Tensor
    frontier: Tensor
    longest: Tensor
    fitted: Tensor

    def __init__(self, names: Sequence[str], widths: Sequence[int], grid: Tensor, direction: int = 1) -> None:
        super().__init__()
        self.names = list(names)
        self.kind = "linear"
        self.holds = False
        self.register_buffer("grid", grid.to(torch.float32).sort().values)
        self.register_buffer("threshold", torch.tensor(0.5, dtype=torch.float32))
        self.register_buffer("direction", torch.tensor(float(direction), dtype=torch.float32))
        self.register_buffer("slope", torch.tensor(0.0, dtype=torch.float32))
        self.register_buffer("phase", torch.tensor(0.0, dtype=torch.float32))
        self.register_buffer("order", torch.tensor(0))
        self.register_buffer("static", torch.tensor(0))
        self.register_buffer("frontier", torch.zeros(0, len(self.names), self.grid.shape[0], dtype=torch.bool))
        self.register_buffer("longest", torch.tensor(self.grid.shape[0]))
        size = self.grid.shape[0]
        self.register_buffer("fitted", torch.zeros(size, 5, dtype=torch.float32))
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.zeros(size, width, dtype=torch.float32)) for width in widths]
        )
        # An untrained gate computes: sigmoid(-4) = 0.018.
        self.bias = nn.Parameter(torch.full((len(self.names), size), -4.0, dtype=torch.float32))
        self.register_buffer("rank", torch.full((len(self.names), size), torch.inf, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gates:
        # A change of dtype is for a model's weights: a gate in half precision would not know its timesteps apart.
        kept = {name: value.detach().clone() for name, value in self.state_dict().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self.named_parameters():
            parameter.data = kept[name].to(parameter.device)
        for name, buffer in self.named_buffers():
            setattr(self, name, kept[name].to(buffer.device))
        return self

    def like(self, order: int, static: int) -> Gates:
        """Untrained gates for the same branches and grid, of this order, static or not: they always compute."""
        widths = [weight.shape[1] for weight in self.weights]
        gates = Gates(self.names, widths, self.grid, int(self.direction))
        gates.order.fill_(order)
        gates.static.fill_(static)
        gates.kind = self.kind
        return gates.to(self.grid.device)

    @property
    def form(self) -> tuple[int, int, str, bool, bool]:
        """What another graph is needed for: order, static, the kind of those that are not, and what is forecast, and fitted."""
        static = int(self.static)
        return int(self.order), static, "" if static else self.kind, self.forecasts, self.fits

    @property
    def fits(self) -> bool:
        """Whether any forecast is fitted."""
        return self.forecasts and bool((self.fitted != 0).any())

    @property
    def forecasts(self) -> bool:
        """Whether outputs are forecast where all branches reuse."""
        return int(self.order) > 0 or self.holds

    @property
    def unit(self) -> float:
        """A typical time between two calls, for what is kept per time: any constant will do, this one suits half precision."""
        return (
            max(float(self.grid[-1] - self.grid[0]) / max(1, len(self.grid) - 1), SOONEST)
            if len(self.grid) > 1
            else 1.0
        )

    @property
    def together(self) -> bool:
        """Whether all branches always decide alike, and outputs are forecast where they reuse."""
        return int(self.static) > 0 and self.forecasts and bool((self.bias == self.bias[:1]).all())

    @property
    def never(self) -> float:
        """The past timestep of a sample that has none: no timestep is past it."""
        return -NEVER * float(self.direction)

    @torch.no_grad()
    def follow(self, schedule: Tensor, allowed: Tensor) -> None:
        """Set slope and bias so that the gates take the decisions of a schedule on their own grid.

        Between two computations of a branch lies a time T that its output keeps: longer than the last reuse, shorter than
        the next computation, here their geometric mean. The logit is `SLOPE * log(T / elapsed)`, so another number of
        steps computes each branch about as often per unit of time.

        Args:
            schedule: bool [branches, grid], true where a branch reuses.
            allowed: bool [branches, grid], where it may reuse at all.
        """
        order = range(len(self.grid)) if float(self.direction) < 0 else range(len(self.grid) - 1, -1, -1)
        times = self.grid.double().tolist()
        bias = torch.full_like(self.bias, FORBIDDEN, dtype=torch.float64)
        for branch, reuse in enumerate(schedule.tolist()):
            runs: list[list[int]] = []  # a computation, and what reuses it
            for step in order:
                if reuse[step] and runs:
                    runs[-1].append(step)
                else:
                    runs.append([step])
            for run, after in zip(runs, [*runs[1:], None], strict=True):
                last = abs(times[run[0]] - times[run[-1]])
                until = abs(times[run[0]] - times[after[0]]) if after else 2 * last
                keeps = (last * until) ** 0.5 if len(run) > 1 else SHORT * until
                for step in [*run[1:], *(after[:1] if after else [])]:
                    bias[branch, step] = SLOPE * math.log(max(keeps, SOONEST))
        self.bias.copy_(torch.where(allowed.to(bias.device), bias, torch.full_like(bias, FORBIDDEN)))
        self.slope.fill_(SLOPE)

    @torch.no_grad()
    def decisions(self, timesteps: Tensor) -> Tensor:
        """What the gates decide over one image, their weights left out: bool [calls, branches] for timesteps [calls]."""
        past = torch.full((1, 4 + len(self.names)), self.never, dtype=torch.float32)
        before, nothing = torch.full((1,), self.never, dtype=torch.float32), torch.zeros(1, PRINT, dtype=torch.float32)
        direction, phase = self.direction.cpu(), self.phase.cpu()
        taken = []
        for timestep in timesteps.detach().cpu().float().reshape(-1, 1):
            goes_on = valid(timestep, before, nothing, nothing, past, direction, phase)
            now = clock(timestep, before, goes_on, direction, phase)
            since = elapsed(now, past, direction)[0, 2 : 2 + len(self.names)]
            bias = self.bias.detach().cpu() @ hat(now, self.grid.cpu())[0]
            lazy = decide(torch.sigmoid(bias - self.slope.cpu() * since.log()), goes_on, self.threshold.cpu())
            past, before = times(now, past, goes_on, lazy.unsqueeze(1), self.never), timestep
            taken.append(lazy)
        return torch.stack(taken)
