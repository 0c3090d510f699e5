"""DiffExp: how online samples are made diverse while a model is fine-tuned on a reward.

Chae, Choi, Kim, Lee: "DiffExp: Efficient Exploration in Reward Fine-tuning for Text-to-Image Diffusion Models",
AAAI 2025, arXiv:2502.14070. Two strategies, both for the rollout only and never for evaluation: a classifier-free
guidance scale that is low in the early denoising steps (Eq. 7), and one random word of the prompt made stronger
(Eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from diffexp.text import TextEmbedding, Words

GuidanceSchedule = Callable[[int], float]
"""w(t): the scale of classifier-free guidance at timestep t, which counts from 1000 (noise) down to 0 (image)."""


@dataclass(frozen=True)
class ConstantGuidance:
    """The same scale at every timestep: ordinary sampling, evaluation, and the baselines."""

    scale: float

    def __call__(self, t: int) -> float:
        return self.scale


@dataclass(frozen=True)
class StepGuidance:
    """Eq. 7: w(t) = w_l if t > t_thres, else w_h.

    ``low`` is w_l ("an extremely low value"; 1.0 is the plain conditional prediction, 0.0 the unconditional one),
    ``high`` is w_h, ``threshold`` is t_thres in 0...1000 (the paper's best: 900).
    """

    low: float
    high: float
    threshold: float = 900

    def __call__(self, t: int) -> float:
        return self.low if t > self.threshold else self.high

    @classmethod
    def over_first(cls, fraction: float, timesteps: Sequence[int], low: float, high: float) -> StepGuidance:
        """The schedule whose low scale covers the first ``fraction`` (0...1) of the sampler's steps, rounded.

        At 20 steps t > 900 is only two steps; a fraction says the same at every number of steps.
        """
        low_steps = round(fraction * len(timesteps))
        return cls(low, high, threshold=-1 if low_steps >= len(timesteps) else timesteps[low_steps])


class WordChoice(NamedTuple):
    """Which word was weighted in each sample, and by how much."""

    word: list[int]  # index of the word in its prompt
    weight: list[float]  # w_prompt


@dataclass(frozen=True)
class WordWeighting:
    """Eq. 8: c[i] ← c_null + w_prompt · (c[i] − c_null) for one random word i, with w_prompt ~ U(low, high).

    The paper says "word (i.e. token)". A word that the tokenizer splits is weighted as a whole, in all of its tokens
    (``unit = "word"``), or each token counts as a word of its own (``unit = "token"``).
    """

    low: float = 1.0
    high: float = 1.2
    unit: str = "word"

    def draw(self, text: TextEmbedding, generators: Sequence[Generator]) -> WordChoice:
        """One word and one weight for each sample, from that sample's own generator."""
        choice = WordChoice([], [])
        for words, generator in zip(text.words, generators, strict=True):
            count = len(self.units(words))
            choice.word.append(int(torch.randint(max(count, 1), (), generator=generator)))
            choice.weight.append(self.low + (self.high - self.low) * float(torch.rand((), generator=generator)))
        return choice

    def apply(self, text: TextEmbedding, choice: WordChoice) -> TextEmbedding:
        """The text with each sample's chosen word weighted. A prompt without words stays as it is."""
        weights = torch.ones(text.hidden.shape[:2], device=text.hidden.device)
        for row, (words, word, weight) in enumerate(zip(text.words, *choice, strict=True)):
            if units := self.units(words):
                weights[row, list(units[word])] = weight
        return weighted(text, weights)

    def units(self, words: Words) -> Words:
        """What can be chosen in a prompt: its words, or the tokens of its words."""
        return words if self.unit == "word" else [(position,) for word in words for position in word]


def weighted(text: TextEmbedding, weights: Float[Tensor, "B L"]) -> TextEmbedding:
    """Eq. 8 with a weight w_prompt for each token: c_null + w_prompt (c − c_null), and exactly c where the weight is 1.

    The weights are recorded in the result, so that a text encoder which learns can embed the same prompts anew.
    """
    c, c_null, w_prompt = text.hidden, text.null_hidden, weights[..., None]
    return text._replace(hidden=torch.where(w_prompt == 1, c, c_null + w_prompt * (c - c_null)), weights=weights)


@dataclass(frozen=True)
class Exploration:
    """Both strategies, either or none, active in the first part of training.

    ``until`` is the fraction of all iterations after which sampling is ordinary again (the paper: three fourths).
    ``strategy``, which comes last, is one of your own: from a ``diffexp.rollout.Batch`` to the one sampled instead.
    """

    guidance: GuidanceSchedule | None = None
    words: WordWeighting | None = None
    until: float = 0.75
    strategy: Callable[[Any], Any] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing explores."""
        return not (self.guidance or self.words or self.strategy)

    def active(self, iteration: int, iterations: int) -> bool:
        """Whether the given iteration (counted from 1) of a run of ``iterations`` explores."""
        return not self.empty and iteration <= last_iteration(self.until, iterations)


def last_iteration(until: float, iterations: int) -> int:
    """The last iteration (counted from 1) in the fraction ``until`` (0...1) of ``iterations``; 0 where it has none."""
    return math.floor(round(until * iterations, 6))  # 0.29 * 100 is 28.999999999999996
