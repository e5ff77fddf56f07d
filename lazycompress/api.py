"""The stages in their order: capture, locate, insert, lower, train, compose, export. The only module that knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import InputError, RecipeError
from .graph.call import ExampleInputs, call_of
from .graph.capture import capture
from .graph.located import Branches, located
from .graph.untouched import untouched
from .lazy.attach import Handle, handle_of, uncompiled
from .lazy.engine import Engine
from .lazy.learn import Search, lazy_module
from .lazy.model import LazyModule
from .lazy.presets import presets
from .models import evaluating, signature_of
from .noise import own_noise
from .pipelines import kind_of, lazy_parts, load
from .recipe import IgnoredScope, Recipe
from .recipe_loading import load_recipe
from .rehearsal import rehearse
from .runtime import LazyModel
from .sampling import Sampler, build_inputs, build_sampler, checked, first_call
from .scopes import scope_of


def locate(model: nn.Module, example_inputs: ExampleInputs) -> Branches:
    """Find the branches of a Diffusion Transformer; nothing is changed.

    Args:
        model: any module that `torch.export` can capture.
        example_inputs: keyword arguments of one forward call, or a tuple of positional ones.

    Returns:
        The branches in the order in which they run: name, kind, streams, MACs per sample. A list; printed, a table; its
        `svg()` and `html()` draw the model.

    Raises:
        InputError: the inputs do not fit the model.
        CaptureError: the model cannot be captured; names the operation and its source line.
        LocateError: the model holds no residual branch with attention.
    """
    return located(model, capture(model, call_of(model, example_inputs), sizes=False))


def apply(
    model_or_pipeline: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe = "lazy_dit.yaml",
    *,
    example_inputs: ExampleInputs | None = None,
    sampler: Sampler | None = None,
    overrides: Mapping[str, Any] | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    calibration: str | Path | None = None,
    progress: bool = True,
) -> Any:
    """Make a model lazy: find its branches, put gates before them, learn when each may reuse.

    Args:
        model_or_pipeline: an `nn.Module`, a diffusers pipeline, one of optimum-intel (plans of whole calls only), or a pipeline
            of a kind that another package brings.
        recipe: a path, the name of a shipped recipe, a dictionary, or a `Recipe`.
        example_inputs: keyword arguments of one forward call, or a tuple of positional ones; left out, the first call
            that the sampler makes is taken.
        sampler: runs one denoising loop with the model it is given and returns the final latents [batch, ...], drawing
            new noise from torch's global generator at each call; left out, the recipe's `sampling` section builds one.
        overrides: dotted recipe keys and values, such as `{"target": 0.4}`.
        call_kwargs: arguments of `pipeline(...)` while gates are learned, before those of the recipe's `pipeline` section.
        calibration: what `save`, or `lazycompress apply`, wrote for this model, perhaps on another machine: the recipe's plan is
            made from its calibration, at once, and the model is not called. For plans of whole calls with a `target`.
        progress: show progress bars.

    Returns:
        A lazy module that shares the model's weights; the model itself is left as it is: a `LazyModule`, which runs that very
        module, or a `LazyModel` with branches, see the recipe's `units`. For a pipeline the pipeline, with its denoisers lazy.

    Raises:
        LazyCompressError: the recipe, the inputs or the model are at fault; one line says what to do.
    """
    chosen = load_recipe(recipe, overrides)
    if kind_of(model_or_pipeline) is None and (
        handle_of(model_or_pipeline) is not None or isinstance(model_or_pipeline, LazyModule)
    ):
        raise InputError(
            f"{type(model_or_pipeline).__name__} is lazy already: apply takes the dense module, or the pipeline"
        )
    if calibration is not None:
        return _started(model_or_pipeline, chosen, calibration)
    sampler = checked(sampler) if sampler is not None else None
    with own_noise():
        return _applied(model_or_pipeline, chosen, example_inputs, sampler, call_kwargs, progress)


def _started(model_or_pipeline: Any, chosen: Recipe, folder: str | Path) -> Any:
    """`apply` with what is known already."""
    if graph_is_needed(chosen) or chosen.goal:
        raise RecipeError(
            "calibration: it has plans of whole calls for a target; branches, other stages, and "
            "speedup, seconds, psnr and max_error need runs of the model"
        )
    target = chosen.targets[0]
    searches = {n: Search(p.search.calibration, chosen.forecast, chosen.guards) for n, p in presets(folder).items()}
    plans = {name: search.plan(target) for name, search in searches.items()}
    for plan in plans.values():
        if plan.share > target + 1e-9:
            raise RecipeError(f"target {target:g}: {plan.share:.0%} of the calls compute always: raise the target")
    lazy = load(model_or_pipeline, folder)
    parts: dict[str, Any] = {"": lazy} if isinstance(lazy, LazyModule) else dict(lazy_parts(lazy))
    for name, part in parts.items():
        own = name if name in searches else ""
        if own not in searches:
            raise InputError(f"{folder} holds a calibration for {', '.join(searches)}, and none for {name}")
        part.engine = Engine(part.engine.reader, plans[own], searches[own], target)
        part.recipe = chosen
    return lazy


def _applied(
    model_or_pipeline: Any,
    chosen: Recipe,
    example_inputs: ExampleInputs | None,
    sampler: Sampler | None,
    call_kwargs: Mapping[str, Any] | None,
    progress: bool,
) -> Any:
    """`apply` of a recipe that has been read; draws random numbers."""
    kind = kind_of(model_or_pipeline)
    if kind is not None:
        return kind.apply(model_or_pipeline, chosen, sampler=sampler, call_kwargs=call_kwargs, progress=progress)
    model = model_or_pipeline
    _ = signature_of(model)
    if sampler is None and chosen.sampling is not None:
        sampler = build_sampler(chosen.sampling)
    if sampler is None and chosen.train.enabled:
        raise InputError(
            "nothing to learn the gates on: pass sampler= (a callable that runs one denoising loop with the model it is "
            "given), or give the recipe a sampling section, or set train.enabled: false"
        )
    if sampler is not None and not graph_is_needed(chosen):
        inside = uncompiled(model)
        if chosen.train.enabled:
            sampler = checked(sampler)
            rehearse(inside, sampler, chosen.train.seed)
        with evaluating(inside):
            return lazy_module(inside, chosen, sampler, progress)
    if example_inputs is None:
        if sampler is None:
            raise InputError("no inputs to capture the model with: pass example_inputs= or sampler=")
        sampling = chosen.sampling
        with untouched(model):  # the run is cut off, and may have set something that it would have taken back
            example_inputs = build_inputs(model, sampling) if sampling is not None else first_call(model, sampler)
    return make_lazy(model, example_inputs, chosen, sampler, progress=progress)


@contextmanager
def image(model_or_pipeline: Any, timesteps: Sequence[float] | Tensor | None = None) -> Iterator[None]:
    """Within the block, calls belong to one run of a sampler: images begin in it, and end with it.

    Not needed inside of a pipeline's call, which is such a run, nor for samplers of ODEs, whose images go on by themselves.

    Args:
        model_or_pipeline: a lazy module, a module of a lazy pipeline, or the pipeline.
        timesteps: that the run will have, if they are known: the plan is made for them.

    Raises:
        InputError: nothing there is lazy.
    """
    own = handle_of(model_or_pipeline) or model_or_pipeline
    found: list[Any] = [own]
    if not hasattr(own, "engine") and kind_of(own) is not None:
        found = list(lazy_parts(own).values())
    lazies = [lazy for lazy in found if isinstance(lazy, LazyModel) or hasattr(lazy, "engine")]
    if not lazies:
        raise InputError(f"{type(model_or_pipeline).__name__} is not lazy: there is no image to open")
    modules = [lazy.module if isinstance(lazy, Handle) else lazy for lazy in lazies]
    with scope_of(modules, timesteps) as scope:
        try:
            yield
        finally:
            for lazy in lazies:
                (lazy if isinstance(lazy, LazyModel) else lazy.engine).end(scope)


def graph_is_needed(recipe: Recipe) -> bool:
    """Whether a recipe runs as a lazy graph, with branches, and not as whole calls of the user's own module.

    Raises:
        RecipeError: it says `units: calls`, and has what only a graph has; or a graph cannot forecast so.
    """
    reasons = [
        *(name for name in ("prune", "quantize", "weights") if getattr(recipe, name) is not None),
        *(f"guards.{name}" for name in ("exclude", "kind_targets") if getattr(recipe.guards, name)),
        *(["train.precision"] if recipe.train.precision else []),
        *(["train.checkpointing"] if recipe.train.checkpointing else []),
        *(["train.method: paper"] if recipe.train.method == "paper" else []),
        *(["schedule: gates"] if recipe.schedule == "gates" else []),
        *(["a list of targets"] if len(recipe.targets) > 1 else []),
    ]
    if recipe.goal and (reasons or recipe.units == "branches"):
        raise RecipeError(
            f"{recipe.goal} is for whole calls, and {reasons[0] if reasons else 'units: branches'} needs a graph: say target"
        )
    if recipe.units == "calls" and reasons:
        raise RecipeError(f"units: calls goes without a graph, which {reasons[0]} needs; say units: branches")
    needed = recipe.units == "branches" or bool(reasons)
    if needed:
        _ = recipe.polynomial
    return needed


def make_lazy(
    model: nn.Module,
    example_inputs: ExampleInputs,
    recipe: Recipe,
    sampler: Sampler | None,
    *,
    make: Callable[..., LazyModel] = LazyModel,
    progress: bool = True,
) -> LazyModel:
    """All stages of a recipe up to export, on one model: capture, learn, quantize or compress, in the recipe's order.

    Args:
        model: left as it is.
        example_inputs: of one forward call.
        recipe: which stages, and in which order.
        sampler: as for `apply`.
        make: makes the lazy model of a model, a call, the name of its timestep input, and those of inputs that move.
        progress: show progress bars.

    Raises:
        LazyCompressError: as for `apply`; what needs only the recipe to be seen is said before anything is done.
    """
    _check(recipe, sampler, model, example_inputs)
    learns = recipe.train.enabled and sampler is not None
    moving: frozenset[str] = frozenset()
    if sampler is not None and (learns or recipe.prune or recipe.quantize or recipe.weights):
        sampler = checked(sampler)
        moving = rehearse(model, sampler, recipe.train.seed, recipe.timestep_input)
    before: list[Any] = []
    if recipe.prune is not None and sampler is not None:
        from .compose.prune import prune

        model, report = prune(model, sampler, recipe.prune, seed=recipe.train.seed, progress=progress)
        before.append(report)
    lazy = make(model, call_of(model, example_inputs), timestep_input=recipe.timestep_input or None, moving=moving)
    lazy.recipe = recipe
    lazy.reports += before

    def learn() -> None:
        if learns and sampler is not None:
            from .train import learn

            lazy.training_report = learn(lazy, sampler, recipe, progress=progress)

    if recipe.quantize is None:
        learn()
    elif sampler is not None:
        from .compose.quantize import quantize, straight_through

        if recipe.order == "train_quantize":
            learn()
            lazy.reports.append(quantize(lazy, sampler, recipe.quantize, seed=recipe.train.seed))
        else:
            lazy.set_gates(lazy.gates.like(order=recipe.polynomial, static=1))
            lazy.reports.append(quantize(lazy, sampler, recipe.quantize, seed=recipe.train.seed))
            with lazy.instead(straight_through(lazy.program(lazy.example).flat)):
                learn()
    if recipe.weights is not None:
        from .compose.quantize import compress_weights

        lazy.reports.append(compress_weights(lazy, sampler, recipe.weights, seed=recipe.train.seed))
    return lazy


def _check(recipe: Recipe, sampler: Sampler | None, model: nn.Module, example_inputs: ExampleInputs) -> None:
    """What is wrong with the stages of a recipe, before any work.

    Raises:
        RecipeError: a stage has nothing to work on, or names something that is not there.
        MissingExtraError: its package is not installed.
    """
    weights = recipe.weights
    aware = [name for name in ("awq", "scale_estimation") if weights is not None and getattr(weights, name)]
    needs = "quantize" if recipe.quantize is not None else f"weights.{aware[0]}" if aware else ""
    needs = needs or ("weights.max_error" if weights is not None and weights.max_error is not None else "")
    needs = needs or ("prune" if recipe.prune is not None else "")
    if needs and sampler is None:
        raise RecipeError(
            f"{needs}: there is nothing to calibrate on; pass sampler=, or give the recipe a sampling section"
        )
    if recipe.prune is not None:
        from .compose.pruners import pruner_of

        pruner_of(recipe.prune).need(recipe.prune)
    if recipe.quantize is not None or weights is not None:
        from .compose.quantize import need_nncf

        need_nncf("quantization" if recipe.quantize is not None else "weight compression")
    for section in ("quantize", "weights"):
        options = getattr(recipe, section)
        if options is not None and options.ignored_scope != IgnoredScope():
            from .compose.scope import check_types, left_out

            check_types(options.ignored_scope, section)
            left_out(
                capture(model, call_of(model, example_inputs), sizes=False).graph_module.graph,
                options.ignored_scope,
                section,
            )
