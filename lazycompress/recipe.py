"""Recipes: everything a user may want to choose, as YAML checked by pydantic. Unknown keys are refused.

Every field has a default and a one-line description; `docs/recipes.md` is generated from them.
"""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from .errors import RecipeError

Share = Annotated[float, Field(gt=0.0, le=1.0)]

#: One share or several. The tags are no keys: messages leave them out.
Shares = Annotated[
    Annotated[Share, Tag("a share")] | Annotated[list[Share], Field(min_length=1), Tag("shares")],
    Discriminator(lambda value: "shares" if isinstance(value, list | tuple) else "a share"),
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Condition(_Section):
    """One conditioning input that a recipe's own sampler makes up, drawn anew for each sampling run."""

    kind: Literal["integers", "normal", "constant"] = Field("normal", description="how its values are drawn")
    shape: list[int] = Field(default_factory=list, description="sizes without the batch")
    low: int = Field(0, description="smallest integer (integers)")
    high: int = Field(2, description="one more than the largest integer (integers)")
    value: float = Field(0.0, description="the value (constant)")
    dtype: str = Field("", description="torch dtype; empty: int64 for integers, else the model's")


class Sampling(_Section):
    """A denoising loop that needs no pipeline: a diffusers scheduler over random latents."""

    scheduler: str = Field("DDIMScheduler", description="class name of a diffusers scheduler")
    scheduler_config: dict[str, Any] = Field(default_factory=dict, description="its configuration")
    steps: int = Field(50, ge=1, description="denoising steps")
    batch: int = Field(32, ge=1, description="images per sampling run")
    latents: list[int] = Field(description="shape of one latent image, without the batch")
    latents_input: str = Field("hidden_states", description="the model's argument for the latents")
    timestep_input: str = Field("timestep", description="the model's argument for the timestep")
    conditions: dict[str, Condition] = Field(default_factory=dict, description="the model's other tensor arguments")
    constants: dict[str, Any] = Field(default_factory=dict, description="the model's other arguments, as they are")


class Pipeline(_Section):
    """What a diffusers pipeline samples while its gates are learned."""

    prompts: list[str] = Field(default_factory=list, description="prompts to draw from (pipelines that take prompt)")
    class_labels: list[int] = Field(default_factory=list, description="labels to draw from (class_labels)")
    batch: int = Field(0, ge=0, description="images per sampling run; 0: one for every prompt or label")
    call: dict[str, Any] = Field(default_factory=dict, description="other arguments of the pipeline's call")


class Guards(_Section):
    """Where a branch may not reuse, whatever its gate says."""

    warmup_steps: int = Field(1, ge=1, description="first steps that compute everything (the first one always does)")
    last_steps: int = Field(0, ge=0, description="last steps that compute everything")
    max_reuse: int = Field(8, ge=1, description="longest run of steps that one output is reused for")
    exclude: list[str] = Field(
        default_factory=list, description="branches that always compute: names, or patterns that begin with re:"
    )
    kind_targets: dict[str, Share] = Field(
        default_factory=dict,
        description="share of its MACs that a kind of branch may compute, such as {mlp: 0.4}; the others meet the target",
    )


class Train(_Section):
    """How the gates are learned: in the sampler's own loop, judged by its final image."""

    enabled: bool = Field(True, description="false leaves the gates untrained: they always compute")
    method: Literal["trajectory", "paper"] = Field(
        "trajectory", description="judged by the final image, or two steps with a soft blend as in LazyDiT's paper"
    )
    seed: int = Field(0, description="seed of the noise and of the probes")
    effort: Annotated[float, Field(gt=0.0)] = Field(1.0, description="multiplies the sampling runs spent on training")
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


class IgnoredScope(_Section):
    """NNCF's IgnoredScope: what stays in floating point."""

    names: list[str] = Field(
        default_factory=list, description="names of graph nodes, or of the modules that their weights belong to"
    )
    patterns: list[str] = Field(default_factory=list, description="regular expressions of such names, whole ones")
    types: list[str] = Field(default_factory=list, description="NNCF operation types")


class Quantize(_Section):
    """Post-training quantization of weights and activations to 8 bits, with the parameters of `nncf.quantize`."""

    preset: Literal["performance", "mixed"] = Field("mixed", description="symmetric, or asymmetric activations")
    model_type: Literal["transformer"] = Field("transformer", description="NNCF's model type")
    subset_size: int = Field(50, ge=1, description="calls of the model to calibrate on, spread over a sampling run")
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


class Weights(_Section):
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
    subset_size: int = Field(32, ge=1, description="calls of the model to calibrate on")
    ignored_scope: IgnoredScope = Field(IgnoredScope(), description="what keeps its weights as they are")
    max_error: float | None = Field(
        None, gt=0.0, description="largest mean squared error of held-out final latents to the model before the stage"
    )
    on_error: Literal["stop", "fall_back"] = Field(
        "stop",
        description="where max_error is not kept: stop, or leave out the layers that hurt most, by measurement, until it is",
    )


class Prune(_Section):
    """Pruning of the model before it is captured, repaired by a short training against the dense one."""

    method: Literal["structured", "magnitude"] = Field(
        "structured", description="narrower layers (faster), or single weights set to zero (as fast as before)"
    )
    mlp_width: float = Field(
        0.25, ge=0.0, lt=1.0, description="share of each MLP's hidden units taken out (structured)"
    )
    heads: float = Field(0.0, ge=0.0, lt=1.0, description="share of each attention's heads taken out (structured)")
    ratio: float = Field(0.25, gt=0.0, lt=1.0, description="share of each weight matrix set to zero (magnitude)")
    finetune_steps: int = Field(300, ge=0, description="steps of the training that repairs the model")
    learning_rate: float = Field(1e-4, gt=0.0, description="largest learning rate of AdamW in that training")


class Export(_Section):
    """What `lazycompress.export` writes unless told otherwise."""

    format: Literal["openvino", "onnx"] = Field("openvino", description="file format")
    telemetry: bool = Field(False, description="add an output with the decisions of each step")


class Recipe(_Section):
    """A whole recipe. Every key may be left out."""

    target: Shares = Field(
        0.5,
        description="share of the branches' MACs that may be computed; of a list the first is in force, and one training "
        "leaves a schedule for each, see LazyModel.set_target",
    )
    schedule: Literal["static", "gates"] | None = Field(
        None,
        description="static: one decision per step and branch for all samples, no gates at run time, gates that look at the "
        "sample frozen to the majority of their decisions; gates: as they are trained; left out: static in the sampler's "
        "loop, gates for method: paper",
    )
    forecast: int = Field(
        2,
        ge=0,
        le=2,
        description="a step that reuses all branches gives the parabola (2) or the line (1) through the model's last computed "
        "outputs; 0: what the caches give",
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
        if self.train.latents and not paper:
            raise ValueError("train.latents needs train.method: paper; training in the loop starts from noise")
        if self.train.latents and self.sampling is None:
            raise ValueError("train.latents needs a sampling section: its scheduler adds the noise")

    @property
    def targets(self) -> list[float]:
        """All targets, the one in force first."""
        return list(self.target) if isinstance(self.target, list) else [self.target]

    def with_checkpoint(self, folder: str) -> Recipe:
        """The same recipe with another `train.checkpoint`."""
        return self.model_copy(update={"train": self.train.model_copy(update={"checkpoint": folder})})

    def checkpoint_of(self, part: str) -> Recipe:
        """The recipe for one of several models: each has a folder of its own in the checkpoint."""
        folder = self.train.checkpoint
        return self.with_checkpoint(str(Path(folder) / part)) if folder else self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package: file name -> first comment line."""
    folder = importlib.resources.files("lazycompress.recipes")
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").splitlines()[:1]
            found[entry.name] = first[0].lstrip("# ") if first else ""
    return found


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from a path, the name of a shipped recipe, or a dictionary.

    Args:
        source: where the recipe is. A path wins over a shipped recipe of the same name.
        overrides: dotted keys and values that replace the recipe's, such as `{"guards.warmup_steps": 2}`.

    Raises:
        RecipeError: there is no such recipe, it is not YAML, or a key or value in it is wrong; names file and key.
    """
    if isinstance(source, Recipe):
        data: Any = source.model_dump()
        where = "recipe"
    elif isinstance(source, Mapping):
        data, where = dict(source), "recipe"
    else:
        text, where = _read(source)
        try:
            data = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise RecipeError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys, there was {type(data).__name__}")
    for key, value in (overrides or {}).items():
        _override(data, key, value, where)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    shipped = shipped_recipes()
    name = path.name if path.name in shipped else f"{path.name}.yaml"
    if path.parent == Path() and name in shipped:
        return importlib.resources.files("lazycompress.recipes").joinpath(name).read_text(encoding="utf-8"), name
    raise RecipeError(f"no recipe {str(source)!r}: neither a file nor one of the shipped {', '.join(shipped)}")


def _override(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: cannot set {key}: {parent} is not a section")
    data[last] = value


def _explain(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if part not in ("a share", "shares")]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _fields(Recipe, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {hint}"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    return f"{where}: key {key!r}: {first['msg'].lower()}; there was {first['input']!r}"


def _fields(section: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation: Any = section.model_fields[part].annotation if part in section.model_fields else None
        section = _section_of(annotation) or section
    return list(section.model_fields)


def reference() -> str:
    """Every field of a recipe as Markdown tables: key, type, default, description."""
    lines = ["# Recipe reference", "", "Generated by `lazycompress recipes --reference`.", ""]
    sections: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    while sections:
        prefix, section = sections.pop(0)
        lines += [f"## {prefix.rstrip('.') or 'Top level'}", ""]
        if section.__doc__:
            lines += [section.__doc__.splitlines()[0], ""]
        lines += ["| key | type | default | what |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            inner = _section_of(field.annotation)
            if inner is not None:
                sections.append((f"{prefix}{name}.", inner))
            kind = "section" if inner is not None else _kind(field.annotation)
            default = (
                "required"
                if field.is_required()
                else ""
                if inner is not None
                else f"`{field.get_default(call_default_factory=True)!r}`"
            )
            lines.append(f"| `{prefix}{name}` | {kind} | {default} | {field.description} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _kind(annotation: Any) -> str:
    """A type as one reads it, its constraints left out."""
    if get_origin(annotation) is Annotated:
        return _kind(annotation.__origin__)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_kind(option) for option in annotation.__args__)
    if get_origin(annotation) in (list, dict):
        return f"{get_origin(annotation).__name__}[{', '.join(_kind(option) for option in annotation.__args__)}]"
    if annotation is type(None):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
