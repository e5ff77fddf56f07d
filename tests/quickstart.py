"""The README's quick starts, run as written: `python -m tests.quickstart AUDIENCE` in an empty folder.

A quick start is a section under "## Quick start" of the README; its blocks of shell and Python run in their order, each in
a process of its own, in a folder where the model that they speak of lies. Blocks that install are left to the caller.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"

_SECTION = re.compile(r"^### (.+)$", re.MULTILINE)
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INSTALL = re.compile(r"pip install lazycompress\[([\w,]+)\]")

#: The part of `my_model.py` that the README leaves to its reader.
_MY_MODEL = '''
import torch
from torch import nn


class Block(nn.Module):
    """Self-attention and an MLP, both modulated by the timestep."""

    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, condition):
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        q, k, v = self.qkv(self.norms[0](x) * (1 + scale) + shift).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + gate * self.out(heads.transpose(1, 2).flatten(2))
        return x + gate2 * self.down(nn.functional.gelu(self.up(self.norms[1](x) * (1 + scale2) + shift2)))


class Denoiser(nn.Module):
    def __init__(self, channels=4, width=16, depth=3):
        super().__init__()
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x, timestep):
        condition = self.time(timestep.unsqueeze(1))
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, condition)
        return (self.leave(x),)


torch.manual_seed(0)
model = Denoiser().eval()
'''


@dataclass(frozen=True)
class QuickStart:
    """One section: the extra that it installs, and its blocks as (language, code), the installing one left out."""

    audience: str
    extra: str
    blocks: list[tuple[str, str]]


def quick_starts(text: str | None = None) -> dict[str, QuickStart]:
    """The README's quick starts by audience."""
    text = text if text is not None else README.read_text(encoding="utf-8")
    chapter = text.split("\n## Quick start\n", 1)[1].split("\n## ", 1)[0]
    _, *parts = _SECTION.split(chapter)
    found = {}
    for audience, body in zip(parts[::2], parts[1::2], strict=True):
        blocks = _BLOCK.findall(body)
        installs = [match for _, code in blocks if (match := _INSTALL.search(code))]
        if len(installs) != 1:
            raise ValueError(f"README, {audience}: one block must install an extra, there were {len(installs)}")
        kept = [(language, code) for language, code in blocks if not _INSTALL.search(code)]
        found[audience] = QuickStart(audience, installs[0].group(1), kept)
    return found


def prepare(start: QuickStart, folder: Path) -> None:
    """Put the models that the blocks speak of into `folder`: tiny, with random weights."""
    code = "".join(code for _, code in start.blocks)
    if "my_sd3/" in code:
        from .pipelines import PIPELINES

        PIPELINES["sd3"].make().save_pretrained(folder / "my_sd3")
    if "my_dit/" in code:
        from .pipelines import PIPELINES

        PIPELINES["dit"].make().save_pretrained(folder / "my_dit")
    if "from my_model import" in code:
        sampler = next(code for _, code in start.blocks if code.startswith("def sampler("))
        (folder / "my_model.py").write_text(f"{_MY_MODEL}\n\n{sampler}", encoding="utf-8")


def run(start: QuickStart, folder: Path) -> str:
    """Run every block in `folder`; what they printed.

    Raises:
        RuntimeError: a block failed; says which, and its last lines.
    """
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}", "HF_HUB_OFFLINE": "1"}
    printed = []
    for language, code in start.blocks:
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"README, {start.audience}: this block fails:\n{code}\n{done.stderr[-3000:]}")
        printed.append(done.stdout)
    return "".join(printed)


def main() -> None:
    """Prepare the current folder and run one quick start in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audience", choices=list(quick_starts()))
    start = quick_starts()[parser.parse_args().audience]
    prepare(start, Path.cwd())
    print(run(start, Path.cwd()))


if __name__ == "__main__":
    main()
