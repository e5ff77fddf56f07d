"""Recipes: files, dictionaries and overrides."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lazycompress.recipe import Recipe
from lazycompress.recipe_loading import load_recipe

from .harness import Try, command

SAMPLING = {"latents": [4, 6]}


def load(folder: Path, text: str | bytes, overrides: Any = None) -> Recipe:
    """A recipe from a file with this text."""
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, overrides)


def file(name: str, text: str | bytes, says: str | None) -> Try:
    return Try(f"recipe: file, {name}", lambda folder: load(folder, text), says)


def given(name: str, recipe: Any, says: str | None) -> Try:
    return Try(f"recipe: {name}", lambda _: load_recipe(recipe), says)


def key(where: str, value: Any, says: str | None, note: str = "") -> Try:
    """One dotted key of a recipe that is right otherwise."""
    base = {"sampling": SAMPLING} if where.startswith("sampling.") else {}
    text = note or (
        repr(value) if len(repr(value)) < 80 else f"{type(value).__name__} of {len(repr(value))} characters"
    )
    return Try(f"recipe key: {where} {text}", lambda _: load_recipe(base, {where: value}), says)


def override(name: str, overrides: Any, says: str | None) -> Try:
    return Try(f"override: {name}", lambda _: load_recipe({"target": 0.5}, overrides), says)


def unchanged(name: str, recipe: Any, overrides: Any) -> Try:
    """The caller's own mappings are afterwards what they were."""

    def act(_: Path) -> None:
        before = repr((recipe, overrides))
        load_recipe(recipe, overrides)
        if repr((recipe, overrides)) != before:
            raise AssertionError(f"{before} became {(recipe, overrides)!r}")

    return Try(f"override: {name}", act, None)


def set_(assignment: str, says: str | None, name: str = "") -> Try:
    """`--set` of a command that fails afterwards for want of a model, where the assignment is right."""

    def act(folder: Path) -> None:
        command("locate", "--model", folder / "none", "--set", assignment)

    return Try(f"cli --set: {name or assignment}", act, says or "neither config.json nor model_index.json")


def shell(name: str, arguments: list[str], says: str | None) -> Try:
    return Try(f"cli: {name}", lambda _: command(*arguments), says)


def itself() -> dict[str, Any]:
    made: dict[str, Any] = {"target": 0.5}
    made["sampling"] = made
    return made


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{now}: &{now} [{', '.join([f'*{before}'] * 10)}]" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
HUGE = 10**26

