"""Stages that are refused, before any work where the recipe or the call alone shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.compose import quantize as compose
from lazycompress.compose.quantize import quantize
from lazycompress.integrations.digits.model import draw_noise
from lazycompress.recipe import Quantize
from tests.conftest import two_blocks

from .stages import make, never, sampler

INPUTS = {"hidden_states": draw_noise(2), "timestep": torch.tensor([9, 9]), "class_labels": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"quantize": {"presett": "mixed"}}, r"unknown key 'quantize\.presett'; did you mean 'preset'\?"),
        ({"quantize": {"preset": "best"}}, r"key 'quantize\.preset'.*'performance'.*'mixed'.*there was 'best'"),
        ({"weights": {"mode": "int3"}}, r"key 'weights\.mode'.*there was 'int3'"),
        ({"weights": {"mode": "int8_sym", "group_size": 64}}, r"weights\.group_size is an option of the int4 modes"),
        ({"weights": {"mode": "int4_sym", "group_size": 0}}, r"weights\.group_size.*there was 0"),
        ({"order": "quantize_train"}, r"quantize_train needs a quantize section; add one, or leave order out"),
        ({"quantize": {}, "weights": {}}, r"keep one of the sections quantize and weights"),
        (
            {"quantize": {}, "order": "quantize_train", "train": {"enabled": False}},
            r"quantize_train needs train\.enabled: true",
        ),
        ({"order": "train_prune"}, r"key 'order'.*'train_quantize'.*there was 'train_prune'"),
        (
            {"quantize": {"ignored_scope": {"names": ["transformer_blocks.0.attn1.to_p"]}}},
            r"quantize\.ignored_scope\.names: 'transformer_blocks\.0\.attn1\.to_p' matches nothing; did you mean '.*to_.'",
        ),
        (
            {"weights": {"ignored_scope": {"patterns": ["blok.*"]}}},
            r"weights\.ignored_scope\.patterns: 'blok\.\*' matches",
        ),
        ({"quantize": {"ignored_scope": {"patterns": ["("]}}}, r"'\(' is no regular expression"),
        ({"quantize": {"ignored_scope": {"types": ["liner"]}}}, r"no operation type 'liner'; did you mean 'linear'"),
    ],
)
def test_a_wrong_recipe_is_one_line_before_any_work(recipe: dict[str, Any], expected: str) -> None:
    with pytest.raises(LazyCompressError, match=expected) as caught:
        lazycompress.apply(two_blocks(), recipe, example_inputs=INPUTS, sampler=never)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({"quantize": {}}, "quantize"),
        ({"weights": {"mode": "int4_sym", "awq": True}}, r"weights\.awq"),
        ({"weights": {"max_error": 1e-3}}, r"weights\.max_error"),
        ({"prune": {}}, "prune"),
    ],
)
def test_missing_calibration_data_says_what_to_pass(recipe: dict[str, Any], key: str) -> None:
    recipe = {**recipe, "train": {"enabled": False}}
    with pytest.raises(LazyCompressError, match=rf"{key}: there is nothing to calibrate on; pass sampler=, or"):
        lazycompress.apply(two_blocks(), recipe, example_inputs=INPUTS)


def test_a_sampler_with_other_sizes_cannot_calibrate() -> None:
    with pytest.raises(LazyCompressError, match="the sampler calls the model with other sizes"):
        quantize(make(), lambda model: torch.zeros(1, 1, 8, 8), Quantize())


def test_what_nncf_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    nncf = compose.need_nncf("a test")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("not\nthis one")

    monkeypatch.setattr(nncf, "quantize", refuse)
    with pytest.raises(LazyCompressError, match="quantize: NNCF stopped: RuntimeError: not this one"):
        quantize(make(), sampler, Quantize(subset_size=1))
