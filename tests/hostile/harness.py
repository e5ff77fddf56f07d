"""Tries: input that cannot be right, or only looks wrong, and what has to be said of it.

A try is one line of a table: a name, what is done, and a regular expression for the one line that must come of it. Modules of
this folder keep their tries in a list `TRIES`; `test_tries.py` runs each as a test, and `python -m tests.hostile` all of them
as a page.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import pkgutil
import random
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import lazycompress.integrations.diffusers  # noqa: F401 - what its first import changes is not a try's
import tests.hostile
from lazycompress.errors import LazyCompressError

#: Longest message that still reads as one line.
LONGEST = 500

Verdict = Literal["one line", "accepted", "wrong line", "refused", "silent", "traceback", "left changed"]

#: What is wanted of a try; all else fails.
GOOD: tuple[Verdict, ...] = ("one line", "accepted")


@dataclass(frozen=True)
class Try:
    """One try.

    Attributes:
        name: what is tried, its group before the colon: "recipe: duplicate keys".
        act: does it, in an empty folder of its own.
        says: found, as a regular expression, in the one line of the `LazyCompressError` that must come; None: none may.
    """

    name: str
    act: Callable[[Path], object]
    says: str | None

    @property
    def group(self) -> str:
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Outcome:
    """What came of a try: the verdict, and the message or the traceback that goes with it."""

    verdict: Verdict
    text: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in GOOD


class CommandError(LazyCompressError):
    """A command ended with an exit code other than 0; the message is what it wrote to stderr."""


def command(*arguments: str | Path) -> str:
    """What a command of the command line prints.

    Raises:
        CommandError: it failed with a line (exit code 1), or because of wrong usage (exit code 2: the last line).
    """
    from lazycompress.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as left:
            said = err.getvalue().strip()
            if left.code == 1:
                raise CommandError(said.removeprefix("lazycompress: ")) from None
            if left.code:
                raise CommandError(said.splitlines()[-1]) from None
    return out.getvalue()


def attempt(tried: Try, folder: Path) -> Outcome:
    """Run a try in an empty folder and judge what comes of it."""
    before = _surroundings()
    try:
        tried.act(folder)
    except LazyCompressError as error:
        outcome = _judged(tried.says, str(error))
    except Exception:
        outcome = Outcome("traceback", traceback.format_exc())
    else:
        outcome = Outcome("accepted") if tried.says is None else Outcome("silent", f"nothing said {tried.says!r}")
    after = _surroundings()
    changed = [name for name, value in before.items() if after[name] != value]
    _put_back(before)
    return Outcome("left changed", ", ".join(changed)) if outcome.good and changed else outcome


def _judged(says: str | None, message: str) -> Outcome:
    if says is None:
        return Outcome("refused", message)
    one = "\n" not in message and 0 < len(message) <= LONGEST
    return Outcome("one line" if one and re.search(says, message) else "wrong line", message)


def _surroundings() -> dict[str, Any]:
    """What belongs to the caller and must be left as it is."""
    loggers = [logging.root, *(logging.getLogger(name) for name in ("lazycompress", "torch", "diffusers"))]
    return {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "generators of GPUs": [torch.cuda.get_rng_state(k).numpy().tobytes() for k in range(torch.cuda.device_count())],
        "numpy's generator": repr(np.random.get_state()),  # noqa: NPY002 - the global one is what is looked at
        "python's generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "logging": [(logger.level, logger.disabled) for logger in loggers] + [logging.root.manager.disable],
        "working folder": os.getcwd(),
    }


def _put_back(before: dict[str, Any]) -> None:
    """Undo what a try must not have changed, so that one failure stays one."""
    torch.set_rng_state(torch.frombuffer(bytearray(before["torch's generator"]), dtype=torch.uint8))
    random.setstate(before["python's generator"])
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad mode"])
    logging.disable(before["logging"][-1])
    os.chdir(before["working folder"])


def all_tries() -> list[Try]:
    """The tries of every module of this folder, in the order of modules and of their tables.

    Raises:
        ValueError: two have the same name.
    """
    modules = [importlib.import_module(name) for name in _modules()]
    found: list[Try] = [tried for module in modules for tried in getattr(module, "TRIES", ())]
    names = [tried.name for tried in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tries of the same name: {', '.join(twice)}")
    return found


def _modules() -> Iterator[str]:
    for module in pkgutil.iter_modules(tests.hostile.__path__, "tests.hostile."):
        if not module.name.endswith((".test_tries", ".__main__", ".harness")):
            yield module.name


def raises(kind: type[BaseException], act: Callable[[], object]) -> Callable[[Path], object]:
    """A try's act in which the caller's own exception must come through."""

    def checked(_: Path) -> None:
        try:
            act()
        except kind:
            return
        raise AssertionError(f"no {kind.__name__} came through")

    return checked


def page(outcomes: Sequence[tuple[Try, Outcome]]) -> str:
    """`docs/robustness.md`: what is tried, and how often each group was met how."""
    groups = list(dict.fromkeys(tried.group for tried, _ in outcomes))
    columns: dict[str, tuple[Verdict, ...]] = {
        "one line": ("one line",),
        "accepted rightly": ("accepted",),
        "another line": ("wrong line", "refused"),
        "tracebacks": ("traceback",),
        "silent": ("silent",),
        "left something changed": ("left changed",),
    }

    def row(name: str, verdicts: list[Verdict]) -> str:
        counts = [sum(verdict in wanted for verdict in verdicts) for wanted in columns.values()]
        return f"| {name} | {len(verdicts)} | {' | '.join(map(str, counts))} |"

    table = [f"| group | tries | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    table += [row(group, [o.verdict for tried, o in outcomes if tried.group == group]) for group in groups]
    table += [row("all", [o.verdict for _, o in outcomes])]
    return f"{_HEAD}\n{chr(10).join(table)}\n{_TAIL}"


_HEAD = """# Robustness

Generated by `python -m tests.hostile --write docs/robustness.md`.

Input that cannot be right gets one clear line: a `LazyCompressError` that says what is wrong, where, what there was, and what
to do; on the command line exit code 1 and that line on stderr. Input that only looks wrong is accepted. `tests/hostile` holds
a table of both. Each try runs in an empty folder, and the caller's generators of random numbers, default dtype, grad mode,
logging and working folder must be afterwards what they were before.
"""

_TAIL = f"""
- one line: refused with at most {LONGEST} characters, without a line break, that say what the table demands.
- accepted rightly: unusual but right, and taken.
- another line, tracebacks, silent, left something changed: failures. Silent is what was accepted and cannot be right.

Whose exception it is: what a user's own sampler or model raises comes as one line that says who raised it and in which call, with
the exception itself, traceback included, as its `__cause__`; `KeyboardInterrupt` and the like pass through as they are.

A new try is one line in a list `TRIES` of any module of `tests/hostile`:

    Try("recipe: a key twice", lambda folder: load(folder, "target: 0.5\\ntarget: 0.9"), says="line 2: .*'target' twice"),

Besides the table, hypothesis makes up recipes, samplers and orders of calls there; the tests say what must hold of them.
"""
