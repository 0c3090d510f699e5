"""The same tuning for baseline and DiffExp: what was tried, and the rule that chooses.

Every candidate of a scale is tried for each algorithm with and without DiffExp, on each task that it is tuned on, on
seeds that no figure has, in runs of half the length. The one with the highest final training reward, in the mean over
both sides and their seeds, is taken for all figures of that task and of those alike, and for both sides: so few runs
don't tell the sides' best settings apart, and figures would compare learning rates. Of equals, the first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffexp.runs.names import TITLES
from diffexp.runs.reading import Run
from diffexp.study.archive import Folders, complete
from diffexp.study.experiments import TUNING_SEEDS, Choice, trial_name
from diffexp.study.paper import FIGURES, Arm, Tuning
from diffexp.study.scales import Scale
from diffexp.study.statistics import final_reward
from diffexp.study.variants import VARIANTS


class Trial(NamedTuple):
    """A candidate that was tried for an arm on a task, and the final reward of each of its seeds."""

    task: str
    arm: Arm
    candidate: str
    rewards: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.rewards))


def tried(figure: Tuning, scale: Scale, runs: Folders) -> list[Trial]:
    """Every candidate whose runs are all there, finished."""
    found = []
    for task, arm in figure.tried:
        for name in scale.tried(arm.algorithm, task):
            folders = [runs.find(trial_name(task, arm, name, seed)) for seed in TUNING_SEEDS]
            if all(complete(folder) for folder in folders):
                found.append(Trial(task, arm, name, tuple(final(folder) for folder in folders)))
    return found


def choice(scale: Scale, runs: Folders) -> Choice:
    """The settings that won, where all candidates of an algorithm, plain and exploring, have been tried on a task."""
    figure = FIGURES["tuning"]
    if not (scale.candidates and isinstance(figure, Tuning)):
        return {}
    found = tried(figure, scale, runs)
    planned = Counter((task, arm.algorithm) for task, arm in figure.tried for _ in scale.tried(arm.algorithm, task))
    done = Counter((trial.task, trial.arm.algorithm) for trial in found)
    return {
        (algorithm, alike): scale.tried(algorithm, task)[winner(found, task, algorithm)]
        for task, algorithm in planned
        if done[task, algorithm] == planned[task, algorithm]
        for alike in figure.tasks[algorithm][task]
    }


def winner(trials: list[Trial], task: str, algorithm: str) -> str:
    """The best candidate of an algorithm on a task, plain and exploring together: the rule above."""
    means: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if (trial.task, trial.arm.algorithm) == (task, algorithm):
            means[trial.candidate].append(trial.mean)
    return max(means, key=lambda candidate: float(np.mean(means[candidate])))


def final(folder: Path) -> float:
    """The final training reward of a run."""
    run = Run.read(folder)
    return final_reward(run.evaluations[run.objective].values)


def rows(trials: list[Trial]) -> list[list[str]]:
    """The table of what was tried: a header, then a row for each candidate, the winner of each arm marked."""
    table = [["task", "arm", "candidate", "final reward by seed", "mean", "chosen"]]
    for trial in trials:
        label = VARIANTS[trial.arm.variant].label.format(TITLES[trial.arm.algorithm])
        by_seed = ", ".join(f"{reward:.4g}" for reward in trial.rewards)
        won = trial.candidate == winner(trials, trial.task, trial.arm.algorithm)
        table.append([trial.task, label, trial.candidate, by_seed, f"{trial.mean:.4g}", "yes" if won else ""])
    return table
