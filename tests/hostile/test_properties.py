"""What holds of any recipe, sampler and order of calls that hypothesis makes up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from torch import Tensor

from lazycompress.errors import LazyCompressError, RecipeError
from lazycompress.recipe import Recipe
from lazycompress.recipe_loading import load_recipe
from lazycompress.rehearsal import rehearse
from lazycompress.sections import section_of

from .harness import LONGEST
from .models import CHANNELS, TOKENS, good, times
from .use import shared

quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def one_line(error: LazyCompressError) -> None:
    assert "\n" not in str(error)
    assert 0 < len(str(error)) <= LONGEST


# -- recipes ------------------------------------------------------------------------------------------------------------


def dotted(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """The dotted keys of all fields."""
    found = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        inner = section_of(field.annotation)
        found += dotted(inner, f"{prefix}{name}.") if inner is not None else []
    return found


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 12),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from(
        ["static", "gates", "trajectory", "paper", "re:.*", "normal", "int4_sym", "openvino", "1e-3", "yes", ".nan"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.text(max_size=6), st.sampled_from(["mlp", "kind", "low", "high"]), scalars), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
assignments = st.dictionaries(st.one_of(st.sampled_from(dotted()), st.text(max_size=10)), values, max_size=4)
bases = st.sampled_from(
    [{}, {"sampling": {"latents": [4, 6]}}, {"weights": {"mode": "int4_sym"}}, {"prune": {}, "quantize": {}}]
)


@quick
@given(bases, assignments)
@example({}, {"guards": {"kind_targets": {"mlp": 0.5}}, "guards.kind_targets.mlp": 0.4})
def test_any_mapping_is_a_recipe_or_one_line(base: dict[str, Any], overrides: dict[str, Any]) -> None:
    before = repr((base, overrides))
    try:
        recipe = load_recipe(base, overrides)
    except RecipeError as error:
        one_line(error)
    else:
        assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
        assert load_recipe(recipe) == recipe
    assert repr((base, overrides)) == before


@quick
@given(values)
def test_any_yaml_value_in_a_file_is_a_recipe_or_one_line(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    try:
        load_recipe(path)
    except RecipeError as error:
        one_line(error)


text_like = st.text(alphabet=st.sampled_from("targe: [{}]*&!|>\n\t-#'\"%@0.5é\x00"), max_size=40)


@quick
@given(st.one_of(st.binary(max_size=60), text_like.map(str.encode)))
def test_any_bytes_in_a_file_are_a_recipe_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_bytes(content)
    try:
        load_recipe(path)
    except RecipeError as error:
        one_line(error)


# -- samplers -----------------------------------------------------------------------------------------------------------

BATCHES, CALLS, NOISE = ["fixed", "each run"], ["fixed", "each run", "none"], ["global", "seeded", "own", "own anew"]
ENDS = {
    "latents": lambda x: x,
    "half": lambda x: x.half(),
    "a list": list,
    "one image": lambda x: x[0],
    "nothing": lambda x: None,
    "nan": lambda x: x * torch.nan,
    "integers": lambda x: x.long(),
    "an error": lambda x: x[1000],
}


@quick
@given(st.sampled_from(BATCHES), st.sampled_from(CALLS), st.sampled_from(NOISE), st.sampled_from(sorted(ENDS)))
@example("fixed", "fixed", "global", "latents")
def test_any_sampler_is_repeatable_or_one_line(batches: str, calls: str, noise: str, end: str) -> None:
    runs = iter(range(100))
    own = torch.Generator().manual_seed(0)

    def sampler(model: Any) -> Any:
        run = next(runs)
        batch, steps = (
            2 + (batches == "each run") * (run % 2),
            {"none": 0}.get(calls, 2 + (calls == "each run") * (run % 2)),
        )
        if noise == "seeded":
            torch.manual_seed(7)
        generator = torch.Generator().manual_seed(0) if noise == "own anew" else own if noise == "own" else None
        x = torch.randn(batch, TOKENS, CHANNELS, generator=generator)
        for k in range(steps):
            x = x - 0.3 * model(x, times(900.0 - 300 * k, batch), torch.zeros(batch, dtype=torch.int64))
        return ENDS[end](x)

    right = batches == calls == "fixed" and noise == "global" and end in ("latents", "half")
    state = torch.get_rng_state()
    try:
        rehearse(good(), sampler)
    except LazyCompressError as error:
        one_line(error)
        assert not right
    else:
        assert right
    assert torch.equal(torch.get_rng_state(), state)


# -- orders of calls ----------------------------------------------------------------------------------------------------

call = st.tuples(st.just("call"), st.integers(0, 3), st.sampled_from([900.0, 600.0, 300.0]), st.integers(0, 4))
acts = st.lists(
    st.one_of(
        call,
        call,
        call,
        st.just(("reset",)),
        st.tuples(st.just("policy"), st.sampled_from(["learned", "compute", "reuse", "else"])),
        st.tuples(st.just("target"), st.sampled_from([0.7, 1.0, 0.0, 3.0])),
        st.tuples(st.just("name"), st.sampled_from(["cond", "uncond"])),
    ),
    max_size=10,
)


@settings(quick, max_examples=25)
@given(acts)
@example(
    [("policy", "compute"), ("call", 2, 900.0, 1), ("call", 2, 600.0, 1), ("call", 0, 600.0, 1), ("call", 3, 600.0, 4)]
)
def test_any_order_of_calls_raises_nothing_else_and_computes_what_the_dense_model_does(
    acts: list[tuple[Any, ...]],
) -> None:
    lazy, dense = shared(), good()
    gates = copy.deepcopy(lazy.gates.state_dict())
    lazy.reset()
    lazy.policy = "learned"
    try:
        with torch.no_grad():
            for act in acts:
                try:
                    _do(lazy, dense, act)
                except LazyCompressError as error:
                    one_line(error)
                    assert act in [("policy", "else"), ("target", 0.0), ("target", 3.0)] or act[1] == 0 or act[3] == 4
    finally:
        lazy.gates.load_state_dict(gates)
        lazy.policy = "learned"


def _do(lazy: Any, dense: Any, act: tuple[Any, ...]) -> None:
    if act[0] == "reset":
        lazy.reset()
    elif act[0] == "policy":
        lazy.policy = act[1]
    elif act[0] == "target":
        lazy.set_target(act[1])
    elif act[0] == "name":
        with lazy.cache_context(act[1]):
            _check(lazy, dense, 2, 900.0, 1)
    else:
        _check(lazy, dense, *act[1:])


def _check(lazy: Any, dense: Any, batch: int, time: float, label: int) -> None:
    x: Tensor = torch.linspace(-1, 1, batch * TOKENS * CHANNELS).reshape(batch, TOKENS, CHANNELS) + time / 1000
    labels = torch.full((batch,), label)  # 4 is one too many
    output = lazy(x, times(time, batch), labels)
    assert output.shape == x.shape
    assert bool(output.isfinite().all())
    if lazy.policy == "compute":
        torch.testing.assert_close(output, dense(x, times(time, batch), labels))
