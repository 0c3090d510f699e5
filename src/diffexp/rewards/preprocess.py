"""The one way images reach a reward model: resized, cropped and normalised in torch, so that gradients pass.

The same code serves scoring and gradients. It follows what CLIP's processors do with Pillow: antialiased bicubic
resizing of the short side, a centre crop, and normalisation; only Pillow's rounding to 8 bits is left out.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Fit = Literal["crop", "pad"]


def preprocess(images: Tensor, size: int = 224, fit: Fit = "crop") -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to a CLIP-like model's pixels (B, 3, size, size), float32.

    ``fit="crop"`` resizes the short side to ``size`` and crops the middle (CLIP, BLIP); ``fit="pad"`` resizes the long
    side and pads with black (HPSv2). For square images they differ only in that HPSv2 does not saturate overshoot.
    """
    images = images.float()
    height, width = images.shape[-2:]
    if fit == "crop":
        # CLIP's processor truncates the long side's length.
        scale = size / min(height, width)
        target = tuple(size if length == min(height, width) else int(length * scale) for length in (height, width))
        return normalise(_crop(_resize_as_pillow(images, target), size))
    scale = size / max(height, width)
    return normalise(_pad(resize(images, (round(height * scale), round(width * scale))), size))


def normalise(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] to zero mean and unit variance by CLIP's statistics."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def _resize_as_pillow(images: Tensor, target: tuple[int, ...]) -> Tensor:
    # Bicubic weights overshoot at edges. Pillow resizes the width, then the height, and saturates after each.
    wide = resize(images, (images.shape[-2], target[1])).clamp(0, 1)
    return resize(wide, target).clamp(0, 1)


def resize(images: Tensor, target: tuple[int, ...]) -> Tensor:
    """Images (B, 3, H, W), float32, in another height and width: antialiased bicubic.

    As two products with the weights of torch's own ``interpolate``, whose backward pass MPS lacks and CUDA does in an
    order, and so with a rounding, that differs from run to run.
    """
    down, across = (
        _weights(length, wanted).to(images.device) for length, wanted in zip(images.shape[-2:], target, strict=True)
    )
    return down @ images @ across.T


@cache
def _weights(length: int, target: int) -> Tensor:
    """What each of ``length`` pixels in a row adds to each of ``target`` pixels: (target, length)."""
    pixels = torch.eye(length)[None, None]
    return functional.interpolate(pixels, (target, length), mode="bicubic", antialias=True)[0, 0]


def _crop(images: Tensor, size: int) -> Tensor:
    top, left = ((length - size) // 2 for length in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def _pad(images: Tensor, size: int) -> Tensor:
    height, width = (size - length for length in images.shape[-2:])
    return functional.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))
