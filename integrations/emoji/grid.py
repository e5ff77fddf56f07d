"""Many small pictures as one file."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def save_grid(images: torch.Tensor, path: Path, columns: int = 8, zoom: int = 4) -> None:
    """Writes uint8 ``[N, 3, H, W]`` as one picture, row by row."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.full((3, rows * height, columns * width), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        y, x = divmod(index, columns)
        sheet[:, y * height : (y + 1) * height, x * width : (x + 1) * width] = image
    picture = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
