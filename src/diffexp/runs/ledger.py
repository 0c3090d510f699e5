"""What exploration did, and what it earned: the guidance of each iteration, and the words that were weighted.

That is a line of ``exploration.jsonl`` for every iteration that explored. The choice of words is drawn again, from the
same keyed noise, so that no algorithm has to carry it along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffexp.algorithms.advantages import batch_advantages
from diffexp.exploration import WordChoice, WordWeighting
from diffexp.rollout import Batch, Sampler

DIGITS = 4


def describe(
    batch: Batch, sampler: Sampler, words: WordWeighting | None, rewards: Float[Tensor, " B"] | None = None
) -> dict[str, Any]:
    """The record of one iteration: w(t), and what each word earned.

    ``batch`` is as it was explored. A sample whose reward is NaN was dropped and counts for nothing.
    """
    guidance = guidance_changes(sampler.schedule.timesteps, sampler.scales(batch.guidance))
    if not words or rewards is None:
        return {"guidance": guidance}
    rows = rewards.isfinite().nonzero().flatten().tolist()
    kept = batch.select(rows)
    spelled = sampler.model.spell(kept.prompts, [words.units(found) for found in kept.text.words])
    choice = words.draw(kept.text, kept.generators("words"))
    return {"guidance": guidance, "words": word_columns(choice, spelled, rewards[rows].cpu())}


def guidance_changes(timesteps: Sequence[int], scales: Sequence[float]) -> list[tuple[int, float]]:
    """w(t) as the timesteps from which on, towards the image, it has another value: [(951, 1.0), (851, 7.5)]."""
    pairs = list(zip(timesteps, scales, strict=True))
    return [pair for k, pair in enumerate(pairs) if k == 0 or pair[1] != pairs[k - 1][1]]


def word_columns(
    choice: WordChoice, spelled: Sequence[Sequence[str]], rewards: Float[Tensor, " B"]
) -> dict[str, list[Any]]:
    """What each word earned in one iteration, as columns of equal length. ``spelled`` has each sample's words.

    Of a ``word``: how many samples had it ``weighted``, by how much in the mean (``weight``), and their mean ``reward``
    and ``advantage``, which is the reward in standard deviations of the iteration. ``other`` counts the samples whose
    prompt has the word too, but another one was weighted; ``other_reward`` and ``other_advantage`` are theirs. null
    where there was none.
    """
    rows = samples_by_word(choice.word, spelled)
    names, advantages, weights = sorted(rows), batch_advantages(rewards), torch.tensor(choice.weight)
    return {
        "word": names,
        "weighted": [len(rows[name][0]) for name in names],
        "weight": [mean(weights, rows[name][0]) for name in names],
        "reward": [mean(rewards, rows[name][0]) for name in names],
        "advantage": [mean(advantages, rows[name][0]) for name in names],
        "other": [len(rows[name][1]) for name in names],
        "other_reward": [mean(rewards, rows[name][1]) for name in names],
        "other_advantage": [mean(advantages, rows[name][1]) for name in names],
    }


def samples_by_word(chosen: Sequence[int], spelled: Sequence[Sequence[str]]) -> dict[str, tuple[list[int], list[int]]]:
    """Of each word: the samples in which it was the chosen one, and those which have it, but another was chosen."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for row, (names, index) in enumerate(zip(spelled, chosen, strict=True)):
        for name in dict.fromkeys(names):
            found.setdefault(name, ([], []))[name != names[index]].append(row)
    return found


def mean(values: Tensor, rows: Sequence[int]) -> float | None:
    """The mean of some of the values; None of none."""
    return round(float(values[list(rows)].cpu().double().mean()), DIGITS) if rows else None
