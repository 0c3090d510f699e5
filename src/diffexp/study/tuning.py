"""The same tuning for baseline and DiffExp: what was tried, and the rule that chooses.

Every candidate of a scale is tried for each algorithm with and without DiffExp, on each task that it is tuned on, on
seeds that no figure has, in runs of half the length. The one with the highest final training reward, in the mean over
its seeds, is taken for all figures of that task and of those alike: the one of the plain arm for baselines, the one of
DiffExp for everything that explores. Of equals, the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffexp.runs.reading import Run
from diffexp.study.archive import complete
from diffexp.study.experiments import FIGURES, TUNING_SEEDS, Arm, Choice, Tuning, trial_name
from diffexp.study.scales import Scale
from diffexp.study.statistics import final_reward
from diffexp.study.variants import TITLES, VARIANTS


class Trial(NamedTuple):
    """A candidate that was tried for an arm on a task, and the final reward of each of its seeds."""

    task: str
    arm: Arm
    candidate: str
    settings: Mapping[str, Any]
    rewards: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.rewards))


def tried(figure: Tuning, scale: Scale, runs: Path) -> list[Trial]:
    """Every candidate whose runs are all there, finished."""
    found = []
    for task, arm in figure.tried:
        for name, settings in scale.candidates[arm.algorithm].items():
            folders = [runs / trial_name(task, arm, name, seed) for seed in TUNING_SEEDS]
            if all(complete(folder) for folder in folders):
                found.append(Trial(task, arm, name, settings, tuple(final(folder) for folder in folders)))
    return found


def choice(scale: Scale, runs: Path) -> Choice:
    """The settings that won, where all candidates of an algorithm, plain and exploring, have been tried on a task."""
    figure = FIGURES["tuning"]
    if not (scale.candidates and isinstance(figure, Tuning)):
        return {}
    found = tried(figure, scale, runs)
    planned = Counter((task, arm.algorithm) for task, arm in figure.tried for _ in scale.candidates[arm.algorithm])
    done = Counter((trial.task, trial.arm.algorithm) for trial in found)
    return {
        (arm.algorithm, alike, VARIANTS[arm.variant].plain): winner(found, task, arm).settings
        for task, arm in figure.tried
        if done[task, arm.algorithm] == planned[task, arm.algorithm]
        for alike in figure.tasks[arm.algorithm][task]
    }


def winner(trials: list[Trial], task: str, arm: Arm) -> Trial:
    """The best candidate of an arm on a task: the rule above."""
    return max((trial for trial in trials if (trial.task, trial.arm) == (task, arm)), key=lambda trial: trial.mean)


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
        won = trial is winner(trials, trial.task, trial.arm)
        table.append([trial.task, label, trial.candidate, by_seed, f"{trial.mean:.4g}", "yes" if won else ""])
    return table
