"""What a report is made from: the run folders, read as far as they go. A run may have only begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffexp import prompts as prompt_sets
from diffexp.errors import UserError
from diffexp.exploration import last_iteration
from diffexp.runs import environment
from diffexp.runs.names import CARD, CONFIG, ENVIRONMENT, EVALUATIONS, EXPLORATION, METRICS, SAMPLES
from diffexp.runs.reading import Measure, Run, objects
from diffexp.sharing.lora_header import FOLDERS
from diffexp.study.comparison import Arm, arms_of

LISTED = (CONFIG, METRICS, EVALUATIONS, EXPLORATION, ENVIRONMENT)
"""The files of a run that a report is made from, besides the previews."""


@dataclass(frozen=True, eq=False)
class Source:
    """A run folder, with what :class:`diffexp.runs.reading.Run` leaves out."""

    run: Run
    exploration: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Source:
        """Reads a run folder.

        Raises:
            UserError: if it is none, or one of its files is damaged.
        """
        run = Run.read(path, evaluated=False)
        explored = {int(line.get("iteration") or k): line for k, line in enumerate(objects(run.path / EXPLORATION))}
        return cls(run, list(explored.values()), environment.read(run.path))

    @property
    def iterations(self) -> int:
        """How many iterations the recipe asks for."""
        return int(self.run.config.get("iterations", 0))

    @property
    def done(self) -> int:
        """How many iterations are done."""
        return int(self.run.metrics[-1].get("iteration", 0)) if self.run.metrics else 0

    @property
    def ended(self) -> bool:
        """Whether training is over: all iterations are done, or it stopped early and left its card."""
        cards = (self.run.path / folder / CARD for folder in FOLDERS)
        return self.done >= self.iterations or any(card.is_file() for card in cards)

    @property
    def queries(self) -> int:
        """The reward queries that training has asked for."""
        return int(self.run.metrics[-1].get("queries", 0)) if self.run.metrics else 0

    def queries_at(self, iteration: int) -> int:
        """The queries asked for up to an iteration."""
        known = {m.get("iteration"): m.get("queries") for m in self.run.metrics}
        return int(known.get(iteration) or iteration * int(self.run.config.get("samples", 0)))

    def setting(self, *path: str) -> Any:
        """A setting of the recipe; None where it is not set."""
        found: Any = self.run.config
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    @property
    def last_exploring(self) -> int:
        """The last iteration in which an arm that explores does."""
        return last_iteration(float(self.setting("exploration", "until") or 0), self.iterations)

    def seen(self, measure: Measure) -> bool:
        """Whether training saw all of these prompts."""
        return measure.prompts in self._seen_sets

    @cached_property
    def _seen_sets(self) -> frozenset[str]:
        name = self.run.goal.prompts
        known, seen = set(_prompts(name)), {name}
        for other in {measure.prompts for measure in self.run.scores} - seen:
            prompts = _prompts(other)
            if prompts and known.issuperset(prompts):
                seen.add(other)
        return frozenset(seen)


@dataclass(frozen=True, eq=False)
class Material:
    """All runs of a report, as arms: the runs that differ in their seed only."""

    sources: Sequence[Source]
    arms: Sequence[Arm]

    @classmethod
    def read(cls, paths: Sequence[str | Path]) -> Material:
        """Reads run folders.

        Raises:
            UserError: for no folder, one that is no run, or the same seed of one recipe twice.
        """
        if not paths:
            raise UserError("no runs to report on: give the folders that `diffexp train` wrote")
        sources = [Source.read(path) for path in paths]
        return cls(sources, arms_of([source.run for source in sources]))

    @cached_property
    def _by_path(self) -> dict[Path, Source]:
        return {source.run.path: source for source in self.sources}

    def of(self, run: Run) -> Source:
        """The source of a run."""
        return self._by_path[run.path]

    def members(self, arm: Arm) -> list[Source]:
        """The runs of an arm."""
        return [self.of(run) for run in arm.runs.values()]

    @property
    def first(self) -> Source:
        """The run whose settings stand for what all have in common."""
        return self.sources[0]

    @property
    def objective(self) -> Measure:
        """What the first run trains on."""
        return self.first.run.objective

    @property
    def finished(self) -> bool:
        """Whether every run is over."""
        return all(source.ended for source in self.sources)

    @property
    def measures(self) -> list[Measure]:
        """Everything evaluated: the objective, then its prompts' other rewards, then the other prompt sets."""
        found = dict.fromkeys(measure for source in self.sources for measure in source.run.scores)
        goal = self.objective
        return sorted(found, key=lambda m: (m != goal, m.prompts != goal.prompts, m.reward != goal.reward))


def stamp(paths: Sequence[str | Path]) -> str:
    """Names, sizes and times of what a report is made from: another text whenever the report may be another."""
    parts = []
    for path in map(Path, paths):
        files = [path / name for name in LISTED]
        files += sorted((path / SAMPLES).glob("*"))
        parts += [f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files if file.exists()]
    return "|".join(parts)


def _prompts(name: str) -> tuple[str, ...]:
    try:
        return prompt_sets.load(name)
    except (UserError, OSError):  # a file that is not here any more
        return ()
