"""The emoji pipeline beside other ways of spending less: PSNR to the dense pictures and recall against MACs and seconds.

`python -m tests.benchmarks.emoji_peers [--pictures 24] [--seeds 0 1 2] [--targets 0.7 0.5 0.34 0.25] [--write docs/peers.md]`

Guidance 4; dense is 28 steps of the pipeline's own scheduler (Euler). MACs are counted in the linear layers of the denoiser that
run, as a share of the dense ones, whatever a method says of itself. Published caches are brought to a budget by bisection, on
other prompts. Ours is learned once for each budget, on sixteen other prompts. The same noise for all; two threads. Rows are
kept in `out/`: given again, the command goes on.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import platform
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import lazycompress
from lazycompress.integrations.emoji.bundle import load_bundled_judge, load_pipeline, prompts
from lazycompress.integrations.emoji.evaluate import generate
from lazycompress.integrations.emoji.metrics import psnr, recall_at

from .methods import NotAccepted, bisect

STEPS = 28
GUIDANCE = 4.0
OURS = "lazycompress"

#: Makes a pipeline that computes less the larger the number is.
Cached = Callable[[float], Any]


@dataclass(frozen=True)
class Row:
    """One method at one budget, over all seeds."""

    target: float
    method: str
    macs: float
    psnr: float
    median: float
    lowest: float
    recall: float
    seconds: float


@dataclass(frozen=True)
class Drawn:
    """Pictures [N, 3, 32, 32], the share of the dense MACs, and the seconds for one of them."""

    images: Tensor
    macs: float
    seconds: float


class Artist:
    """Draws the same prompts from the same noise with any pipeline."""

    def __init__(self, drawn: Sequence[str], seeds: Sequence[int]) -> None:
        self.drawn, self.seeds = list(drawn), list(seeds)
        self.dense_macs = 0.0

    def __call__(self, pipe: Any, steps: int = STEPS) -> Drawn:
        images, started = [], time.perf_counter()
        with macs_of(pipe.transformer) as spent:
            for seed in self.seeds:
                forget(pipe.transformer)
                images.append(
                    generate(pipe, self.drawn, GUIDANCE, steps, 1000 + seed, batch=len(self.drawn), title=" ")
                )
        count = len(self.drawn) * len(self.seeds)
        self.dense_macs = self.dense_macs or spent[0] / count
        return Drawn(torch.cat(images), spent[0] / count / self.dense_macs, (time.perf_counter() - started) / count)


@contextmanager
def macs_of(model: nn.Module) -> Iterator[list[float]]:
    """Multiply-accumulates of the linear layers that run within the block."""
    spent = [0.0]

    def count(module: nn.Linear, args: Any, output: Tensor) -> None:
        spent[0] += output.numel() * module.in_features

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def forget(model: nn.Module) -> None:
    """What diffusers' hooks keep of the last image; the pipeline does not tell them of a new one for this model."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None:
        registry.reset_stateful_hooks()
        registry._set_context("comparison")


# -- published ways -----------------------------------------------------------------------------------------------------


def solver(kind: str) -> Any:
    """The pipeline with another scheduler."""
    pipe: Any = load_pipeline()
    if kind != "Euler":
        classes = {"DPM-Solver++": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler"}
        config = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": pipe.scheduler.config.shift,
        }
        pipe.scheduler = getattr(diffusers, classes[kind])(**config)
    return pipe


def hooked(apply: Callable[[nn.Module], None]) -> Any:
    """The pipeline with one of diffusers' caches on its denoiser."""
    from diffusers.hooks import HookRegistry

    pipe: Any = load_pipeline()
    try:
        apply(pipe.transformer)
    except Exception as error:
        raise NotAccepted(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None
    HookRegistry.check_if_exists_or_initialize(pipe.transformer)._set_context("comparison")
    return pipe


def first_block(threshold: float) -> Any:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    return hooked(lambda model: apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold)))


