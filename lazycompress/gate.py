"""Gates: when a branch may reuse its last output. The one definition that torch, ONNX and OpenVINO all run.

For branch i, sample b, timestep t, and Z the branch's input after norm and modulation:

    logit(b)  = mean over tokens of Z[b] . w_i(t) + c_i(t) - s log(e_i(b))
    score(b)  = sigmoid(logit(b))                       in [0, 1], higher is lazier
    lazy(b)   = valid(b) and score(b) > threshold
    Y[b]      = last Y[b] if lazy(b) else F(Z)[b]

`w_i(t)` and `c_i(t)` are tables over a grid of timesteps, interpolated linearly and held constant beyond its ends: at the
grid's own points this is one gate per sampling step, as in LazyDiT (arXiv 2412.12444); the mean and the bias are ours.
`e_i(b)` is how far the timestep has moved since the branch was last computed for this sample, in the timestep's own unit. With
it a gate says for how long an output keeps, whatever the number of steps; without it (s = 0) whether this very step is needed.
Where all branches of a sample are lazy, the call computes nothing for it. The model's output then is not what the caches make of
the new latents, but the polynomial through its last computed outputs in this image, gone on to now: at most `order + 1` of them,
so the line or the parabola. That is TaylorSeer's forecast (arXiv 2503.06923), of one tensor in place of every branch's. It is
kept as its value, slope and half its curvature at the last call (`cache` and `rates`), so that a call moves it on by the time
that has passed. With order 0 there is none. Gates that follow a plan with fitted forecasts (see `plan.fit`) add shares of the
three to it, at the plan's own calls (`nudge` and `adjust`).
`valid(b)` is false where sample b starts a new image: the timestep is not strictly past the last one, or what the model is
conditioned on has changed. Samplers that call the model twice at a timestep (Heun's) set `phase`: a second call at the same
timestep, but for the one at which the image began, then goes on with it and counts as that much later.

The functions below are also operators (`torch.ops.lazycompress.*`), so that graph passes, quantization among them, see
one opaque node where a gate is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

#: A past timestep that every timestep fails to be past of, times the direction.
NEVER = 3.0e38

#: Less time than this cannot have passed between two calls.
SOONEST = 1e-6

#: Times are those of the plan that differ from them by at most this share.
CLOSE = 0.002

#: How many numbers a condition is known by, see `fingerprint`.
PRINT = 3

#: Floating conditions are the same if their prints differ by less than this share of their norm.
TOLERANCE = 1e-4

#: Weights of the sums: multiples of these steps modulo the period, a prime. They are about golden shares of it.
_PERIOD, _STEPS = 1000003, (618035, 754881)

#: Those of integers: places modulo these. Sums of thousands of values are whole numbers that float32 has.
_PLACES = (31, 29)


def enter(stream: Tensor, branch: int, position: int) -> Tensor:
    """Mark `stream` as the entry number `position` of a branch; the value itself, unchanged."""
    return stream


def timestep_per_sample(timestep: Tensor, latents: Tensor) -> Tensor:
    """Timesteps as float32 [batch], from a scalar, [1], [batch] or per-token [batch, tokens] tensor (its largest)."""
    value = timestep.to(torch.float32)
    if value.dim() > 1:
        value = value.flatten(1).amax(dim=1)
    return value.reshape(-1).expand(latents.shape[0])


def fingerprint(
    conditions: Sequence[Tensor], latents: Tensor, sized: Sequence[Tensor] = (), dims: Sequence[int] = ()
) -> Tensor:
    """What an image keeps to, float32 [batch, 3 * (conditions + sized)]: a change of prompt, label or size changes it.

    For each condition its norm, or 0 where it is of integers, and two weighted sums; for each of `sized` its size along its one
    of `dims`. Compared by `same`.
    """
    nothing = latents.new_zeros((latents.shape[0],), dtype=torch.float32)
    rows: list[Tensor] = []
    for condition in conditions:
        flat = condition.reshape(condition.shape[0], -1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).flatten(1)
        place = torch.arange(flat.shape[1], device=flat.device)
        if flat.is_floating_point():
            flat = flat.to(torch.float32)
            weights = [(place * step % _PERIOD).to(torch.float32) / _PERIOD - 0.5 for step in _STEPS]
            # No matmul: it may round to fewer bits than float32 has.
            rows += [(flat * flat).sum(dim=1).sqrt(), *((flat * weight).sum(dim=1) for weight in weights)]
        else:
            flat = flat.to(torch.float32)
            high = (flat / 256).floor()
            low = flat - 256 * high
            one, other = ((place % period + 1).to(torch.float32) for period in _PLACES)
            rows += [nothing, (low * one).sum(dim=1), ((low + high) * other).sum(dim=1)]
    for value, dim in zip(sized, dims, strict=True):  # counted: converters take no size for a number
        ones = torch.ones(value.shape[dim], dtype=torch.float32, device=latents.device)
        rows += [nothing, ones.sum().expand(latents.shape[0]), nothing]
    return torch.stack(rows or [nothing] * PRINT, dim=1)


def same(prints: Tensor, past_prints: Tensor) -> Tensor:
    """Which rows of fingerprints are of the same conditions, bool [rows]. NaN is the same as nothing.

    With a tolerance: no decision depends on how memory is laid out, or on a compiler's rounding.
    """
    now, then = (rows.reshape(rows.shape[0], -1, PRINT) for rows in (prints, past_prints))
    allowed = torch.maximum(now[:, :, :1], then[:, :, :1]) * TOLERANCE
    return ((now - then).abs() <= allowed).flatten(1).all(dim=1)


def valid(
    timestep: Tensor,
    past_timestep: Tensor,
    prints: Tensor,
    past_prints: Tensor,
    past_times: Tensor,
    direction: Tensor,
    phase: Tensor,
) -> Tensor:
    """Which samples go on with the image of the last call, bool [batch]. `direction` is 1 for descending timesteps.

    The past may have another batch size (the state of an exported model): then no sample goes on.
    """
    counts = torch.ones_like(past_timestep).sum() == torch.ones_like(timestep).sum()
    rows = _rows(timestep, past_timestep)
    past = past_timestep.index_select(0, rows)
    again = (past == timestep) & (past_times.index_select(0, rows)[:, 0] != timestep) & (phase > 0)
    onward = (past - timestep) * direction > 0
    return counts & (onward | again) & same(prints, past_prints.index_select(0, rows))


def clock(timestep: Tensor, past_timestep: Tensor, valid: Tensor, direction: Tensor, phase: Tensor) -> Tensor:
    """Timesteps that move with every call, float32 [batch]: a second call at one timestep is `phase` further."""
    again = valid & (past_timestep.index_select(0, _rows(timestep, past_timestep)) == timestep)
    return torch.where(again, timestep - direction * phase, timestep)


def elapsed(now: Tensor, past_times: Tensor, direction: Tensor) -> Tensor:
    """The time since each of the past times, float32 [batch, 4 + branches]; see `times`."""
    past = past_times.index_select(0, _rows(now, past_times))
    return ((past - now.unsqueeze(1)) * direction).clamp(min=SOONEST)


def times(now: Tensor, past_times: Tensor, valid: Tensor, lazy: Tensor, never: float) -> Tensor:
    """The past times for the next call, float32 [batch, 4 + branches].

    When the image began, when the call is, when each branch was last computed, when any branch was, and when that was before;
    `never` where it was not in this image. lazy: [branches, batch].
    """
    past = past_times.index_select(0, _rows(now, past_times))
    reuses = lazy.transpose(0, 1)
    reuses = torch.cat([reuses, reuses.all(dim=1, keepdim=True)], dim=1)
    began = torch.where(valid.unsqueeze(1), past[:, :1], now.unsqueeze(1))
    last, before = past[:, 2:-1], past[:, -1:]
    before = torch.where(valid.unsqueeze(1), torch.where(reuses[:, -1:], before, last[:, -1:]), never)
    return torch.cat([began, now.unsqueeze(1), torch.where(reuses, last, now.unsqueeze(1)), before], dim=1)


def _rows(current: Tensor, past: Tensor) -> Tensor:
    """Row numbers of the current batch, clamped to those that the past has."""
    return torch.arange(current.shape[0], device=current.device).clamp(max=past.shape[0] - 1)


def hat(timestep: Tensor, grid: Tensor) -> Tensor:
    """Weights of linear interpolation, [batch, grid]: timesteps [batch], ascending grid [grid]; exact at grid points."""
    if grid.shape[0] == 1:
        return torch.ones_like(timestep).unsqueeze(1)
    inside = torch.minimum(torch.maximum(timestep, grid[:1]), grid[-1:]).unsqueeze(1)
    gaps = grid[1:] - grid[:-1]
    rising = torch.cat([torch.ones_like(inside), (inside - grid[:-1]) / gaps], dim=1)
    falling = torch.cat([(grid[1:] - inside) / gaps, torch.ones_like(inside)], dim=1)
    return torch.minimum(rising, falling).clamp(0.0, 1.0)


def score(
    streams: Sequence[Tensor],
    channel_dims: Sequence[int],
    hats: Tensor,
    weight: Tensor,
    bias: Tensor,
    elapsed: Tensor,
    slope: Tensor,
) -> Tensor:
    """The gate's score, float32 [batch].

    Args:
        streams: the branch's inputs Z, each [batch * k, ..., channels, ...].
        channel_dims: which dimension of each holds the channels.
        hats: [batch, grid]. weight: [grid, channels of all streams]. bias: [grid].
        elapsed: time since the branch was computed, [batch]. slope: what its logarithm counts, scalar.
    """
    pooled = []
    for stream, dim in zip(streams, channel_dims, strict=True):
        values = stream.to(torch.float32)
        channels = values.shape[dim]
        if dim != values.dim() - 1:
            values = values.flatten(dim + 1).mean(dim=-1)
        pooled.append(values.reshape(hats.shape[0], -1, channels).mean(dim=1))
    features = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
    logit = (features * (hats @ weight)).sum(dim=1) + (hats * bias).sum(dim=1) - slope * elapsed.log()
    return torch.sigmoid(logit)


def scheduled(streams: Sequence[Tensor], hats: Tensor, bias: Tensor, elapsed: Tensor, slope: Tensor) -> Tensor:
    """The score of a static gate, float32 [batch]: the streams are not read. Arguments as in `score`."""
    return torch.sigmoid((hats * bias).sum(dim=1) - slope * elapsed.log())


def decide(score: Tensor, valid: Tensor, threshold: Tensor) -> Tensor:
    """Which samples reuse, bool [batch]."""
    return valid & (score > threshold)


def select(fresh: Tensor, cache: Tensor, lazy: Tensor) -> Tensor:
    """`cache` where lazy, else `fresh`; both [batch * k, ...], lazy [batch]."""
    rows = fresh.reshape(lazy.shape[0], -1)
    return torch.where(lazy.unsqueeze(1), fit(cache, fresh).reshape(rows.shape), rows).reshape(fresh.shape)


def fit(old: Tensor, new: Tensor) -> Tensor:
    """A cache with the sizes of `new`.

    It has others where nothing of it is kept: a state before its first image, or of another batch or size.
    """
    for dim, (size, wanted) in enumerate(zip(old.shape, new.shape, strict=True)):
        if not statically_known_true(size == wanted):
            old = old.index_select(dim, torch.arange(wanted, device=old.device).clamp(max=size - 1))
    return old


def pace(elapsed: Tensor, valid: Tensor, unit: float) -> Tensor:
    """What the polynomial through the computed outputs needs of the clock, float32 [batch, 6], times in units of `unit`.

    With d the time since the last call, a since an output was computed, b since one was before that, seen from the last call:
    d; d - a, where the last computation lies; (d - a) + (d - b); 1 / a, or 0 if there is none; 1 / b, or 0; and a.
    """
    step, last, before = elapsed[:, 1] / unit, elapsed[:, -2] / unit, elapsed[:, -1] / unit
    known = before > last  # what never was, is clamped to no time at all
    before = torch.where(known, before, last)
    one, two = valid.to(torch.float32) / last, (valid & known).to(torch.float32) / before
    return torch.stack([step, step - last, 2 * step - last - before, one, two, last], dim=1)


def forecast(fresh: Tensor, cache: Tensor, rates: Sequence[Tensor], lazy: Tensor, pace: Tensor, scale: int) -> Tensor:
    """An output: the polynomial, gone on by one call, where lazy, else `fresh`; float32 as cache and rates are.

    Args:
        fresh: [batch * scale, ...], what the model gave.
        cache, rates: value, slope and half the curvature at the last call, as far as the order says, each like `fresh`; of any
            sizes if none of it is kept.
        lazy: bool [batch]. pace: see there.
    """
    fresh, cache, rates = _alike(fresh, cache, rates)
    if not rates:
        return select(fresh, cache, lazy)
    step = per_row(pace, cache, scale)[0]
    moved = rates[0] if len(rates) == 1 else rates[0] + rates[1] * step
    return select(fresh, cache + moved * step, lazy)


def nudge(hats: Tensor, fitted: Tensor, elapsed: Tensor, unit: float) -> Tensor:
    """What fitted forecasts add to the polynomial: shares of its value, slope and half its curvature, float32 [batch, 3].

    Args:
        hats: [batch, grid], see `hat`.
        fitted: see `Gates`. Nothing is added where its times are not the elapsed ones: the outputs are others than the plan's.
        elapsed: see there.
        unit: of the time that slope and curvature are kept per.
    """
    row = (hats.unsqueeze(2) * fitted).sum(dim=1)  # no matmul: it may round to fewer bits than float32 has
    since, planned = elapsed[:, -2:], row[:, :2]
    here = ((since - planned).abs() <= planned * CLOSE).all(dim=1) & (hats.amax(dim=1) > 1 - CLOSE)
    shares = torch.stack([row[:, 2], row[:, 3] / unit, row[:, 4] / unit**2], dim=1)
    return torch.where(here.unsqueeze(1), shares, 0.0)


def adjust(value: Tensor, rates: Sequence[Tensor], lazy: Tensor, nudge: Tensor, scale: int) -> Tensor:
    """An output: a fitted forecast where lazy, else `value`.

    Args:
        value, rates: of the polynomial now, see `forecast` and `hold`. lazy: bool [batch]. nudge: see there.
    """
    shares = per_row(nudge, value, scale)
    total = value + value * shares[0]
    for rate, share in zip(rates, shares[1:], strict=False):
        total = total + rate * share
    return select(value, total, lazy)


def moved(rates: Sequence[Tensor], pace: Tensor, scale: int) -> list[Tensor]:
    """The rates after one more call that computes nothing."""
    if len(rates) < 2:
        return list(rates)
    step = per_row(pace, rates[0], scale)[0]
    return [rates[0] + rates[1] * (2 * step), rates[1]]


def trend(fresh: Tensor, cache: Tensor, rates: Sequence[Tensor], pace: Tensor, scale: int) -> list[Tensor]:
    """The rates of the polynomial through `fresh` and the computations before it (Newton's divided differences)."""
    # No difference of tensors: OpenVINO makes a sum of it, and that forgets to stay in float32 (see `export.exact`).
    _, last, both, one, two, since = per_row(pace, fresh, scale)
    # What is of no use here may hold NaN, of an image that went wrong: zero times that is NaN again.
    cache, *rates = [torch.where(one > 0, old, 0.0) for old in (cache, *rates)]
    if len(rates) == 1:
        return [fresh * one + (cache + rates[0] * last) * -one]
    slope = fresh * one + (cache + (rates[0] + rates[1] * last) * last) * -one
    curve = slope * two + (rates[0] + rates[1] * both) * -two
    return [slope + curve * since, curve]


def hold(
    fresh: Tensor, cache: Tensor, rates: Sequence[Tensor], lazy: Tensor, pace: Tensor, scale: int, which: int
) -> Tensor:
    """Rate number `which` for the next call: gone on where lazy, else that of the last computations. See `forecast`."""
    fresh, cache, rates = _alike(fresh, cache, rates)
    return select(trend(fresh, cache, rates, pace, scale)[which], moved(rates, pace, scale)[which], lazy)


def _alike(fresh: Tensor, cache: Tensor, rates: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    fresh = fresh.to(cache.dtype)
    return fresh, fit(cache, fresh), [fit(rate, fresh) for rate in rates]


def per_row(pace: Tensor, like: Tensor, scale: int) -> list[Tensor]:
    """The columns of `pace` in the dtype of `like`, each [rows, 1, ...]; any rows if the batch is another one."""
    rows = torch.arange(like.shape[0], device=like.device)
    rows = rows if scale == 1 else rows // scale
    fitted = pace.to(like.dtype).index_select(0, rows.clamp(max=pace.shape[0] - 1))
    return [column.reshape(-1, *[1] * (like.dim() - 1)) for column in fitted.unbind(1)]


#: What a gate that looks at the sample takes and gives, as torch writes it.
SCORE = "(Tensor[] streams, int[] channel_dims, Tensor hats, Tensor weight, Tensor bias, Tensor elapsed, Tensor slope) -> Tensor"

_library: Any = torch.library.Library("lazycompress", "DEF")  # type: ignore[no-untyped-call]
for _function, _schema in (
    (enter, "(Tensor stream, int branch, int position) -> Tensor"),
    (timestep_per_sample, "(Tensor timestep, Tensor latents) -> Tensor"),
    (fingerprint, "(Tensor[] conditions, Tensor latents, Tensor[] sized, int[] dims) -> Tensor"),
    (
        valid,
        "(Tensor timestep, Tensor past_timestep, Tensor prints, Tensor past_prints, Tensor past_times, Tensor direction, "
        "Tensor phase) -> Tensor",
    ),
    (clock, "(Tensor timestep, Tensor past_timestep, Tensor valid, Tensor direction, Tensor phase) -> Tensor"),
    (elapsed, "(Tensor now, Tensor past_times, Tensor direction) -> Tensor"),
    (times, "(Tensor now, Tensor past_times, Tensor valid, Tensor lazy, float never) -> Tensor"),
    (hat, "(Tensor timestep, Tensor grid) -> Tensor"),
    (score, SCORE),
    (scheduled, "(Tensor[] streams, Tensor hats, Tensor bias, Tensor elapsed, Tensor slope) -> Tensor"),
    (decide, "(Tensor score, Tensor valid, Tensor threshold) -> Tensor"),
    (select, "(Tensor fresh, Tensor cache, Tensor lazy) -> Tensor"),
    (pace, "(Tensor elapsed, Tensor valid, float unit) -> Tensor"),
    (forecast, "(Tensor fresh, Tensor cache, Tensor[] rates, Tensor lazy, Tensor pace, int scale) -> Tensor"),
    (nudge, "(Tensor hats, Tensor fitted, Tensor elapsed, float unit) -> Tensor"),
    (adjust, "(Tensor value, Tensor[] rates, Tensor lazy, Tensor nudge, int scale) -> Tensor"),
    (hold, "(Tensor fresh, Tensor cache, Tensor[] rates, Tensor lazy, Tensor pace, int scale, int which) -> Tensor"),
):
    _library.define(f"{_function.__name__}{_schema}")
    _library.impl(_function.__name__, _function, "CompositeImplicitAutograd")
