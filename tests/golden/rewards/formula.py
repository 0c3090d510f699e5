"""Weights, images and tokens from a formula: the references and our tests build the same tiny models without files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) that look random and depend on the name and the index only; float32."""
    index = np.arange(int(np.prod(shape)), dtype=np.uint64)
    bits = index * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(name.encode()))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    return ((bits >> np.uint64(40)).astype(np.float64) / 2**23 - 1).astype(np.float32).reshape(shape)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict: matrices scaled to keep activations of order one, norms near the identity."""
    state = {}
    for name, shape in shapes.items():
        values = noise(name, shape)
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        is_norm = len(shape) == 1 and name.endswith("weight")
        state[name] = (1 + 0.2 * values) if is_norm else (values * (1.7 / fan_in**0.5 if len(shape) > 1 else 0.3))
    return {name: np.asarray(values, dtype=np.float32).reshape(shapes[name]) for name, values in state.items()}


def image(name: str, height: int, width: int) -> np.ndarray:
    """A smooth image with some noise, (height, width, 3), uint8."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    wide, high, phase = (4 * noise(f"{name}/{part}", (3,)) for part in ("wide", "high", "phase"))
    waves = [0.5 + 0.4 * np.sin(6 * wide[c] * x + 4 * high[c] * y + phase[c]) for c in range(3)]
    return np.clip((np.stack(waves, -1) + 0.1 * noise(name, (height, width, 3))) * 255, 0, 255).astype(np.uint8)
