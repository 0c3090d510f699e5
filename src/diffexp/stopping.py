"""Whether training still helps, by a reward that training never sees; and when to stop because it does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from diffexp.evaluation import Score


@dataclass
class EarlyStopping:
    """Follows the mean of a held-out ``reward`` from evaluation to evaluation; without one, nothing ever stops.

    After ``patience`` evaluations in a row that are no better than the best before them, the run is ``over``. A policy
    that has learned to please its reward rather than people goes on to earn more of it, and less of the other.
    """

    reward: str | None = None
    patience: int | None = None
    best: float | None = None
    iteration: int = 0
    worse: int = 0

    @property
    def over(self) -> bool:
        """Whether the run should end here."""
        return self.patience is not None and self.worse >= self.patience

    def observe(self, iteration: int, scores: Iterable[Score]) -> bool:
        """Takes note of an evaluation, the mean over its prompt sets; says whether it is the best so far."""
        values = [score.mean for score in scores if score.reward == self.reward]
        if not values:
            return False
        mean = sum(values) / len(values)
        if self.best is not None and mean <= self.best:
            self.worse += 1
            return False
        self.best, self.iteration, self.worse = mean, iteration, 0
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember."""
        return {"best": self.best, "iteration": self.iteration, "worse": self.worse}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what ``state`` returned."""
        self.best, self.iteration, self.worse = state["best"], state["iteration"], state["worse"]

    def verdict(self) -> str:
        """Why a run that is ``over`` ended."""
        since = f"has not risen above {self.best:.4f} since iteration {self.iteration}"
        return f"{self.reward} {since}, and best/ holds what that iteration left"
