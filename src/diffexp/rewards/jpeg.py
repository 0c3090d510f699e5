"""How well an image compresses as a JPEG: the simplest reward that no prompt describes (DDPO, Black et al. 2023)."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL.Image import Image
from torch import Tensor

from diffexp.images import to_images

QUALITY = 95


class Jpeg:
    """``sign`` times the size, in kilobytes (1,000 bytes), of the image as a JPEG of quality 95, as in ddpo-pytorch."""

    differentiable = False

    def __init__(self, name: str, sign: float) -> None:
        self.name = name
        self.sign = sign

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to scores (B,); the prompts do not matter."""
        # Pillow releases the interpreter's lock while it encodes.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            kilobytes = list(pool.map(_kilobytes, to_images(images)))
        return self.sign * torch.tensor(kilobytes, dtype=torch.float32, device=images.device)


def compressibility(device: torch.device | str) -> Jpeg:
    """The reward ``jpeg-compressibility``: smooth images score higher. Runs on the CPU whatever ``device`` is."""
    return Jpeg("jpeg-compressibility", -1.0)


def incompressibility(device: torch.device | str) -> Jpeg:
    """The reward ``jpeg-incompressibility``: busy images score higher. Runs on the CPU whatever ``device`` is."""
    return Jpeg("jpeg-incompressibility", 1.0)


def _kilobytes(picture: Image) -> float:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000
