"""Kills save, export and learning at random moments: a place then holds what it held before, or what was written; never half
of it, and never nothing. The next that writes there cleans up what a killed one left.

    python -m tests.kills
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import lazycompress
from lazycompress.cli import main as command
from lazycompress.errors import LazyCompressError
from lazycompress.files import read_json, sha256_of
from lazycompress.integrations.digits.model import WEIGHTS_DIR
from lazycompress.places import EXPORT, GATES, Kind
from lazycompress.runtime import LazyModel

from .export_models import small_lazy

_LEARN = (
    "--recipe",
    "digits_dit.yaml",
    "--set",
    "train.effort=0.01",
    "--set",
    "sampling.steps=4",
    "--set",
    "sampling.batch=2",
)


@dataclass(frozen=True)
class Job:
    """Something that writes a folder, again and again with other contents, until it is killed."""

    name: str
    kind: Kind
    write: Callable[[Path, int], object]
    kills: int


def jobs(save: int, export: int, learn: int) -> list[Job]:
    """The three of them, with so many kills each."""
    lazies = [small_lazy(), small_lazy(spread=0.0)]

    def lazy(number: int) -> LazyModel:
        return lazies[number % 2]

    return [
        Job("save", GATES, lambda place, k: lazycompress.save(lazy(k), place), save),
        Job("export", EXPORT, lambda place, k: lazycompress.export(lazy(k), place, "onnx", overwrite=True), export),
        Job("learning", GATES, _learn, learn),
    ]


def _learn(place: Path, number: int) -> None:
    command(
        [
            "apply",
            "--model",
            str(WEIGHTS_DIR),
            *_LEARN,
            "--set",
            f"train.seed={number}",
            "--json",
            "--overwrite",
            str(place),
        ]
    )


def run(job: Job, folder: Path, chance: random.Random) -> dict[str, int]:
    """Kill a job as often as it says; counts of what was found: "whole", "half", "none", "left"."""
    place = folder / "out"
    started = time.monotonic()
    _wait(_child(job, place, once=True))
    duration = time.monotonic() - started
    found = {"whole": 0, "half": 0, "none": 0, "left": 0}
    for _ in range(job.kills):
        child = _child(job, place)
        time.sleep(chance.uniform(0.0, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        _wait(child)
        found[_state(place, job.kind)] += 1
    _wait(_child(job, place, once=True))
    found[_state(place, job.kind)] += 0
    found["left"] += sum(path != place for path in folder.iterdir())
    return found


def _child(job: Job, place: Path, once: bool = False) -> int:
    """A process that writes the place once, or for ever."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            number = 0
            while not number or not once:
                job.write(place, number)
                number += 1
        code = 0
    finally:
        os._exit(code)


def _wait(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a job failed by itself")


def _state(place: Path, kind: Kind) -> str:
    """Whether all files that the marker lists are there as they were written."""
    if not place.exists():
        return "none"
    try:
        marker = next((name for name in (kind.marker, kind.other) if name and (place / name).exists()), kind.marker)
        files = read_json(place / marker)["files"]
        whole = all(sha256_of(place / name) == entry["sha256"] for name, entry in files.items())
        there = {path.name for path in place.iterdir()} == {marker, *(name.split("/")[0] for name in files)}
    except (LazyCompressError, OSError, KeyError):
        return "half"
    return "whole" if whole and there else "half"


def main() -> None:
    """Kill, count, print; exit code 1 if anything was lost or left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=int, default=30, help="kills of save (default: 30)")
    parser.add_argument("--export", type=int, default=10, help="kills of export (default: 10)")
    parser.add_argument("--learn", type=int, default=10, help="kills of learning on the command line (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    total = {"whole": 0, "half": 0, "none": 0, "left": 0}
    for job in jobs(options.save, options.export, options.learn):
        if not job.kills:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = run(job, Path(folder), chance)
        print(f"{job.name}: {json.dumps(found)}", flush=True)
        total = {name: count + found[name] for name, count in total.items()}
    kills = options.save + options.export + options.learn
    print(
        f"{kills} kills: {total['whole']} times old or new, {total['half']} half, {total['none']} none; "
        f"{total['left']} leftovers after the next start"
    )
    sys.exit(0 if total["whole"] == kills and not total["left"] else 1)


if __name__ == "__main__":
    main()
