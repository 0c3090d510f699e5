"""How different the images of one prompt are. Only comparable at equal reward and an equal number of images.

Features are (n, d): one row an image, from an encoder that is not the reward's. Pure numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pairwise_diversity(features: ArrayLike) -> float:
    """1 − the mean cosine similarity over the n(n−1)/2 pairs of rows of ``features`` (n, d): 0 (all alike) ... 2.

    Raises:
        ValueError: if ``features`` is not (n, d) with n ≥ 2, or a row is zero or not finite.
    """
    similarity = _cosines(features)
    if len(similarity) < 2:
        raise ValueError("pairwise diversity needs at least two images")
    return float(1 - similarity[np.triu_indices(len(similarity), k=1)].mean())


def mean_diversity(features: ArrayLike, images: int) -> float | None:
    """The mean over prompts of the pairwise diversity of their ``images`` images, which stand together in ``features``.

    With one image a prompt: the pairwise diversity of the whole set. None for a single image.
    """
    rows = np.asarray(features, dtype=float)
    if len(rows) < 2:
        return None
    groups = np.split(rows, len(rows) // images) if images > 1 else [rows]
    return float(np.mean([pairwise_diversity(group) for group in groups]))


def _cosines(features: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(features, dtype=float)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"features have the shape {rows.shape}, not (n, d) with n at least 1")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.all(np.isfinite(norms)) or not np.all(norms > 0):
        raise ValueError("a row of the features is zero or not finite")
    unit = rows / norms
    return unit @ unit.T
