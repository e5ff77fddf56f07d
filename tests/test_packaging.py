"""The wheel: what is in it; and the package without its extras: what it says."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, so that nothing is left in the working tree."""
    import shutil

    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("lazycompress", "integrations", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(out),
        ".",
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_the_shim_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lazycompress", "optimum"}
    assert [name for name in names if name.startswith("optimum/")] == [
        "optimum/commands/register/register_lazycompress.py"
    ]
    in_wheel = {name for name in names if name.startswith("lazycompress/")}
    expected = set()
    for folder, target in (
        ("lazycompress", "lazycompress"), ("integrations/diffusers", "lazycompress/integrations/diffusers"),
        ("integrations/digits", "lazycompress/integrations/digits"),
        ("integrations/emoji", "lazycompress/integrations/emoji"), ("recipes", "lazycompress/recipes"),
    ):  # fmt: skip
        expected |= {
            f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
    assert in_wheel == expected | {"lazycompress/integrations/__init__.py"}


@pytest.mark.slow(seconds=12)
def test_an_installed_wheel_runs_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import lazycompress, lazycompress.integrations.digits.model as m; "
        "from lazycompress.recipe_loading import shipped_recipes; "
        "print(lazycompress.__file__, len(shipped_recipes()), type(m.load_bundled()).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path, recipes, model = done.stdout.split()
    assert path.startswith(str(tmp_path))
    assert int(recipes) >= 2
    assert model == "DiTTransformer2DModel"


def without(packages: list[str], code: str) -> str:
    """Standard output of `code` in an interpreter where `packages` cannot be imported."""
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in packages)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {blocked}\n{code}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


EXTRAS = ["diffusers", "transformers", "accelerate", "matplotlib", "openvino", "nncf", "onnx", "onnxruntime",
          "onnxscript", "optimum", "sklearn", "scipy"]  # fmt: skip


def test_the_core_imports_without_extras() -> None:
    code = "from lazycompress import Recipe, LazyModel, apply, locate, load, save, export; print('yes')"
    assert without(EXTRAS, code) == "yes"


def test_importing_the_package_imports_no_extra() -> None:
    """What takes long to import is imported when it is used; torch alone is always."""
    assert without([], f"import lazycompress; print([name for name in {EXTRAS} if name in sys.modules])") == "[]"


#: What is done, and the package and extra that it needs.
NEEDS = [
    ("from lazycompress.integrations.diffusers import load_denoiser", "diffusers", "train"),
    ("import lazycompress; lazycompress.apply(object())", "diffusers", "train"),
    ("import lazycompress.export.openvino", "openvino", "openvino"),
    ("import lazycompress.export.openvino_runner", "openvino", "openvino"),
    ("import lazycompress.export.onnx", "onnx", "onnx"),
    ("import lazycompress.export.onnx_runner", "onnxruntime", "onnx"),
    ("import lazycompress.export.executorch", "executorch", "executorch"),
]


def test_a_missing_extra_is_one_line_that_names_it() -> None:
    """Each package is missing for its own line only, all in one interpreter: importing torch is what takes long."""
    code = f"""
from lazycompress import MissingExtraError
for act, package, _ in {NEEDS!r}:
    sys.modules[package] = None
    try:
        exec(act)
    except MissingExtraError as error:
        print(error)
    del sys.modules[package]
"""
    said = without([], code).splitlines()
    assert len(said) == len(NEEDS)
    for line, (act, _, extra) in zip(said, NEEDS, strict=True):
        assert f"lazycompress[{extra}]" in line, act
