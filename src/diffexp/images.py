"""Images as pictures: one by one, in files, on a sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor


def to_images(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1], of any float type, as pictures of 8 bits a channel."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def save_images(pictures: Sequence[Image.Image], folder: Path) -> list[Path]:
    """Writes 0.png, 1.png … into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{k}.png" for k in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    return paths


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """The pictures on one sheet, as square as may be, with a thin white gap."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = (side + 2 for side in pictures[0].size)
    sheet = Image.new("RGB", (columns * width + 2, math.ceil(len(pictures) / columns) * height + 2), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (2 + k % columns * width, 2 + k // columns * height))
    return sheet
