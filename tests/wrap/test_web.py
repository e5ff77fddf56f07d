"""The page of `examples/web`, in a real browser, and its loop in Node: both give what ONNX Runtime gives in Python."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .browser import browser, missing, served
from .models import Onnx

WEB = Path(__file__).parents[2] / "examples" / "web"

#: Steps, and the share of them that is computed. The labels of the page are ten.
STEPS, TARGET, IMAGES = 50, 0.34, 10

#: Of pixels in [-1, 1]; the same arithmetic in another order.
CLOSE = 1e-4

_OFFLINE = re.compile("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|ETIMEDOUT")

pytestmark = pytest.mark.slow(seconds=12)


@pytest.fixture(scope="module")
def make() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_web", WEB / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def packages(make: Any) -> Path:
    """A folder with both runtimes from npm."""
    lacking = [name for name in ("node", "npm") if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"{' and '.join(lacking)} not installed: apt-get install nodejs npm")
    try:
        make.install(make.PACKAGES, development=True)
    except RuntimeError as error:
        if not _OFFLINE.search(str(error)):
            raise
        pytest.skip("npm cannot reach a registry to install onnxruntime-web and onnxruntime-node")
    folder: Path = make.PACKAGES
    return folder


@pytest.fixture(scope="module")
def site(make: Any, packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page, written."""
    out = tmp_path_factory.mktemp("site")
    make.make(out, STEPS, TARGET, seed=3, packages=packages)
    return out


@pytest.fixture(scope="module")
def table(site: Path) -> Any:
    return json.loads((site / "table.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def expected(site: Path, table: Any) -> dict[str, Any]:
    """The images of both files, sampled in Python."""
    return {kind: sampled(site / table["files"][kind], table) for kind in ("dense", "lazy")}


@pytest.fixture(scope="module")
def page(site: Path) -> Iterator[Any]:
    lacking = missing()
    if lacking:
        pytest.skip(f"{' and '.join(lacking)} not installed: apt-get install chromium chromium-driver")
    with served(site) as address, browser() as found:
        found.open(address)
        yield found


def sampled(file: Path, table: Any) -> Any:
    """What the Euler sampler makes of the table's noise with a file."""
    model = Onnx(str(file))
    model.past = {
        info.name: np.zeros([size if isinstance(size, int) else 1 for size in info.shape], np.float32)
        for info in model.session.get_inputs()
        if info.name.startswith("past_")
    }
    latents = np.float32(table["noise"]).reshape(table["shape"])
    labels = np.int64(table["labels"])
    for time, size in zip(table["timesteps"], table["sizes"], strict=True):
        velocity = model(hidden_states=latents, timestep=np.full(len(labels), time, np.float32), class_labels=labels)
        latents = latents + np.float32(size) * velocity
    return latents.ravel()


def check(found: Any, expected: dict[str, Any], plan: list[bool]) -> None:
    """That a runtime gave what it should: `found` is as `window.results`."""
    for kind in ("dense", "lazy"):
        np.testing.assert_allclose(found[kind]["images"], expected[kind], rtol=0, atol=CLOSE)
    assert found["dense"]["computes"] == [True] * STEPS
    assert found["lazy"]["computes"] == plan
    apart = np.abs(expected["lazy"] - expected["dense"])
    assert found["largest"] == pytest.approx(apart.max(), abs=2 * CLOSE)
    assert found["psnr"] == pytest.approx(10 * np.log10(4 / np.mean(apart**2)), abs=0.5)
    print({kind: f"{found[kind]['milliseconds']:.0f} ms" for kind in ("dense", "lazy")}, found["psnr"])


RESULTS = """return window.results.then((found) => ({
  ...found,
  dense: { ...found.dense, images: Array.from(found.dense.images) },
  lazy: { ...found.lazy, images: Array.from(found.lazy.images) },
}))"""


def test_a_browser_draws_the_same(page: Any, table: Any, expected: dict[str, Any]) -> None:
    found = page.run(RESULTS)
    assert len(found["lazy"]["images"]) == IMAGES * 64
    assert sum(table["computes"]) == round(TARGET * STEPS)
    check(found, expected, table["computes"])
    assert np.abs(expected["lazy"] - expected["dense"]).max() > CLOSE  # else the two could have been mixed up
    assert page.messages() == []


def test_the_page_shows_what_it_found(page: Any, table: Any) -> None:
    found = page.run(RESULTS)
    skipped = page.run("return [...document.querySelectorAll('#lazy .strip .cell')].map((c) => c.matches('.skipped'))")
    assert skipped == [not computes for computes in table["computes"]]
    assert page.run("return document.querySelectorAll('#dense .strip .computed').length") == STEPS
    assert page.run("return document.getElementById('computed').textContent") == f"{sum(table['computes'])} of {STEPS}"
    speedup = found["dense"]["milliseconds"] / found["lazy"]["milliseconds"]
    assert page.run("return document.getElementById('speedup').textContent") == f"{speedup:.2f} ×"
    drawn = page.run(
        "const canvas = document.querySelectorAll('#lazy canvas')[3];"
        "return Array.from(canvas.getContext('2d').getImageData(0, 0, 8, 8).data).filter((_, k) => k % 4 == 0)"
    )
    pixels = np.array(found["lazy"]["images"])[3 * 64 : 4 * 64]
    np.testing.assert_allclose(drawn, np.clip(127.5 * (pixels + 1), 0, 255), atol=1)


def test_new_noise_is_drawn_again_and_follows_the_plan(page: Any, table: Any) -> None:
    page.run("return window.results.then(() => true)")
    before = page.run("return document.querySelector('#dense canvas').toDataURL()")
    computes, largest = page.run(
        "return document.getElementById('noise').onclick().then((found) => [found.lazy.computes, found.largest])"
    )
    assert computes == table["computes"]
    assert 0 < largest < 1
    assert page.run("return document.querySelector('#dense canvas').toDataURL()") != before


def test_node_draws_the_same(site: Path, packages: Path, table: Any, expected: dict[str, Any]) -> None:
    done = subprocess.run(
        ["node", str(WEB / "node.js"), str(site), str(packages)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), expected, table["computes"])
