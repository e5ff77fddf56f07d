"""Recipes: everything a user may want to choose, as YAML checked by pydantic. Unknown keys are refused.

Every field has a default and a one-line description; `docs/recipes.md` is generated from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from . import kinds
from .errors import LazyCompressError, RecipeError
from .sections import Section

#: One size of a tensor.
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]

#: What a tensor of integers can hold.
Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]

Share = Annotated[float, Field(gt=0.0, le=1.0)]

#: One share or several. The tags are no keys: messages leave them out.
Shares = Annotated[
    Annotated[Share, Tag("a share")] | Annotated[list[Share], Field(min_length=1), Tag("shares")],
    Discriminator(lambda value: "shares" if isinstance(value, list | tuple) else "a share"),
]


def named(kind: str) -> AfterValidator:
    """What makes a name of a key: only what goes by one is taken, the package's own or another package's."""

    def check(name: str) -> str:
        try:
            kinds.need(kind, name)
        except LazyCompressError as error:
            raise ValueError(str(error)) from None
        return name

    return AfterValidator(check)


FormatName = Annotated[str, named("runtimes")]
GateName = Annotated[str, named("gates")]
#: A forecast is a polynomial of an order, or another one by its name.
ForecastName = Annotated[
    Annotated[int, Field(ge=0, le=2), Tag("an order")] | Annotated[str, named("forecasts"), Tag("a forecast")],
    Discriminator(lambda value: "a forecast" if isinstance(value, str) and not value.isdecimal() else "an order"),
]


class Condition(Section):
    """One conditioning input that a recipe's own sampler makes up, drawn anew for each sampling run."""

    kind: Literal["integers", "normal", "constant"] = Field("normal", description="how its values are drawn")
    shape: list[Size] = Field(default_factory=list, max_length=8, description="sizes without the batch")
    low: Integer = Field(0, description="smallest integer (integers)")
    high: Integer = Field(2, description="one more than the largest integer (integers)")
    value: float = Field(0.0, description="the value (constant)")
    dtype: str = Field("", description="torch dtype; empty: int64 for integers, else the model's")

    @model_validator(mode="after")
    def _some_integer(self) -> Condition:
        if self.kind == "integers" and self.low >= self.high:
            raise ValueError(f"low is to be below high; there was low: {self.low}, high: {self.high}")
        return self


class Sampling(Section):
    """A denoising loop that needs no pipeline: a diffusers scheduler over random latents."""

    scheduler: str = Field("DDIMScheduler", description="class name of a diffusers scheduler")
    scheduler_config: dict[str, Any] = Field(default_factory=dict, description="its configuration")
    steps: int = Field(50, ge=1, le=10_000, description="denoising steps")
    batch: Size = Field(32, description="images per sampling run")
    latents: list[Size] = Field(min_length=1, max_length=8, description="shape of one latent image, without the batch")
    latents_input: str = Field("hidden_states", description="the model's argument for the latents")
    timestep_input: str = Field("timestep", description="the model's argument for the timestep")
    conditions: dict[str, Condition] = Field(default_factory=dict, description="the model's other tensor arguments")
    constants: dict[str, Any] = Field(default_factory=dict, description="the model's other arguments, as they are")

    @model_validator(mode="after")
    def _each_argument_once(self) -> Sampling:
        names = [self.latents_input, self.timestep_input, *self.conditions, *self.constants]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"the argument {twice[0]!r} is there twice among latents_input, timestep_input, conditions and constants"
            )
        return self


class Pipeline(Section):
    """What a diffusers pipeline samples while its gates are learned."""

    prompts: list[str] = Field(default_factory=list, description="prompts to draw from (pipelines that take prompt)")
    class_labels: list[int] = Field(default_factory=list, description="labels to draw from (class_labels)")
    batch: int = Field(0, ge=0, le=2**31 - 1, description="images per sampling run; 0: one for every prompt or label")
    call: dict[str, Any] = Field(default_factory=dict, description="other arguments of the pipeline's call")


