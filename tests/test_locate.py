"""Location knows no model, and takes time in proportion to the graph."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import lazycompress

SOURCES = [
    *Path(lazycompress.__file__).parent.glob("*.py"),
    *(Path(lazycompress.__file__).parent / "graph").glob("*.py"),
]

#: Names that modules have in many transformers.
MODULES = [
    "transformer_blocks",
    "single_transformer_blocks",
    "joint_transformer_blocks",
    "context_refiner",
    "noise_refiner",
    "attn1",
    "attn2",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "add_q_proj",
    "ff_context",
    "img_mlp",
    "txt_mlp",
    "caption_projection",
    "time_text_embed",
    "pos_embed",
    "proj_out",
]


def model_classes() -> set[str]:
    """Every model class that diffusers defines."""
    import diffusers.models

    names = set()
    for info in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        try:
            module = importlib.import_module(info.name)
        except Exception:  # needs a package that is not installed
            continue
        for name, value in vars(module).items():
            if (
                inspect.isclass(value)
                and value.__module__ == info.name
                and re.search(r"(Model|ModelMixin|\dD|Block)$", name)
            ):
                names.add(name)
    return names


def test_no_name_of_any_model_in_the_sources() -> None:
    names = model_classes()
    assert len(names) > 100
    pattern = re.compile(r"\b(" + "|".join(sorted(map(re.escape, names | set(MODULES)))) + r")\b")
    for source in SOURCES:
        found = pattern.findall(source.read_text())
        assert not found, f"{source.name} names {sorted(set(found))}"
