"""The algorithms that DiffExp explores for."""

from diffexp.algorithms.alignprop import AlignProp
from diffexp.algorithms.base import Algorithm
from diffexp.algorithms.ddpo import DDPO

__all__ = ["DDPO", "Algorithm", "AlignProp"]
