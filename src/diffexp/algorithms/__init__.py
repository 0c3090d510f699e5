"""The algorithms that DiffExp explores for."""

from diffexp.algorithms.alignprop import AlignProp
from diffexp.algorithms.base import Algorithm, Outcome
from diffexp.algorithms.ddpo import DDPO
from diffexp.algorithms.refl import ReFL
from diffexp.algorithms.rwr import RewardWeightedRegression

__all__ = ["DDPO", "Algorithm", "AlignProp", "Outcome", "ReFL", "RewardWeightedRegression"]
