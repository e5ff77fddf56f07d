"""Wrapped small denoisers, each beside its dense one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import onnx
import pytest

import lazycompress
from lazycompress.plan.plan import Plan

from .models import Onnx, OpenVINO, onnx_model, openvino_model

Pair = tuple[Any, Any]


@pytest.fixture(params=["openvino", "onnx"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Pair]:
    """Wraps a small denoiser of one format; gives its runner, and that of the dense one."""
    numbers = count()

    def make(plan: Plan, model: dict[str, Any] | None = None, **options: Any) -> Pair:
        out = tmp_path / f"lazy_{next(numbers)}"
        if request.param == "openvino":
            lazycompress.wrap(openvino_model(**(model or {})), plan, out, **options)
            return OpenVINO(out / "openvino_model.xml"), OpenVINO(openvino_model(**(model or {})))
        onnx.save(onnx_model(**(model or {})), tmp_path / "model.onnx")
        lazycompress.wrap(tmp_path / "model.onnx", plan, out, **options)
        return Onnx(str(out / "model.onnx")), Onnx(onnx_model(**(model or {})).SerializeToString())

    return make
