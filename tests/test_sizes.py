"""Other resolutions, frames and text lengths in one capture: the same numbers, a new image at every change of size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lazycompress.graph.capture import capture, take_apart
from lazycompress.graph.insert import find_timestep
from lazycompress.graph.locate import locate_branches
from lazycompress.graph.sizes import resized
from lazycompress.runtime import LazyModel, wrap

from .coverage import difference, specimens
from .export_models import lively
from .zoo.specimen import Specimen

ZOO = {specimen.name: specimen for specimen in specimens()}

#: Resolution, frames, text, rotary embedding made inside or passed in, masks.
NAMES = ["sd3", "flux", "wan", "cogvideox", "sana", "next-dit"]


def shapes_of(lazy: LazyModel, count: int) -> list[list[tuple[int, ...]]]:
    """The example's shapes and others that its capture takes."""
    captured = lazy.program(lazy.example).captured
    found = [list(lazy.example.shapes)]
    for shapes in captured.sizes.others(2):
        if shapes not in found:
            found.append(shapes)
        if len(found) == count:
            break
    return found


def inputs(lazy: LazyModel, specimen: Specimen, shapes: list[tuple[int, ...]], step: int) -> dict[str, Any]:
    call = take_apart(lazy.model, (), specimen.inputs(2, step))
    return call.arguments(resized(call.tensors, shapes))


def make(specimen: Specimen, order: int = 1, spread: float = 0.3) -> LazyModel:
    model = specimen.build()
    first, last = (take_apart(model, (), specimen.inputs(2, step)) for step in (0, 19))
    where = find_timestep(first.leaves, first.tensors)
    times = torch.linspace(float(first.tensors[where].max()), float(last.tensors[where].max()), 20)
    return wrap(model, (), specimen.inputs(2, 0), lively(times, spread, order))


@pytest.mark.parametrize("name", NAMES)
def test_one_capture_runs_other_sizes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    specimen = ZOO[name]
    lazy = make(specimen)
    fresh = {}
    for kind, shapes in enumerate(shapes_of(lazy, 3)):
        assert kind == 0 or shapes != list(lazy.example.shapes)
        lazy.policy = "compute"
        with torch.no_grad():
            for step in (0, 1):
                call = inputs(lazy, specimen, shapes, step)
                assert difference(lazy(**call), lazy.model(**call)) == 0
            lazy.policy = "learned"
            lazy.reset()
            fresh[kind] = [lazy(**inputs(lazy, specimen, shapes, step)) for step in range(4)]
        assert 0 < lazy.summary().skip_ratio < 1
    assert len(fresh) == 3
    # In a row, and half-way through an image, the sizes change: the same as alone.
    lazy.reset()
    with torch.no_grad():
        for kind in (0, 1, 2, 1):
            for step in range(2 if kind == 0 else 4):
                got = lazy(**inputs(lazy, specimen, shapes_of(lazy, 3)[kind], step))
                assert difference(got, fresh[kind][step]) == 0
    assert not [record for record in caplog.records if "captures" in record.getMessage()]


@pytest.mark.parametrize("name", NAMES)
def test_the_branches_are_those_of_a_capture_of_fixed_size(name: str) -> None:
    model = ZOO[name].build()
    call = take_apart(model, (), ZOO[name].inputs(2, 0))
    seen = []
    for sizes in (True, False):
        captured = capture(model, call, sizes)
        assert captured.sizes.is_dynamic is sizes
        branches = locate_branches(captured.graph_module.graph, captured.batch)
        seen.append([(b.name, b.kind, b.macs, b.width, len(b.exits)) for b in branches])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["dit", "u-vit"])
def test_positions_learned_for_one_resolution_keep_it(name: str) -> None:
    model = ZOO[name].build()
    captured = capture(model, take_apart(model, (), ZOO[name].inputs(2, 0)))
    assert not captured.sizes.is_dynamic


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_the_flat_graph_sees_a_new_image_in_a_new_size(name: str) -> None:
    """What exported files do: the state of one size meets a call of another one at a later timestep."""
    specimen = ZOO[name]
    lazy = make(specimen)
    program = lazy.program(lazy.example)
    threshold = torch.tensor(-1.0)  # reuse wherever the cache is valid
    for graph in (program.flat, program.lowered):
        state = [spec.fresh(2, torch.device("cpu")) for spec in graph.state]
        for step, (kind, reused) in enumerate(((0, False), (0, True), (1, False), (1, True), (0, False))):
            shapes = shapes_of(lazy, 2)[kind]
            call = take_apart(lazy.model, (), inputs(lazy, specimen, shapes, step))
            with torch.no_grad():
                results = graph.graph_module(*call.tensors, threshold, *state)
                state = list(results[graph.outputs : -1])
                assert bool(results[-1].all()) is reused
                assert bool(results[-1].any()) is reused
                if not reused:
                    assert difference(results[0], lazy.model(**call.arguments(call.tensors))) < 1e-6
