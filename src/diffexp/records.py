"""The files of a run folder that grow or are looked at while it trains."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

CONFIG, METRICS, EVALUATIONS = "config.toml", "metrics.jsonl", "evaluations.jsonl"
EXPLORATION, ENVIRONMENT = "exploration.jsonl", "environment.json"
PROMPTS, SETS = "prompts.json", "sets.json"  # of the previews: each one's prompt, and the prompt set that it is from


class JsonLines:
    """A file of one JSON object a line. Lines are appended whole; ``cut`` takes back what a checkpoint doesn't know."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")

    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size

    def cut(self, size: int) -> None:
        """Drops everything after the first ``size`` bytes."""
        with self.path.open("r+b") as file:
            file.truncate(size)


def to_images(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1] as pictures of 8 bits a channel."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
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
