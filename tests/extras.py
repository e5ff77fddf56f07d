"""Fresh environments: `python -m tests.extras [AUDIENCE ...]` (`make check-extras`). Needs the network, minutes and 7 GB each.

For the core and for each quick start of the README: a new virtual environment with the pinned versions, `pip check`, the
import of the core timed in a new process, and the quick start run as written, from the installed package alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .quickstart import quick_starts

ROOT = Path(__file__).resolve().parent.parent

#: Most seconds that `import lazycompress` may take.
IMPORT_LIMIT = 3.0

#: What an installed package is tried with; copied, so that nothing of the checkout is on the path.
TRIED_WITH = ("README.md", "tests/__init__.py", "tests/quickstart.py", "tests/pipelines.py")


def call(command: list[str], cwd: Path) -> str:
    """Standard output of a command.

    Raises:
        RuntimeError: it failed; holds the end of what it said.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


def import_seconds(python: str, cwd: Path) -> float:
    """Processor seconds of a process that imports the core, the second one: bytecode has been written by then."""
    call([python, "-c", "import lazycompress"], cwd)
    before = os.times()
    call([python, "-c", "import lazycompress"], cwd)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def check(extra: str, audience: str | None, folder: Path) -> str:
    """Install one extra into a new environment in `folder` and try it; a line that says how it went."""
    started = time.perf_counter()
    call([sys.executable, "-m", "venv", "env"], folder)
    python = str(folder / "env" / "bin" / "python")
    wanted = f"{ROOT}[{extra}]" if extra else str(ROOT)
    call([python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), wanted], folder)
    call([python, "-m", "pip", "check"], folder)
    installed = time.perf_counter() - started
    seconds = import_seconds(python, folder)
    if seconds > IMPORT_LIMIT:
        raise RuntimeError(f"import lazycompress takes {seconds:.1f} s, more than {IMPORT_LIMIT}")
    line = f"installed in {installed:.0f} s, core imported in {seconds:.1f} s"
    if audience is None:
        return line
    tried = folder / "tried"
    for name in TRIED_WITH:
        (tried / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tried / name)
    started = time.perf_counter()
    # From a folder that has `tests` but not the package: what is imported is what was installed.
    call([python, "-m", "tests.quickstart", audience], tried)
    return f"{line}, quick start ran in {time.perf_counter() - started:.0f} s"


def main() -> None:
    """Check the core and every quick start, or those that are named."""
    starts = quick_starts()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audience", nargs="*", help=f"core, or any of {', '.join(starts)} (default: all)")
    chosen = parser.parse_args().audience or ["core", *starts]
    unknown = [name for name in chosen if name not in ("core", *starts)]
    if unknown:
        parser.error(f"there is no {unknown[0]!r}; there are core, {', '.join(starts)}")
    failed = False
    for name in chosen:
        extra = "" if name == "core" else starts[name].extra
        with tempfile.TemporaryDirectory() as folder:
            try:
                line = check(extra, None if name == "core" else name, Path(folder))
            except RuntimeError as error:
                failed, line = True, f"FAILS\n{error}"
        print(f"{name} [{extra}]: {line}", flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
