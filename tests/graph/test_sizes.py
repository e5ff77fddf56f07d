"""Other resolutions, frames and text lengths in one capture: the same numbers, a new image at every change of size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lazycompress
from lazycompress import LazyCompressError
from lazycompress.errors import ExportError
from lazycompress.export.onnx_runner import OnnxRunner
from lazycompress.export.openvino_runner import OpenVINORunner
from lazycompress.graph.call import take_apart
from lazycompress.graph.capture import capture
from lazycompress.graph.insert import find_timestep
from lazycompress.graph.locate import locate_branches
from lazycompress.graph.sizes import resized
from lazycompress.runtime import LazyModel, wrap
from tests.coverage import difference, specimens
from tests.export_models import Reference, lively
from tests.zoo.specimen import Specimen, built
from tests.zoo.styles_llama import TEXT, CrossAttention
from tests.zoo.styles_parts import HEADS, WIDTH, FusedAttention, TimeEmbed

ZOO = {specimen.name: specimen for specimen in specimens()}

#: Resolution, frames, text, rotary embedding made inside or passed in, masks.
NAMES = ["sd3", "flux", "wan", "next-dit"]
SOME_SLOW = [name if name in ("sd3", "next-dit") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


class Picture(nn.Module):
    """An image of any height and width, text of any length; the MLP's convolution needs height and width again."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, WIDTH, 2, 2)
        self.time, self.norm1, self.norm2 = TimeEmbed(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.cross = FusedAttention(WIDTH, HEADS), CrossAttention(WIDTH, HEADS)
        self.wide, self.near, self.narrow = nn.Linear(WIDTH, 48), nn.Conv2d(48, 48, 3, padding=1), nn.Linear(48, WIDTH)
        self.leave = nn.Linear(WIDTH, 16)

    def convolved(self, x: Tensor, height: int, width: int) -> Tensor:
        maps = self.wide(x).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return self.narrow(torch.relu(self.near(maps)).permute(0, 2, 3, 1).flatten(1, 2))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        places = torch.arange(height).unsqueeze(1) * 0.7 + torch.arange(width) * 0.3
        tokens = (
            self.patches(x).flatten(2).transpose(1, 2) + torch.sin(places).reshape(-1, 1) + self.time(t).unsqueeze(1)
        )
        tokens = tokens + self.attn(self.norm1(tokens))
        tokens = tokens + self.cross(tokens, text, None)
        tokens = tokens + self.convolved(self.norm2(tokens), height, width)
        pixels = self.leave(tokens).reshape(x.shape[0], height, width, 2, 2, 4)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


TIMES = torch.arange(950, -1, -50).float()

#: Height, width, words.
SIZES = [(8, 8, 5), (12, 4, 5), (8, 8, 7), (6, 10, 3)]


def drawing(size: tuple[int, int, int] = SIZES[0], step: int = 0, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """One call of `Picture`."""
    generator = torch.Generator().manual_seed(seed)
    height, width, words = size
    x, drift = torch.randn(2, 3, 4, height, width, generator=generator)
    text = torch.randn(3, words, TEXT, generator=generator)
    return {"x": (x + 0.05 * step * drift)[:batch], "t": TIMES[step].repeat(batch), "text": text[:batch]}


@pytest.fixture(scope="module")
def picture() -> LazyModel:
    return wrap(built(Picture)(), (), drawing(), lively(TIMES, order=2))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow(seconds=20)) for name in ("openvino", "onnx", "explicit")],
)
def runner(request: pytest.FixtureRequest, picture: LazyModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sizes") / "out"
    format = "onnx" if request.param == "onnx" else "openvino"
    lazycompress.export(picture, folder, format=format, telemetry=True, stateful=request.param == "openvino")
    return OnnxRunner(folder) if format == "onnx" else OpenVINORunner(folder)


def test_a_file_runs_other_sizes_and_sees_new_images_by_itself(picture: LazyModel, runner: Any) -> None:
    """Sizes and batch change half-way, at a timestep past the last one; no reset."""
    reference = Reference(picture, "flat")
    step = 0
    for size, batch, calls in ((0, 2, 4), (1, 2, 3), (0, 2, 3), (2, 2, 3), (3, 3, 4), (3, 1, 2), (0, 2, 1)):
        for _ in range(calls):
            call = drawing(SIZES[size], step % len(TIMES), batch)
            wanted, decisions = reference(**call)
            runner.usage.clear()
            found = runner(**call)[0]
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
            assert torch.equal(sum(runner.usage.reused.values()), decisions.sum(dim=1))
            step += 1
        assert decisions.sum() > 0 or calls == 1


def test_channels_and_the_ends_of_sizes_are_refused(runner: Any) -> None:
    call = drawing()
    with pytest.raises(LazyCompressError, match="text"):
        runner(**{**call, "text": call["text"][:, :, 1:]})


@pytest.mark.slow(seconds=40)
def test_a_file_that_cannot_take_other_sizes_takes_those_of_the_example(
    picture: LazyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lazycompress.export import onnx

    plain = onnx.convert

    def convert(traced: Any, **options: Any) -> Any:
        if any(-2 in spec.shape for spec in traced.state):
            raise ExportError("not with these sizes")
        return plain(traced, **options)

    monkeypatch.setattr(onnx, "convert", convert)
    lazycompress.export(picture, tmp_path / "out", format="onnx")
    assert "sizes of its example only: not with these sizes" in caplog.text
    fixed = OnnxRunner(tmp_path / "out")
    torch.testing.assert_close(fixed(**drawing(batch=3))[0], picture.model(**drawing(batch=3)), rtol=0, atol=1e-4)
    with pytest.raises(LazyCompressError, match="input x"):
        fixed(**drawing(SIZES[1]))


def test_gates_move_between_sizes_and_one_capture_is_kept(picture: LazyModel) -> None:
    """Also a check of what the zoo's models share: decisions in one size are those of a capture made for it."""
    other = wrap(picture.model, (), drawing(SIZES[3]), lively(TIMES, order=2))
    picture.reset()
    with torch.no_grad():
        for step in range(5):
            call = drawing(SIZES[3], step)
            torch.testing.assert_close(picture(**call), other(**call), rtol=0, atol=1e-6)
    assert 0 < picture.summary().skip_ratio == other.summary().skip_ratio
    assert picture.program(take_apart(picture.model, (), call)) is picture.program(picture.example)


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


@pytest.mark.parametrize("name", SOME_SLOW)
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


@pytest.mark.parametrize("name", SOME_SLOW)
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


@pytest.mark.parametrize("name", ["sd3", pytest.param("wan", marks=pytest.mark.slow(seconds=13))])
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
