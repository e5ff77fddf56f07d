"""The pictures: Noto Emoji at 64x64 pixels with their names, from an npm package, brought to 32x32 on white."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lazycompress.errors import LazyCompressError

from .prompts import choose_held_out, is_held_out, to_prompt

IMAGE_SIZE = 32
PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
_PICTURES_FILE = f"pictures-{IMAGE_SIZE}.pt"
_TONED_WEIGHT = 0.3  # half of the pictures repeat another in five skin tones

# Names older than emoji say "black" for filled and "white" for outlined; most of these pictures are neither.
_RED_HEART = "2764-FE0F"
_LAST_OLD_CODE = 0x3000


class EmojiDataError(LazyCompressError):
    """The pictures are not there and cannot be had."""


class Pictures(NamedTuple):
    """Pictures and their prompts, row by row."""

    images: torch.Tensor
    """uint8 ``[N, 3, 32, 32]``, on white."""
    prompts: list[str]
    weights: torch.Tensor
    """float32 ``[N]``: how often to draw each row, relative to the others."""

    def select(self, rows: Sequence[int]) -> Pictures:
        """These rows only."""
        return Pictures(self.images[list(rows)], [self.prompts[row] for row in rows], self.weights[list(rows)])


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 ``0..255`` -> float32 ``-1..1``."""
    return images.to(torch.float32) / 127.5 - 1


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """float ``-1..1``, clamped -> uint8 ``0..255``."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fetch_package(directory: Path) -> Path:
    """The package's archive in ``directory``; npm gets it, by name and version, if it is not there yet.

    Raises:
        EmojiDataError: npm is missing or fails.
    """
    archive = directory / f"{PACKAGE}-{VERSION}.tgz"
    if not archive.exists():
        directory.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent"]
        try:
            subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise EmojiDataError(f"npm is needed to fetch {PACKAGE} {VERSION}; install Node.js.") from None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise EmojiDataError(f"`{' '.join(command)}` failed in {directory}: {reason}") from None
    return archive


def _on_white(file: bytes) -> tuple[np.ndarray, float]:
    """A picture ``[32, 32, 3]`` on white, and the mean brightness (0..255) of what is not transparent in it."""
    picture = Image.open(io.BytesIO(file)).convert("RGBA")
    pixels = np.asarray(picture, dtype=np.float64)
    alpha = pixels[..., 3]
    brightness = float((pixels[..., :3].mean(-1) * alpha).sum() / max(alpha.sum(), 1.0))
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    small = Image.alpha_composite(white, picture).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(small), brightness


def _name(entry: dict[str, Any], brightness: float) -> str:
    if entry["unified"] == _RED_HEART:
        return "red heart"
    words = entry["name"].lower().replace("-", " ").split()
    if "ideograph" in words:
        return f"{entry['short_name']} button"
    if int(entry["unified"].split("-")[0], 16) < _LAST_OLD_CODE or "backhand" in words:
        wrong = {"heavy", *(["black"] if brightness > 90 else []), *(["white"] if brightness < 190 else [])}
        words = [word for word in words if word not in wrong]
    return " ".join(words)


def _entries(archive: Path) -> Iterator[tuple[str, np.ndarray, float]]:
    with tarfile.open(archive) as package:
        files = {member.name: package.extractfile(member).read() for member in package  # type: ignore[union-attr]
                 if member.name == "package/emoji.json" or member.name.startswith("package/img/google/64/")}  # fmt: skip
    for entry in json.loads(files["package/emoji.json"]):
        if entry["category"] == "Component" or not entry["has_img_google"]:
            continue
        image, brightness = _on_white(files[f"package/img/google/64/{entry['image']}"])
        name = _name(entry, brightness)
        yield to_prompt(name), image, 1.0
        for tones, variant in entry.get("skin_variations", {}).items():
            if variant["has_img_google"]:
                toned, _ = _on_white(files[f"package/img/google/64/{variant['image']}"])
                yield to_prompt(name, tones.split("-")), toned, _TONED_WEIGHT


def load_pictures(directory: Path) -> Pictures:
    """All pictures, in the package's order; what is made of them is kept in ``directory``.

    Raises:
        EmojiDataError: the package cannot be had.
    """
    stored = directory / _PICTURES_FILE
    if not stored.exists():
        prompts, images, weights = zip(*_entries(fetch_package(directory)), strict=True)
        tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        partial = stored.with_suffix(".partial")
        torch.save({"images": tensor, "prompts": list(prompts), "weights": torch.tensor(weights)}, partial)
        partial.replace(stored)
    state = torch.load(stored, weights_only=True)
    return Pictures(state["images"], state["prompts"], state["weights"])


def split(pictures: Pictures) -> tuple[Pictures, Pictures]:
    """The pictures to train on, and those whose combination of words is held out."""
    held_out = choose_held_out(pictures.prompts)
    outside = [is_held_out(prompt, held_out) for prompt in pictures.prompts]
    return (
        pictures.select([row for row, out in enumerate(outside) if not out]),
        pictures.select([row for row, out in enumerate(outside) if out]),
    )