def taylorseer(order: int) -> Cached:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    def make(interval: float) -> Any:
        config = TaylorSeerCacheConfig(
            cache_interval=max(2, round(interval)), disable_cache_before_step=3, max_order=order,
            taylor_factors_dtype=torch.float32, cache_identifiers=[r"transformer_blocks\.\d+\.(attn|ff|ff_context)"],
        )  # fmt: skip
        return hooked(lambda model: apply_taylorseer_cache(model, config))

    return make


def mag_cache(learn_on: Sequence[str]) -> Cached:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    said = io.StringIO()
    pipe = hooked(lambda model: apply_mag_cache(model, MagCacheConfig(calibrate=True, num_inference_steps=STEPS)))
    with contextlib.redirect_stdout(said):
        _ = generate(pipe, learn_on, GUIDANCE, STEPS, batch=len(learn_on), title=" ")
    lists = [line for line in said.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    if not lists:
        raise NotAccepted("its calibration printed no ratios")
    ratios = ast.literal_eval(lists[-1])

    def make(threshold: float) -> Any:
        config = MagCacheConfig(
            threshold=threshold, max_skip_steps=6, retention_ratio=0.1, num_inference_steps=STEPS, mag_ratios=ratios
        )
        return hooked(lambda model: apply_mag_cache(model, config))

    return make


def cache_dit(order: int) -> Cached:
    try:
        import cache_dit as package
        from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig
    except ImportError:
        raise NotAccepted("the package is not installed (pip install --no-deps cache-dit)") from None
    own = {"calibrator_config": TaylorSeerCalibratorConfig(taylorseer_order=order)} if order else {}

    def make(threshold: float) -> Any:
        pipe: Any = load_pipeline()
        config = DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, num_inference_steps=STEPS,
            max_warmup_steps=3,
        )  # fmt: skip
        try:
            package.enable_cache(pipe, cache_config=config, **own)
        except Exception as error:
            raise NotAccepted(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None
        return pipe

    return make


# -- the table ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24, help="prompts of each seed")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--targets", nargs="*", type=float, default=[0.7, 0.5, 0.34, 0.25])
    parser.add_argument("--write", type=Path, help="write the table and the plot to this page")
    options = parser.parse_args()
    torch.set_num_threads(2)
    diffusers.utils.logging.set_verbosity_error()
    names = prompts()
    order = torch.randperm(len(names.seen), generator=torch.Generator().manual_seed(1)).tolist()
    learn_on, drawn = ([names.seen[k] for k in part] for part in (order[:16], order[16 : 16 + options.pictures]))
    draw, tried = Artist(drawn, options.seeds), Artist(learn_on[:6], [7])
    plain = load_pipeline()
    judge, candidates = load_bundled_judge(plain.tokenizer), sorted({*names.seen, *names.held_out})
    dense = draw(plain)
    _ = tried(plain)
    kept = Path("out") / f"peers-{options.pictures}-{'-'.join(map(str, options.seeds))}.json"
    rows = [Row(**row) for row in json.loads(kept.read_text(encoding="utf-8"))] if kept.exists() else []
    notes: dict[str, str] = {}

    def add(target: float, method: str, draw_it: Callable[[], Drawn]) -> None:
        if any((row.target, row.method) == (target, method) for row in rows):
            return
        found = draw_it()
        near = psnr(found.images, dense.images)
        recall = recall_at(5, judge, plain.tokenizer, found.images, drawn * len(options.seeds), candidates)
        rows.append(
            Row(
                target,
                method,
                found.macs,
                float(near.mean()),
                float(near.median()),
                float(near.min()),
                recall,
                found.seconds,
            )
        )
        print(rows[-1], flush=True)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")

    def ours(target: float) -> Drawn:
        pipe = load_pipeline()
        size = {"height": 32, "width": 32, "max_sequence_length": 1}
        call = {"prompt": learn_on, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **size}
        lazycompress.apply(pipe, {"target": target}, call_kwargs=call, progress=False)
        return draw(pipe)

    def cached(make: Cached, target: float, low: float, high: float) -> Drawn:
        return draw(make(bisect(lambda value: tried(make(value)).macs, target, low, high, 7)))

    add(1.0, f"dense, {STEPS} steps", lambda: dense)
    for target in options.targets:
        add(target, OURS, partial(ours, target))
        for kind in ("Euler", "DPM-Solver++", "UniPC"):
            steps = int(target * STEPS + 1e-9)
            add(target, f"fewer steps, {kind}", lambda kind=kind, steps=steps: draw(solver(kind), steps))  # type: ignore[misc]
    published: dict[str, Callable[[], tuple[Cached, float, float]]] = {
        "TaylorSeer of diffusers, order 1": lambda: (taylorseer(1), 2.0, 9.0),
        "TaylorSeer of diffusers, order 2": lambda: (taylorseer(2), 2.0, 9.0),
        "first-block cache of diffusers": lambda: (first_block, 0.0, 1.0),
        "MagCache of diffusers": lambda: (mag_cache(learn_on), 0.0, 2.0),
        "cache-dit": lambda: (cache_dit(0), 0.0, 1.0),
        "cache-dit with TaylorSeer": lambda: (cache_dit(1), 0.0, 1.0),
    }
    for method, begin in published.items():
        try:
            make, low, high = begin()
            for target in options.targets:
                add(target, method, partial(cached, make, target, low, high))
        except Exception as reason:  # other packages' code, on a model that they may not know
            kind = "" if isinstance(reason, NotAccepted) else f"{type(reason).__name__}: "
            notes[method] = f"{kind}{str(reason).splitlines()[0]}"
    report = _page(rows, notes, options.pictures, options.seeds)
    print(report)
    if options.write:
        options.write.write_text(report, encoding="utf-8")
        _plot(rows, options.write.parent / "images" / "peers.svg")


def _page(rows: Sequence[Row], notes: dict[str, str], pictures: int, seeds: Sequence[int]) -> str:
    title, _, how = (__doc__ or "").partition("\n\n")
    lines = [f"# Peers\n\n{title}\n\n{how.strip()}\n"]
    lines.append(f"{pictures} prompts, {len(seeds)} noises each; {platform.machine()}, two threads.\n")
    lines.append("![PSNR against MACs and seconds](images/peers.svg)\n")
    lines.append("| budget | method | MACs | PSNR mean | median | lowest | recall at 5 | s a picture |")
    lines.append("|---:|---|---:|---:|---:|---:|---:|---:|")
    for row in sorted(rows, key=lambda row: (-row.target, -row.psnr)):
        bold = "**" if row.method == OURS else ""
        near = ["", "", ""] if row.target == 1 else [f"{v:.1f}" for v in (row.psnr, row.median, row.lowest)]
        cells = [f"{row.target:g}", f"{bold}{row.method}{bold}", f"{row.macs:.3f}", *near]
        lines.append(f"| {' | '.join([*cells, f'{row.recall:.3f}', f'{row.seconds:.3f}'])} |")
    if notes:
        lines.append("\nNot run:\n")
        lines += [f"- {method}: {why}" for method, why in notes.items()]
    return "\n".join(lines) + "\n"


def _plot(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, value, label in zip(
        figure.subplots(1, 2), ("macs", "seconds"), ("share of the dense MACs", "seconds a picture"), strict=True
    ):
        for method in dict.fromkeys(row.method for row in rows if row.target < 1):
            own = sorted((getattr(row, value), row.psnr) for row in rows if row.method == method)
            axes.plot(*zip(*own, strict=True), marker="o", label=method, linewidth=2.5 if method == OURS else 1)
        axes.set_xlabel(label)
        axes.set_ylabel("PSNR to the dense pictures, dB")
        axes.grid(alpha=0.3)
    figure.axes[1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
