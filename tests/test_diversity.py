"""Diversity of features whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffexp.diversity import pairwise_diversity


@pytest.mark.parametrize("n", [2, 5, 16])
def test_identical_and_orthogonal_images(n: int):
    identical = np.tile([[3.0, -4.0, 1.0]], (n, 1))
    orthogonal = 7 * np.eye(n)
    assert pairwise_diversity(identical) == pytest.approx(0)
    assert pairwise_diversity(orthogonal) == pytest.approx(1)


def test_two_images_at_sixty_degrees():
    features = [[1, 0], [0.5, math.sqrt(3) / 2]]
    assert pairwise_diversity(features) == pytest.approx(0.5)


def test_one_image():
    with pytest.raises(ValueError, match="at least two"):
        pairwise_diversity([[2.0, 1.0]])


@pytest.mark.parametrize("features", [[1.0, 2.0], np.zeros((0, 3)), [[0.0, 0.0], [1.0, 0.0]], [[math.nan, 1.0]]])
def test_features_that_have_no_diversity(features):
    with pytest.raises(ValueError, match=r"features"):
        pairwise_diversity(features)
