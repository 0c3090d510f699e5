"""How far a run is, in figures and in words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffexp.config import Recipe
from diffexp.runs.names import EVALUATIONS, METRICS
from diffexp.runs.reading import trained_on


class Evaluated(NamedTuple):
    """One evaluated prompt set and reward: the first mean, which is the untouched model's, and the last."""

    prompts: str
    reward: str
    first: float
    last: float


class Progress:
    """What a run has told so far, and what follows from it. A continued run's earlier records count too.

    ``clock`` gives seconds that only go forward.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, iteration: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.recipe, self.folder, self.clock = recipe, folder, clock
        self.iteration = self.first = self.saved = iteration
        self.record: Mapping[str, Any] = {}
        self.best: Mapping[str, Any] = {}
        self.evaluations: dict[tuple[str, str], Evaluated] = {}
        self.begun = clock()  # when this process's first iteration began, once there was one
        self.stepped_at = self.begun
        if iteration:
            for record in lines(folder / METRICS):
                self.remember(record)
            for record in lines(folder / EVALUATIONS):
                self.evaluated(record)

    def stepped(self, record: Mapping[str, Any]) -> None:
        """Takes in an iteration."""
        self.stepped_at = self.clock()
        if self.iteration == self.first:
            self.begun = self.stepped_at - record["seconds"]
        self.iteration = record["iteration"]
        self.remember(record)

    def remember(self, record: Mapping[str, Any]) -> None:
        self.record = record
        if not self.best or record["reward_mean"] > self.best["reward_mean"]:
            self.best = record

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Takes in an evaluation."""
        key = (record["prompts"], record["reward"])
        known = self.evaluations.get(key)
        self.evaluations[key] = Evaluated(*key, known.first if known else record["mean"], record["mean"])

    @property
    def total(self) -> int:
        return self.recipe.iterations

    @property
    def left(self) -> int:
        """Iterations to come."""
        return self.total - self.iteration

    @property
    def seconds_left(self) -> float:
        """Until the end, at the pace of this process's iterations with the evaluations between them."""
        done = self.iteration - self.first
        return (self.stepped_at - self.begun) / done * self.left if done else 0.0

    @property
    def reward(self) -> str:
        """The newest iteration's reward."""
        return f"{self.record['reward_mean']:.3f} ± {self.record['reward_std']:.3f}"

    @property
    def effort(self) -> str:
        """Queries, speed and memory."""
        speed = self.recipe.samples / max(self.record["seconds"], 1e-9)
        memory = self.record.get("memory_gib")
        return f"{self.record['queries']} queries, {speed:.1f} images/s" + (f", {memory:.1f} GiB" if memory else "")

    def is_held_out(self, evaluated: Evaluated) -> bool:
        """Whether training never sees this reward."""
        return evaluated.reward not in trained_on(self.recipe.reward)


def headline(recipe: Recipe, folder: Path) -> str:
    """One line about a run."""
    exploration = recipe.exploration
    parts = [name for name, part in (("Eq. 7", exploration.guidance), ("Eq. 8", exploration.words)) if part]
    parts += [exploration.strategy] if exploration.strategy else []
    explores = f"DiffExp ({' + '.join(parts)})" if parts else "no exploration"
    return f"{recipe.algorithm.name} on {recipe.reward}, prompts {recipe.prompts}, {explores} → {folder}"


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that a run wrote."""
    with file.open(encoding="utf-8") as opened:
        yield from (json.loads(line) for line in opened)
