"""How a model responds to calls that are forecast: true runs, compared with what would come of it without a response.

An error early in the loop is corrected by the calls after it, a hundredfold in some models. In a few images it decides
between two outcomes, and grows. The gain is the root mean square over all images, those of the calibration and others:
ratios are about log-normal, so it is taken from the mean and the variance of their logarithms, smoothed over the calls. The
root mean square of sixteen ratios would say more about one image than about the model. Images that change fast are often
those that let more through: the covariance of the two counts, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..sampling import Sampler
from .calibration import Floats
from .mixing import Mixing
from .outputs import first_of
from .runs import Denoise, Dense, forecast_output, play
from .tape import Tape

#: Calls in a row that a response leaves out: as in a plan that computes a third or a fourth of the calls.
SKIPPED = 3

#: Responses to measure, if the budget allows: gains are smooth in time.
ANCHORS = 16

#: Over so many responses the logarithms are smoothed (standard deviation of the kernel).
SMOOTH = 1.0

#: A ratio outside of these bounds is rounding.
BOUNDS = (1e-4, 1e2)


@dataclass(frozen=True)
class Skip:
    """Calls of one stream to leave out in one run: each is forecast, with order 1, as a plan would forecast it."""

    calls: tuple[int, ...]
    past: tuple[int, ...]

    def cost(self, calls: int) -> int:
        """Calls of the model that measuring it takes, in a loop of so many: none before it."""
        return calls - self.calls[0] - len(self.calls)


def skips_of(streams: Sequence[int], budget: float, phase: float = 0.0) -> list[Skip]:
    """Skips to measure, spread over the loop, that cost at most so many calls of the model.

    Args:
        streams: of the calls.
        budget: calls of the model.
        phase: in [0, 1): runs of different phases measure at different calls, evenly spread between each other's.
    """
    found: list[Skip] = []
    for stream in sorted(set(streams)):
        own = [call for call, s in enumerate(streams) if s == stream]
        length = max(1, min(SKIPPED, len(own) // 8))
        share = budget / len(set(streams))
        candidates = [_skip(own, at, length) for at in range(1, len(own) - length + 1)]
        for count in range(min(ANCHORS, len(candidates)), 0, -1):
            spacing = len(candidates) / count
            chosen = [candidates[int((k + phase) * spacing)] for k in range(count)]
            if sum(skip.cost(len(streams)) for skip in chosen) <= share:
                found += chosen
                break
    return sorted(found, key=lambda skip: skip.calls)


def _skip(own: Sequence[int], at: int, length: int) -> Skip:
    past = [at - 1 - k * (length + 1) for k in (1, 0) if at - 1 - k * (length + 1) >= 0]
    return Skip(tuple(own[at : at + length]), tuple(own[k] for k in past))


def respond(tape: Tape, mixing: Mixing, skip: Skip, dense: Dense, denoise: Denoise, sampler: Sampler) -> Floats:
    """Mean squared change of each image's latents, and what it were without a response: float64 [2, B]."""
    past = [(tape.readings[call].timestep, tape.output(call)) for call in skip.past]
    forecasts = {call: forecast_output(past, tape.readings[call].timestep, 1) for call in skip.calls}
    last = skip.calls[-1]

    def answer(call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call in forecasts:
            return forecasts[call]
        return dense(call, args, kwargs) if call > last else tape.output(call)

    moved = (play(sampler, denoise, answer, tape.seed).cpu().double() - tape.final.double()).flatten(1)
    open_loop = torch.zeros(())
    for call, output in forecasts.items():
        error = first_of(output).cpu().float() - tape.value(call).float()
        open_loop = open_loop + mixing.reach[call] * mixing.prediction(error, call, tape.final).double()
    expected = open_loop.square().mean(dim=1)
    found: Floats = torch.stack([moved.square().mean(dim=1), expected]).numpy()
    return found


def gain_of(calls: int, skips: Sequence[Skip], responses: Sequence[Floats]) -> Floats:
    """Gain at each call, float64 [T], of what `respond` found for each skip."""
    at, means, spreads, counts = [], [], [], []
    for skip, (moved, expected) in zip(skips, responses, strict=True):
        there = expected > 0
        if not there.any():
            continue
        logs = 0.5 * np.log(np.clip(moved[there] / expected[there], BOUNDS[0] ** 2, BOUNDS[1] ** 2))
        at.append(float(np.mean(skip.calls)))
        means.append(logs.mean())
        spreads.append(_excess(logs, np.log(expected[there])))
        counts.append(len(logs))
    if not at:
        return np.ones(calls)
    return _curve(calls, np.array(at), np.array(means), np.array(spreads), np.array(counts, dtype=np.float64))


def _excess(logs: Floats, sizes: Floats) -> float:
    """Logarithm of the root mean square of log-normal ratios, weighted by sizes, less the mean of the logarithms."""
    if len(logs) < 3:
        return 0.0
    return float(np.cov(logs, sizes)[0, 1] + logs.var(ddof=1))


def _curve(calls: int, at: Floats, means: Floats, spreads: Floats, counts: Floats) -> Floats:
    """Gains at all calls of logarithms at some."""
    order = np.argsort(at, kind="stable")
    at, means, spreads, counts = at[order], means[order], spreads[order], counts[order]
    width = SMOOTH * (at[-1] - at[0]) / max(1, len(set(at)) - 1) or 1.0
    smooth = _smooth(at, means, counts, width), _smooth(at, spreads, counts, width)
    where = np.arange(calls)
    log_gain = np.interp(where, at, smooth[0]) + np.interp(where, at, smooth[1])
    # The last call has no call after it that could respond: between it and the last response, the gain goes to 1.
    ends = np.append(at, calls - 1.0) if at[-1] < calls - 1 else at
    tail = np.append(smooth[0] + smooth[1], 0.0)[: len(ends)]
    return np.asarray(np.exp(np.where(where > at[-1], np.interp(where, ends, tail), log_gain)), dtype=np.float64)


def _smooth(at: Floats, values: Floats, counts: Floats, width: float) -> Floats:
    """Local lines through values at `at`, weighted by a Gaussian of this width: float64 [len(at)]."""
    found = np.empty_like(values)
    for k, centre in enumerate(at):
        weight = counts * np.exp(-0.5 * ((at - centre) / width) ** 2)
        mean = np.average(at, weights=weight)
        off = at - mean
        spread = np.average(off**2, weights=weight)
        slope = np.average(off * values, weights=weight) / spread if spread > 0 else 0.0
        found[k] = np.average(values, weights=weight) + slope * (centre - mean)
    return found
