"""Which words were weighted, and what they earned, out of the records of exploration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffexp.report.sources import Material
from diffexp.study.comparison import Arm
from diffexp.study.comparison_report import decimals

SHOWN = 12
"""The most words that are shown at once."""

COLUMNS = {"word", "weighted", "reward", "advantage", "other", "other_reward", "other_advantage"}
"""What a record of words has to have."""

NORMAL = 1.96
"""Half of the width of a 95 % interval, in standard errors."""


@dataclass
class Earned:
    """The samples of one kind: how many, and the sums of their rewards and advantages."""

    count: int = 0
    reward: float = 0.0
    advantage: float = 0.0

    def add(self, count: int, reward: float | None, advantage: float | None) -> None:
        """Adds ``count`` samples with these means."""
        if count and reward is not None and advantage is not None:
            self.count += count
            self.reward += count * reward
            self.advantage += count * advantage

    @property
    def mean(self) -> float | None:
        """The mean advantage; None of none."""
        return self.advantage / self.count if self.count else None

    @property
    def mean_reward(self) -> float | None:
        """The mean reward; None of none."""
        return self.reward / self.count if self.count else None


@dataclass(frozen=True)
class Word:
    """A word: the samples in which it was weighted, and those whose prompt has it while another word was weighted."""

    text: str
    weighted: Earned
    other: Earned

    @property
    def difference(self) -> float | None:
        """What weighting it was worth: the difference of the mean advantages; None where one side has no sample."""
        ours, theirs = self.weighted.mean, self.other.mean
        return None if ours is None or theirs is None else ours - theirs

    @property
    def margin(self) -> float:
        """Half of a 95 % interval of the difference. Advantages have unit spread by construction, so n says it all."""
        if not (self.weighted.count and self.other.count):
            return math.inf
        return NORMAL * math.sqrt(1 / self.weighted.count + 1 / self.other.count)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.difference is not None and abs(self.difference) > self.margin


@dataclass(frozen=True)
class Table:
    """What one arm's words earned: ``shown`` are the clear and then the most often weighted ones, each by worth."""

    label: str
    shown: Sequence[Word]
    rest: Sequence[Word]
    samples: int
    scale: float
    """The largest end of the shown intervals: half of the width of their axis."""

    @property
    def clear(self) -> Sequence[Word]:
        """The words, of all, whose interval leaves out 0."""
        return [word for word in (*self.shown, *self.rest) if word.clear]

    @property
    def by_chance(self) -> float:
        """How many intervals would leave out 0 by chance alone."""
        return 0.05 * sum(word.difference is not None for word in (*self.shown, *self.rest))

    @property
    def places(self) -> int:
        """The decimals of its rewards."""
        sides = [side for word in (*self.shown, *self.rest) for side in (word.weighted, word.other)]
        return decimals((side.mean_reward for side in sides), 3)


def tables(material: Material) -> list[Table]:
    """What the words of every arm earned that weighted any and recorded it."""
    found = [table(arm.label, records(material, arm)) for arm in material.arms]
    return [one for one in found if one]


def records(material: Material, arm: Arm) -> list[Mapping[str, Any]]:
    """The word records of all of an arm's seeds and iterations."""
    lines = [line for source in material.members(arm) for line in source.exploration]
    return [
        line["words"] for line in lines if isinstance(line.get("words"), Mapping) and line["words"].keys() >= COLUMNS
    ]


def table(label: str, found: Sequence[Mapping[str, Any]]) -> Table | None:
    """The words of some records, pooled; None of none."""
    words = sorted(pooled(found), key=lambda word: (-word.weighted.count, word.text))
    words = [word for word in words if word.weighted.count]
    if not words:
        return None
    # a word that stands in every prompt of one word has no other side: nothing to compare
    known = sorted((word for word in words if word.difference is not None), key=lambda word: not word.clear)
    shown = sorted(known[:SHOWN], key=lambda word: (not word.clear, -(word.difference or 0)))
    rest = [word for word in words if word not in shown]
    ends = [abs(word.difference or 0) + word.margin for word in shown]
    return Table(label, shown, rest, sum(word.weighted.count for word in words), max(ends, default=1.0))


def pooled(found: Sequence[Mapping[str, Any]]) -> list[Word]:
    """Every word over all records."""
    words: dict[str, Word] = {}
    for columns in found:
        for k, text in enumerate(columns["word"]):
            word = words.setdefault(str(text), Word(str(text), Earned(), Earned()))
            word.weighted.add(columns["weighted"][k], columns["reward"][k], columns["advantage"][k])
            word.other.add(columns["other"][k], columns["other_reward"][k], columns["other_advantage"][k])
    return list(words.values())
