"""Several images in flight through one wrapped file, as a server has them: none gets anything of another."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest

import lazycompress
from lazycompress.plan.forecasts import lagrange
from lazycompress.plan.plan import even

from .models import Onnx, OpenVINO, onnx_model, openvino_model
from .test_semantics import TIMES, Image, prompt

PLAN = even(TIMES, 0.5, 1)
IMAGES, REQUESTS = 32, 4


def images() -> list[Image]:
    """All of one label, in shuffled order."""
    return [Image(int(seed), prompt(1, batch=1)) for seed in np.random.default_rng(0).permutation(IMAGES)]


def alone(make: Any) -> list[Any]:
    """The latents of each image from a run of its own, and whether its calls computed as planned."""
    found = []
    for image in images():
        lazy, dense = make()
        computed = []
        while not image.over:
            output = lazy(**image.inputs())
            computed.append(np.array_equal(output, dense(**image.inputs())))
            image.step(output)
        assert computed == list(PLAN.computes)
        found.append(image.latents)
    return found


@pytest.fixture(scope="module")
def lazy_ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("server") / "lazy"
    return lazycompress.wrap(openvino_model(), PLAN, out, streams=REQUESTS) / "openvino_model.xml"


def queue_of(path: Path) -> ov.AsyncInferQueue:
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": REQUESTS})
    return ov.AsyncInferQueue(compiled, REQUESTS)


def test_images_that_keep_a_request_each(lazy_ir: Path) -> None:
    """Four requests, each with one image after another, all of one label and without a reset between them."""
    lone, dense = OpenVINO(lazy_ir), OpenVINO(openvino_model())

    def fresh() -> tuple[Any, Any]:
        lone.request.reset_state()
        return lone, dense

    expected = alone(fresh)
    jobs, queue = images(), queue_of(lazy_ir)
    waiting: Iterator[Image] = iter(jobs)
    ended: Queue[int] = Queue()
    requests = list(queue)
    for k, request in enumerate(requests):
        request.set_callback(lambda number: ended.put(number), k)
    running = [next(waiting) for _ in requests]
    for k, request in enumerate(requests):
        request.start_async(running[k].inputs(), k)
    computed: dict[int, list[bool]] = {}
    for _ in range(IMAGES * len(TIMES)):
        k = ended.get(timeout=60)
        requests[k].wait()
        output = requests[k].get_output_tensor(0).data.copy()
        image = running[k]
        computed.setdefault(id(image), []).append(np.array_equal(output, dense(**image.inputs())))
        image.step(output)
        if image.over:
            running[k] = next(waiting, image)
        if not running[k].over:
            requests[k].start_async(running[k].inputs(), k)
    assert list(computed.values()) == [list(PLAN.computes)] * IMAGES
    for image, latents in zip(jobs, expected, strict=True):
        np.testing.assert_array_equal(image.latents, latents)


def test_calls_that_go_to_any_request(lazy_ir: Path) -> None:
    """Each call of an image goes to whichever request is idle: it computes, or is a forecast from its own image's outputs."""
    dense, random = OpenVINO(openvino_model()), np.random.default_rng(1)
    waiting, queue = images(), queue_of(lazy_ir)
    ready, waiting = waiting[: 2 * REQUESTS], waiting[2 * REQUESTS :]
    ended: Queue[tuple[Image, Any]] = Queue()
    queue.set_callback(lambda request, image: ended.put((image, request.get_output_tensor(0).data.copy())))
    places: dict[int, int] = {}
    records: dict[tuple[int, int], list[tuple[float, Any]]] = {}
    skipped = flying = 0
    for _ in range(IMAGES * len(TIMES)):
        while ready and flying < REQUESTS:
            image = ready.pop(int(random.integers(len(ready))))
            places[id(image)] = queue.get_idle_request_id()  # where the next call goes
            queue.start_async(image.inputs(), image)
            flying += 1
        image, output = ended.get(timeout=60)
        flying -= 1
        own, now = records.setdefault((id(image), places[id(image)]), []), image.times[0]
        if np.array_equal(output, dense(**image.inputs())):
            own.insert(0, (now, output))
        else:
            skipped += 1
            assert any(is_forecast(output, own[: 1 + k], now) for k in range(PLAN.order + 1))
        image.step(output)
        if not image.over:
            ready.append(image)
        elif waiting:
            ready.append(waiting.pop())
    assert not waiting
    assert not ready
    assert skipped > 0.05 * IMAGES * len(TIMES)


def is_forecast(output: Any, own: list[tuple[float, Any]], now: float) -> bool:
    """Whether an output is the polynomial through these."""
    weights = lagrange([time for time, _ in own], now)
    expected = sum(weight * value for weight, (_, value) in zip(weights, own, strict=True))
    return bool(own) and bool(np.allclose(output, expected, rtol=0, atol=1e-5))


def test_a_state_that_is_reset_is_of_no_image(lazy_ir: Path) -> None:
    lazy, dense = OpenVINO(lazy_ir), OpenVINO(openvino_model())
    image = Image(1, prompt(1, batch=1))
    for _ in range(3):
        image.step(lazy(**image.inputs()))
    assert not PLAN.computes[3]
    lazy.request.reset_state()
    assert all(not state.state.data.any() for state in lazy.request.query_state())
    computed = []
    while not image.over:
        output = lazy(**image.inputs())
        computed.append(np.array_equal(output, dense(**image.inputs())))
        image.step(output)
    assert computed == [True, *PLAN.computes[4:]]


def test_threads_with_a_past_for_each_image(tmp_path: Path) -> None:
    """One session of ONNX Runtime for all threads: who calls carries the past."""
    onnx.save(onnx_model(), tmp_path / "model.onnx")
    path = lazycompress.wrap(tmp_path / "model.onnx", PLAN, tmp_path / "lazy") / "model.onnx"
    lazy, dense = Onnx(str(path)), Onnx(onnx_model().SerializeToString())

    def fresh() -> tuple[Any, Any]:
        lazy.past = {}
        return lazy, dense

    expected = alone(fresh)

    def sample(image: Image) -> Any:
        own = Onnx.__new__(Onnx)
        own.session, own.past = lazy.session, {}
        while not image.over:
            image.step(own(**image.inputs()))
        return image.latents

    with ThreadPoolExecutor(REQUESTS) as pool:
        found = list(pool.map(sample, images()))
    np.testing.assert_array_equal(found, expected)


def test_a_past_of_zeros_is_of_no_image(tmp_path: Path) -> None:
    """So ONNX needs no input to forget: leave the past out, or hand zeros of any sizes."""
    onnx.save(onnx_model(), tmp_path / "model.onnx")
    path = lazycompress.wrap(tmp_path / "model.onnx", PLAN, tmp_path / "lazy") / "model.onnx"
    lazy, dense = Onnx(str(path)), Onnx(onnx_model().SerializeToString())
    for forget in ("left out", "zeros", "smaller zeros"):
        lazy.past = {}
        image = Image(1, prompt(1))
        for _ in range(3):
            image.step(lazy(**image.inputs()))
        past = lazy.past
        for name, value in past.items():
            past[name] = np.zeros_like(value if forget == "zeros" else value[:1])
        if forget == "left out":
            lazy.past = {}
        np.testing.assert_array_equal(lazy(**image.inputs()), dense(**image.inputs()))
        assert not PLAN.computes[3]