class Guards(Section):
    """Where a branch may not reuse, whatever its gate says."""

    warmup_steps: int = Field(
        1, ge=1, le=2**31 - 1, description="first steps that compute everything (the first one always does)"
    )
    last_steps: int = Field(0, ge=0, le=2**31 - 1, description="last steps that compute everything")
    max_reuse: int = Field(8, ge=1, le=2**31 - 1, description="longest run of steps that one output is reused for")
    exclude: list[str] = Field(
        default_factory=list, description="branches that always compute: names, or patterns that begin with re:"
    )
    kind_targets: dict[str, Share] = Field(
        default_factory=dict,
        description="share of its MACs that a kind of branch may compute, such as {mlp: 0.4}; the others meet the target",
    )


class Train(Section):
    """How the gates are learned: in the sampler's own loop, judged by its final image."""

    enabled: bool = Field(True, description="false leaves the gates untrained: they always compute")
    method: Literal["trajectory", "paper"] = Field(
        "trajectory", description="judged by the final image, or two steps with a soft blend as in LazyDiT's paper"
    )
    gate: GateName = Field(
        "linear", description="how a gate scores its branch (method: paper): linear, or the name of another package's"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of the noise and of the probes")
    effort: Annotated[float, Field(gt=0.0, le=100.0)] = Field(
        1.0, description="multiplies the sampling runs spent on training"
    )
    images: int = Field(
        16,
        ge=1,
        le=2**20,
        description="images that a plan is learned from, at least (units: calls): time is in proportion, and few of them do for "
        "large models",
    )
    precision: Literal["", "bfloat16"] = Field(
        "", description="autocast of the runs that have gradients; empty: none. Images are judged without it"
    )
    checkpointing: bool = Field(
        False, description="compute branches again in the backward pass: less memory, more time"
    )
    checkpoint: str = Field(
        "", description="folder that keeps finished sampling runs, from which a training that was cut off goes on"
    )
    latents: str = Field(
        "",
        description="safetensors or npz file of real images as latents [N, ...] to add noise to, and of their conditions "
        "(method: paper); empty: sampled ones",
    )


class IgnoredScope(Section):
    """NNCF's IgnoredScope: what stays in floating point."""

    names: list[str] = Field(
        default_factory=list, description="names of graph nodes, or of the modules that their weights belong to"
    )
    patterns: list[str] = Field(default_factory=list, description="regular expressions of such names, whole ones")
    types: list[str] = Field(default_factory=list, description="NNCF operation types")


class Quantize(Section):
    """Post-training quantization of weights and activations to 8 bits, with the parameters of `nncf.quantize`."""

    preset: Literal["performance", "mixed"] = Field("mixed", description="symmetric, or asymmetric activations")
    model_type: Literal["transformer"] = Field("transformer", description="NNCF's model type")
    subset_size: int = Field(
        50, ge=1, le=1_000_000, description="calls of the model to calibrate on, spread over a sampling run"
    )
    fast_bias_correction: bool = Field(True, description="correct biases on statistics alone")
    smooth_quant_alpha: float = Field(-1.0, description="SmoothQuant's alpha; -1 switches it off")
    ignored_scope: IgnoredScope = Field(IgnoredScope(), description="what is left out, besides all that is no branch")
    max_error: float | None = Field(
        None, gt=0.0, description="largest mean squared error of held-out final latents to the model before the stage"
    )
    on_error: Literal["stop", "fall_back"] = Field(
        "stop",
        description="where max_error is not kept: stop, or leave out the layers that hurt most, by measurement, until it is",
    )


class Weights(Section):
    """Weights stored in fewer bits, with the parameters of `nncf.compress_weights`."""

    mode: Literal["int8_sym", "int8_asym", "int4_sym", "int4_asym"] = Field(
        "int8_asym", description="how weights are stored"
    )
    ratio: float | None = Field(None, gt=0.0, le=1.0, description="share of the layers in 4 bits (4-bit modes)")
    group_size: int | None = Field(None, description="weights that share a scale (4-bit modes); -1: a whole channel")
    all_layers: bool | None = Field(None, description="4 bits for embeddings and the last layer too")
    awq: bool | None = Field(None, description="activation-aware scaling (needs calibration)")
    scale_estimation: bool | None = Field(
        None, description="scales that minimise the output's error (needs calibration)"
    )
    subset_size: int = Field(32, ge=1, le=1_000_000, description="calls of the model to calibrate on")
    ignored_scope: IgnoredScope = Field(IgnoredScope(), description="what keeps its weights as they are")
    max_error: float | None = Field(
        None, gt=0.0, description="largest mean squared error of held-out final latents to the model before the stage"
    )
    on_error: Literal["stop", "fall_back"] = Field(
        "stop",
        description="where max_error is not kept: stop, or leave out the layers that hurt most, by measurement, until it is",
    )


class Prune(Section):
    """Pruning of the model before it is captured, repaired by a short training against the dense one."""

    method: Annotated[str, named("pruners")] = Field(
        "structured",
        description="structured: narrower layers (faster); magnitude: single weights set to zero (as fast as before); or the "
        "name of another package's",
    )
    mlp_width: float = Field(
        0.25, ge=0.0, lt=1.0, description="share of each MLP's hidden units taken out (structured)"
    )
    heads: float = Field(0.0, ge=0.0, lt=1.0, description="share of each attention's heads taken out (structured)")
    ratio: float = Field(0.25, gt=0.0, lt=1.0, description="share of each weight matrix set to zero (magnitude)")
    finetune_steps: int = Field(300, ge=0, le=1_000_000, description="steps of the training that repairs the model")
    learning_rate: float = Field(1e-4, gt=0.0, description="largest learning rate of AdamW in that training")
    options: dict[str, Any] = Field(default_factory=dict, description="what another package's method takes besides")

    @model_validator(mode="after")
    def _own_options(self) -> Prune:
        if self.options and self.method in kinds.OWN["pruners"]:
            raise ValueError(f"options are for methods of other packages; method: {self.method} has none")
        return self


class Export(Section):
    """What `lazycompress.export` writes unless told otherwise."""

    format: FormatName = Field(
        "openvino", description="format: openvino, onnx, executorch, or the name of another package's"
    )
    telemetry: bool = Field(False, description="add an output with the decisions of each step")


#: Keys of a recipe that say the budget in other words than a share.
GOALS = ("speedup", "seconds", "psnr", "max_error")


class Recipe(Section):
    """A whole recipe. Every key may be left out."""

    target: Shares = Field(
        0.5,
        description="share of the branches' MACs that may be computed; of a list the first is in force, and one training "
        "leaves a schedule for each, see LazyModel.set_target",
    )
    speedup: float | None = Field(
        None,
        gt=1.0,
        description="in place of target: how many times as fast as the dense run, sampler included, as measured while learning "
        "(units: calls)",
    )
    seconds: float | None = Field(
        None, gt=0.0, description="in place of target: seconds that one image may take on this machine (units: calls)"
    )
    psnr: float | None = Field(
        None,
        gt=0.0,
        description="in place of target: the fewest calls whose latents have this PSNR in dB to the dense ones, median over "
        "held-out images (units: calls)",
    )
    max_error: float | None = Field(
        None,
        gt=0.0,
        description="in place of target: the fewest calls whose latents have at most this mean squared error on held-out noise "
        "(units: calls)",
    )
    schedule: Literal["static", "gates"] | None = Field(
        None,
        description="static: one decision per step and branch for all samples, no gates at run time, gates that look at the "
        "sample frozen to the majority of their decisions; gates: as they are trained; left out: static in the sampler's "
        "loop, gates for method: paper",
    )
    forecast: ForecastName = Field(
        2,
        description="whole calls: the highest order of the polynomial through the model's last computed outputs that a skipped "
        "call may give, 0 being the last output again, or the name of another package's forecast; branches: the order where a "
        "step reuses all of them, 0 being what their caches give",
    )
    timestep_input: str = Field("", description="the model's argument for the timestep; empty: found by its name")
    units: Literal["auto", "calls", "branches"] = Field(
        "auto",
        description="what is computed or not: whole calls of the user's own module, or each of its branches in a graph of it; "
        "auto: calls, unless the recipe asks for what only a graph has",
    )
    guards: Guards = Field(Guards(), description="where reuse is forbidden")
    train: Train = Field(Train(), description="how the gates are learned")
    prune: Prune | None = Field(None, description="narrower layers, or weights set to zero, before anything else")
    quantize: Quantize | None = Field(
        None, description="8-bit weights and activations in the branches, 8-bit weights elsewhere"
    )
    weights: Weights | None = Field(None, description="weights stored in 8 or 4 bits")
    order: Literal["train_quantize", "quantize_train"] = Field(
        "train_quantize",
        description="gates learned on the model as it is and then quantized, or on the quantized model",
    )
    sampling: Sampling | None = Field(None, description="a sampler for models that come without a pipeline")
    pipeline: Pipeline | None = Field(None, description="what to sample when a whole pipeline is made lazy")
    export: Export = Field(Export(), description="defaults of lazycompress.export")

    @property
    def goal(self) -> str:
        """The key that says the budget in place of `target`; empty if none does."""
        return next((name for name in GOALS if getattr(self, name) is not None), "")

    @model_validator(mode="after")
    def _one_goal(self) -> Recipe:
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say the budget: keep one of them")
        return self

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        if self.order == "quantize_train":
            if self.quantize is None:
                raise ValueError("order: quantize_train needs a quantize section; add one, or leave order out")
            if not self.train.enabled or self.train.method == "paper":
                raise ValueError("order: quantize_train needs train.enabled: true and train.method: trajectory")
        self._methods()
        if self.quantize is not None and self.weights is not None:
            raise ValueError("quantize stores weights in 8 bits already: keep one of the sections quantize and weights")
        size = self.weights.group_size if self.weights is not None else None
        if size is not None and size != -1 and size < 1:
            raise ValueError(f"weights.group_size is a number of weights, or -1 for a whole channel; there was {size}")
        if self.weights is not None and self.weights.mode.startswith("int8"):
            given = [k for k in ("ratio", "group_size", "all_layers", "awq", "scale_estimation")
                     if getattr(self.weights, k) is not None]  # fmt: skip
            if given:
                raise ValueError(f"weights.{given[0]} is an option of the int4 modes; mode is {self.weights.mode}")
        return self

    def _methods(self) -> None:
        paper = self.train.method == "paper"
        if self.train.enabled and self.schedule == "gates" and not paper:
            raise ValueError(
                "schedule: gates needs train.method: paper; training in the loop learns one decision per step and branch"
            )
        if paper and self.guards.kind_targets:
            raise ValueError(
                "guards.kind_targets needs train.method: trajectory; the paper's gates share one threshold"
            )
        if paper and self.schedule != "static" and len(self.targets) > 1:
            raise ValueError("target: a list needs schedule: static with train.method: paper; or keep one target")
        if self.train.gate != "linear" and not paper:
            raise ValueError(
                f"train.gate: {self.train.gate} needs train.method: paper; other methods learn gates that look at no sample"
            )
        if self.train.latents and not paper:
            raise ValueError("train.latents needs train.method: paper; training in the loop starts from noise")
        if self.train.latents and self.sampling is None:
            raise ValueError("train.latents needs a sampling section: its scheduler adds the noise")

    @property
    def targets(self) -> list[float]:
        """All targets, the one in force first."""
        return list(self.target) if isinstance(self.target, list) else [self.target]

    @property
    def polynomial(self) -> int:
        """The order of the forecast in a graph, where polynomials are the only ones.

        Raises:
            RecipeError: it is another one.
        """
        if isinstance(self.forecast, str):
            raise RecipeError(
                f"forecast: {self.forecast} is for whole calls of the module itself; a graph takes 0, 1 or 2: say units: calls, "
                "and leave out what needs a graph"
            )
        return self.forecast

    def with_checkpoint(self, folder: str) -> Recipe:
        """The same recipe with another `train.checkpoint`."""
        return self.model_copy(update={"train": self.train.model_copy(update={"checkpoint": folder})})

    def checkpoint_of(self, part: str) -> Recipe:
        """The recipe for one of several models: each has a folder of its own in the checkpoint."""
        folder = self.train.checkpoint
        return self.with_checkpoint(str(Path(folder) / part)) if folder else self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
