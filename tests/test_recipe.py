"""Recipes: where they come from, what is refused, and what the message says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazycompress import LazyCompressError, Recipe
from lazycompress.recipe_loading import load_recipe, shipped_recipes
from lazycompress.sampling import build_sampler


def test_every_shipped_recipe_loads_and_says_what_it_is() -> None:
    shipped = shipped_recipes()
    assert {"lazy_dit.yaml", "digits_dit.yaml"} <= set(shipped)
    for name, line in shipped.items():
        assert line.endswith("."), name
        assert isinstance(load_recipe(name), Recipe)


def test_a_recipe_survives_writing_and_reading(tmp_path: Path) -> None:
    recipe = load_recipe("digits_dit.yaml", {"target": 0.3, "guards.max_reuse": 4})
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert recipe.target == 0.3


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"traget": 0.5}, "unknown key 'traget'; did you mean 'target'?"),
        ({"guards": {"warmup_step": 1}}, "unknown key 'guards.warmup_step'; did you mean 'warmup_steps'?"),
        ({"target": 1.5}, "key 'target'"),
        ({"target": "half"}, "there was 'half'"),
        ({"sampling": {"steps": 10}}, "sampling.latents"),
    ],
)
def test_a_wrong_recipe_is_one_line_with_the_key(data: dict[str, object], expected: str) -> None:
    with pytest.raises(LazyCompressError) as caught:
        load_recipe(data)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_names_the_shipped_ones() -> None:
    with pytest.raises(LazyCompressError, match=r"no recipe 'nope'.*lazy_dit\.yaml"):
        load_recipe("nope")


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("target: [0.5")
    with pytest.raises(LazyCompressError, match=r"broken\.yaml is not YAML"):
        load_recipe(path)


def test_an_unknown_scheduler_is_an_error_before_any_work() -> None:
    recipe = load_recipe({"sampling": {"scheduler": "DDIMSchedular", "latents": [1, 8, 8]}})
    assert recipe.sampling is not None
    with pytest.raises(LazyCompressError, match=r"diffusers has no 'DDIMSchedular'"):
        build_sampler(recipe.sampling)


@given(st.text(min_size=1, max_size=20) | st.sampled_from(["a share", "shares", "an order", "a forecast"]))
def test_any_unknown_top_level_key_is_refused(key: str) -> None:
    if key in Recipe.model_fields:
        return
    with pytest.raises(LazyCompressError, match="unknown key"):
        load_recipe({key: 1})