TRIES = [
    # files
    file("an unknown key", "tarket: 0.4", r"recipe\.yaml: unknown key 'tarket'; did you mean 'target'"),
    file("empty", "", None),
    file("comments only", "# nothing\n", None),
    file("a byte order mark", b"\xef\xbb\xbftarget: 0.5", None),
    file("CRLF", "target: 0.5\r\nforecast: 1\r\n", None),
    file("UTF-16 with a byte order mark", "target: 0.5".encode("utf-16"), None),
    file("an alias", "target: &t 0.5\nguards: {kind_targets: {mlp: *t}}", None),
    file("merged sections", "sampling: {<<: {latents: [4, 6]}, steps: 3}", None),
    file(
        "a key twice", "target: 0.5\nforecast: 1\ntarget: 0.9", r"recipe\.yaml line 3: the key 'target' is there twice"
    ),
    file(
        "a nested key twice", "guards:\n  max_reuse: 1\n  max_reuse: 2", r"line 3: the key 'max_reuse' is there twice"
    ),
    file("a key twice in flow", "guards: {max_reuse: 1, max_reuse: 1}", r"line 1: the key 'max_reuse' is there twice"),
    file("a list as key", "? [a, b]\n: 1", "line 1: a key is a word"),
    file("a section as key", "? {a: b}\n: 1", "line 1: a key is a word"),
    file("a number as key", "5: 1", "recipe.yaml: "),
    file("null as key", "null: 1", "recipe.yaml: "),
    file("binary", bytes(range(256)), "no text in UTF-8: byte 128 is 80"),
    file("NUL bytes", b"target: 0.5\x00", "is not YAML"),
    file("latin-1", "# Zähler\ntarget: 0.5".encode("latin-1"), "no text in UTF-8"),
    file("UTF-16 cut off", "target: 0.5".encode("utf-16")[:-1], "no text in UTF-8"),
    file("UTF-32", "target: 0.5".encode("utf-32"), "no text|not YAML"),
    file("lists in each other", "[" * 5000, "line 1: more than 32 lists and sections in each other"),
    file("sections in each other", "target: " + "{a: " * 5000, "line 1: more than 32 lists and sections"),
    file("sections in each other, in blocks", "\n".join(" " * k + "a:" for k in range(2000)), "line 33: more than 32"),
    file("aliases that blow up", BOMB, r"line \d: more than 50000 values"),
    file(
        "an alias of itself",
        "target: &a [*a]",
        r"line 1: the alias \*a stands for nothing, or for what it is a part of",
    ),
    file("an alias of nothing", "target: *b", r"line 1: the alias \*b stands for nothing"),
    file("many values", "target: [" + "1," * 60_000 + "1]", "more than 50000 values"),
    file("huge", b"# " + b"x" * 2**21, "larger than 2 MiB"),
    file(
        "a tag of Python's",
        "target: !!python/object/apply:os.system [true]",
        r"is not YAML: line 1: could not determine a con",
    ),
    file(
        "a tag of its own", "target: !share 0.5", "is not YAML: line 1: could not determine a constructor for the tag"
    ),
    file("two documents", "target: 0.5\n---\ntarget: 0.6", "is not YAML: line 2: expected a single document"),
    file("tabs", "guards:\n\tmax_reuse: 1", "is not YAML: line 2"),
    file("an open bracket", "target: [0.5", "not YAML"),
    file("a date that is none", "target: 2020-13-45", "cannot be read: month must be in"),
    file("a number of 5000 digits", "target: " + "9" * 5000, "cannot be read|there was"),
    file("a list", "[target, 0.5]", "a recipe is a mapping of keys, there was list"),
    file("a word", "half", "a recipe is a mapping of keys, there was str"),
    file("a number", "0", "a recipe is a mapping of keys, there was int"),
    file("false", "false", "a recipe is a mapping of keys, there was bool"),
    file("null", "null", None),
    # what is given as recipe
    given("None", None, "there was None"),
    given("a number", 5, "there was 5"),
    given("bytes", b"lazy_dit.yaml", "there was b'lazy_dit.yaml'"),
    given("a list", [("target", 0.5)], "there was "),
    given("a set", {"target"}, "there was "),
    given("true", True, "there was True"),
    given("the class", Recipe, "there was "),
    given("an empty name", "", "is a folder|no recipe"),
    given("a folder", "/", "is a folder"),
    given("a very long name", "a" * 5000, "no recipe 'aaa.* neither a file nor one of the shipped"),
    given("a very long path", "/tmp/" + "a" * 300 + ".yaml", "no recipe"),
    given("a name with NUL", "a\x00b", "no recipe"),
    given("a name with line breaks", "a\nb\nc", "no recipe"),
    given("a name that is not there", "nope.yaml", "no recipe 'nope.yaml': neither a file nor one of the shipped"),
    given("a shipped name in a folder", Path("nowhere/lazy_dit.yaml"), "no recipe"),
    given("a shipped name without its ending", "lazy_dit", None),
    given("an ordered mapping", OrderedDict(target=0.5), None),
    given(
        "a mapping that cannot be written to", MappingProxyType({"target": 0.5, "guards": MappingProxyType({})}), None
    ),
    given("an empty mapping", {}, None),
    given("a Recipe", Recipe(), None),
    given("a mapping with a number as key", {5: 1}, "recipe: "),
    given("a mapping that holds itself", itself(), "or one that holds itself"),
    given("a mapping with a tuple as key", {("a", "b"): 1}, "recipe: "),
    Try(
        "recipe: a file that may not be read", lambda _: load_recipe("/proc/self/mem"), "cannot be read|no text|larger"
    ),
    Try("recipe: a device", lambda _: load_recipe("/dev/zero"), "no recipe"),
    # values
    key("target", True, "target: true and false are no values here; there was True"),
    key("target", [0.5, True], "true and false are no values here"),
    key("target", False, "true and false"),
    key("target", 0, "key 'target': input should be greater than 0"),
    key("target", -1, "greater than 0"),
    key("target", 1.5, "less than or equal to 1"),
    key("target", float("nan"), "finite number"),
    key("target", float("inf"), "finite number"),
    key("target", "half", "valid number"),
    key("target", [], "at least 1 item"),
    key("target", [0.5, 2], "less than or equal to 1"),
    key("target", {}, "valid number"),
    key("target", None, "valid number"),
    key("target", HUGE, "less than or equal to 1"),
    key("target", "x" * 10_000, "valid number"),
    key("target", [0.5] * 3, None),
    key("target", "0.5", None),
    key("forecast", True, "true and false"),
    key("forecast", 3, "less than or equal to 2"),
    key("forecast", 1.5, "valid integer"),
    key("schedule", "dynamic", "'static' or 'gates'"),
    key("schedule", 1, "'static' or 'gates'"),
    key("timestep_input", 5, "valid string"),
    key("guards", 5, "'guards': input should be"),
    key("guards", [], "'guards': input should be"),
    key("guards", None, "'guards': input should be"),
    key("guards.max_reuse", True, "guards.max_reuse: true and false"),
    key("guards.max_reuse", 0, "greater than or equal to 1"),
    key("guards.max_reuse", 10**9, None),
    key("guards.max_reuse", HUGE, "less than or equal to"),
    key("guards.warmup_steps", -3, "greater than or equal to 1"),
    key("guards.last_steps", float("inf"), "finite"),
    key("guards.exclude", "re:.*", "valid list"),
    key("guards.exclude", [5], "valid string"),
    key("guards.kind_targets", {"mlp": True}, "true and false"),
    key("guards.kind_targets", {"mlp": float("nan")}, "finite"),
    key("guards.kind_targets", {5: 0.5}, "valid string"),
    key("guards.kind_targets", [0.5], "valid dictionary"),
    key("train.effort", float("inf"), "finite number"),
    key("train.effort", float("nan"), "finite number"),
    key("train.effort", 1e300, "less than or equal to 100"),
    key("train.effort", 0, "greater than 0"),
    key("train.effort", True, "true and false"),
    key("train.effort", "1e-1", None),
    key("train.seed", HUGE, "less than or equal to 4294967295"),
    key("train.seed", -1, "greater than or equal to 0"),
    key("train.seed", 0.5, "valid integer"),
    key("train.seed", True, "true and false"),
    key("train.enabled", "perhaps", "valid boolean"),
    key("train.enabled", 5, "valid boolean"),
    key("train.method", "magic", "'trajectory' or 'paper'"),
    key("train.precision", "float8", "'' or 'bfloat16'"),
    key("train.checkpoint", 5, "valid string"),
    key("train.latents", "images.npz", "train.latents needs train.method: paper"),
    key("train.train", {}, "unknown key 'train.train'"),
    key("sampling", {}, "sampling.latents.*field required"),
    key("sampling", [4, 6], "'sampling': input should be"),
    key("sampling.latents", [], "at least 1 item"),
    key("sampling.latents", [-1, 8, 8], "greater than or equal to 1"),
    key("sampling.latents", [4, 0], "greater than or equal to 1"),
    key("sampling.latents", [True, 8], "true and false"),
    key("sampling.latents", [HUGE], "less than or equal to 2147483647"),
    key("sampling.latents", [1] * 9, "at most 8 items"),
    key("sampling.latents", "4, 6", "valid list"),
    key("sampling.steps", 0, "greater than or equal to 1"),
    key("sampling.steps", 10**9, "less than or equal to 10000"),
    key("sampling.batch", 0, "greater than or equal to 1"),
    key("sampling.batch", HUGE, "less than or equal to"),
    key("sampling.scheduler", None, "valid string"),
    key("sampling.scheduler_config", [], "valid dictionary"),
    key("sampling.latents_input", "timestep", "the argument 'timestep' is there twice"),
    key("sampling.constants", {"hidden_states": 1}, "the argument 'hidden_states' is there twice"),
    key("sampling.conditions", {"timestep": {}}, "the argument 'timestep' is there twice"),
    key(
        "sampling.conditions", {"y": {"kind": "integers", "low": 50, "high": 10}}, "y: low is to be below high.*50.*10"
    ),
    key("sampling.conditions", {"y": {"kind": "integers", "low": 3, "high": 3}}, "low is to be below high"),
    key("sampling.conditions", {"y": {"kind": "integers", "high": HUGE}}, "less than or equal to"),
    key("sampling.conditions", {"y": {"kind": "integers", "high": True}}, "true and false"),
    key("sampling.conditions", {"y": {"shape": [-3]}}, "greater than or equal to 1"),
    key("sampling.conditions", {"y": {"shape": 3}}, "valid list"),
    key("sampling.conditions", {"y": {"kind": "constant", "value": float("nan")}}, "finite"),
    key("sampling.conditions", {"y": {"kind": "poisson"}}, "'integers', 'normal' or 'constant'"),
    key("sampling.conditions", {"y": 5}, "sampling.conditions.y"),
    key("sampling.conditions", {"y": None}, "sampling.conditions.y"),
    key("pipeline.batch", -1, "greater than or equal to 0"),
    key("pipeline.prompts", "a cat", "valid list"),
    key("pipeline.prompts", [None], "valid string"),
    key("pipeline.class_labels", [True], "true and false"),
    key("pipeline.class_labels", ["cat"], "valid integer"),
    key("quantize.subset_size", 0, "greater than or equal to 1"),
    key("quantize.subset_size", HUGE, "less than or equal to"),
    key("quantize.smooth_quant_alpha", float("nan"), "finite"),
    key("quantize.max_error", -1, "greater than 0"),
    key("quantize.ignored_scope", "all", "'quantize.ignored_scope': input should be"),
    key("weights.group_size", 0, "number of weights, or -1"),
    key("weights.group_size", True, "true and false"),
    key("weights.ratio", 0.5, "an option of the int4 modes"),
    key("prune.mlp_width", 1.0, "less than 1"),
    key("prune.heads", float("nan"), "finite"),
    key("prune.finetune_steps", -1, "greater than or equal to 0"),
    key("prune.learning_rate", 0, "greater than 0"),
    key("export.format", "gguf", "no export format 'gguf'; there are 'openvino', 'onnx', 'executorch'"),
    key("export.telemetry", 7, "valid boolean"),
    key("order", "quantize_train", "needs a quantize section"),
    # overrides
    override("a list", [("target", 0.4)], "overrides: a mapping of dotted keys is needed, there was"),
    override("a word", "target=0.4", "overrides: a mapping of dotted keys is needed, there was"),
    override("a number", 5, "overrides: a mapping of dotted keys is needed, there was 5"),
    override("a number as key", {5: 1}, "overrides: a key is a dotted name.*there was 5"),
    override("None as key", {None: 1}, "there was None"),
    override("a tuple as key", {("guards", "max_reuse"): 1}, "there was "),
    override("an empty key", {"": 1}, "unknown key"),
    override("dots only", {"..": 1}, "unknown key"),
    override("a dot at the end", {"guards.": 1}, "unknown key"),
    override("below a value", {"target.a": 1}, "cannot set 'target.a': 'target' is not a section"),
    override("a section by a value", {"guards": 1}, "'guards': input should be"),
    override("an object", {"target": object()}, "valid number; there was <object"),
    override("a function", {"train.seed": len}, "valid integer"),
    override("values in each other", {"sampling": itself()}, "or one that holds itself"),
    override("none at all", None, None),
    override("an empty mapping", {}, None),
    override("a mapping that cannot be written to", MappingProxyType({"target": 0.4}), None),
    unchanged("the caller's nested section is left alone", {"guards": {"max_reuse": 3}}, {"guards.max_reuse": 4}),
    unchanged("the caller's empty section is left alone", {"guards": {}}, {"guards.max_reuse": 4}),
    unchanged("the caller's missing section is left alone", {"target": 0.5}, {"guards.max_reuse": 4}),
    unchanged("a section among the overrides is left alone", {}, {"guards": {"max_reuse": 3}, "guards.max_reuse": 4}),
    unchanged("a Recipe is left alone", Recipe(), {"guards.max_reuse": 4, "target": 0.3}),
    unchanged("lists are left alone", {"guards": {"exclude": ["a"]}}, {"guards.exclude": ["b"]}),
    # other arguments of commands
    shell(
        "demo --images of none", ["demo", "out", "--images", "0"], "a number from 1 to 1000000 is needed, there was '0'"
    ),
    shell("demo --images below none", ["demo", "out", "--images=-5"], "a number from 1 to 1000000 is needed"),
    shell("demo --images without end", ["demo", "out", "--images", "9" * 5000], "a number from 1 to 1000000 is needed"),
    shell("demo --images in words", ["demo", "out", "--images", "many"], "a number from 1 to 1000000 is needed"),
    shell("no command", [], "the following arguments are required: COMMAND"),
    shell("an unknown command", ["compress"], "invalid choice: 'compress'"),
    shell("an unknown option", ["recipes", "--everything"], "unrecognized arguments: --everything"),
    shell("locate without a model", ["locate"], "the following arguments are required: --model"),
    shell(
        "a format that is none",
        ["export", "--model", "m", "--format", "gguf", "out"],
        "no export format 'gguf'; there are 'openvino', 'onnx', 'executorch'",
    ),
    shell("a recipe that is not there", ["recipes", "nope"], "no recipe 'nope'"),
    shell("a recipe with a long name", ["recipes", "x" * 5000], "no recipe 'xxx"),
    shell("a recipe that is a folder", ["locate", "--model", "m", "--recipe", "/"], "is a folder"),
    shell("the list of recipes", ["recipes"], None),
    shell("a recipe as JSON", ["recipes", "lazy_dit", "--json"], None),
    # --set
    set_("target=0.4", None),
    set_("pipeline.prompts=[a cat, a red car]", None),
    set_("timestep_input=a=b", None),
    set_("target", "write KEY=VALUE, such as --set target=0.4"),
    set_("=0.4", "write KEY=VALUE"),
    set_("", "write KEY=VALUE", "nothing"),
    set_("target=", "--set|valid number"),
    set_("target=[a", "--set 'target' is not YAML: line 1"),
    set_("target={a: 1, a: 2}", "the key 'a' is there twice"),
    set_("target=!!python/object/apply:os.system [true]", "--set 'target' is not YAML: line 1: could not determine"),
    set_("target=*a", "stands for nothing"),
    set_("target=" + "[" * 3000, "more than 32 lists", "lists in each other"),
    set_("target=a: b: c", "--set 'target' is not YAML: line 1"),
    set_("target=\x00", "not YAML", "a NUL byte"),
    set_("target=true", "true and false are no values here"),
    set_("target=.nan", "finite number"),
    set_("tarket=0.4", "did you mean 'target'"),
    set_("train.seed=99999999999999999999999999", "less than or equal to"),
    set_("guards=[1]", "'guards': input should be"),
    set_("target=" + "x" * 20_000, "valid number", "a very long value"),
]
