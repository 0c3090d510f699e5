"""Several runs side by side: curves over reward queries, how many queries each method saves, and the same images.

Runs that differ only in their seed form an arm. Each exploring arm is measured against the plain arm of the same
algorithm: how many queries it needs until its smoothed evaluation curve reaches a fraction f of the baseline's gain,
τ_f = R0 + f (R̄_final − R0), with R0 and R̄_final means over the baseline's seeds. A query is one image that training
had the reward score; evaluation asks for none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffexp.errors import UserError, cut
from diffexp.runs.names import CONFIG
from diffexp.runs.reading import Curve, Measure, Run
from diffexp.sharing.lora_header import without_paths
from diffexp.study.comparison_report import rich_table, write
from diffexp.study.statistics import (
    Estimate,
    Ratio,
    Reach,
    bootstrap_mean,
    final_reward,
    iqm,
    nauc,
    queries_to_level,
    query_ratio,
    smooth,
    too_narrow,
)

if TYPE_CHECKING:
    from rich.table import Table

FRACTIONS = (0.5, 0.8, 1.0)
"""The parts of the baseline's gain at which queries are compared."""


@dataclass(frozen=True, eq=False)
class Arm:
    """The runs of one recipe, by seed. ``label`` is unique in a comparison."""

    label: str
    runs: Mapping[int, Run]

    @property
    def first(self) -> Run:
        """The run whose settings stand for the arm's; they differ in the seed only."""
        return next(iter(self.runs.values()))

    def curves(self, measure: Measure) -> dict[int, Curve]:
        """Each seed's curve; seeds that were not evaluated on ``measure`` are missing."""
        return {seed: run.evaluations[measure] for seed, run in self.runs.items() if measure in run.evaluations}

    def start(self, measure: Measure) -> float:
        """The untouched model's reward: the mean of the seeds' first evaluations."""
        return float(np.mean([curve.values[0] for curve in self.curves(measure).values()]))

    def final(self, measure: Measure) -> list[float]:
        """The final reward of each seed that was evaluated on ``measure``."""
        return [final_reward(curve.values) for curve in self.curves(measure).values()]


@dataclass(frozen=True, eq=False)
class Level:
    """When an arm's seeds reach ``reward``, the ``fraction`` of the baseline's gain."""

    fraction: float
    reward: float
    reaches: Mapping[int, Reach]
    ratio: Ratio | None  # None for the baseline itself and where no seed is shared

    @property
    def share(self) -> float:
        """The share of seeds that reached the level, 0...1."""
        return sum(reach.reached for reach in self.reaches.values()) / len(self.reaches)

    @property
    def median(self) -> Reach:
        """The median over seeds; not reached, with the median of what was spent, if half of the seeds were censored."""
        spent = float(np.median([reach.queries for reach in self.reaches.values()]))
        known = float(np.median([reach.queries if reach.reached else np.inf for reach in self.reaches.values()]))
        return Reach(known, True) if np.isfinite(known) else Reach(spent, False)


@dataclass(frozen=True, eq=False)
class Result:
    """What a comparison found about one arm. ``levels`` is empty, and ``nauc`` None, if its baseline gained nothing."""

    arm: Arm
    baseline: Arm
    final: Mapping[Measure, Estimate]
    iqm: float
    nauc: Estimate | None
    levels: Sequence[Level]
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Every arm's result on the ``objective``, which of a sum is its first member, and the files that were written."""

    objective: Measure
    results: Sequence[Result]
    notes: Sequence[str]
    files: Sequence[Path] = ()

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Everything that was evaluated: first the objective, then the same prompts, then the rest."""
        found = dict.fromkeys(measure for result in self.results for measure in result.final)
        return tuple(sorted(found, key=lambda m: (m != self.objective, m.prompts != self.objective.prompts)))

    def held_out(self, measure: Measure) -> bool:
        """Whether training, which had one goal in all runs, never saw this reward."""
        return self.results[0].arm.first.held_out(measure)

    def table(self) -> Table:
        """The arms as a rich table."""
        return rich_table(self)


def compare(paths: Sequence[str | Path], out: str | Path) -> Comparison:
    """Compare runs and write ``comparison.json``, ``comparison.md``, ``curves.png``, ``curves.svg`` and ``grid.png``.

    The baseline of an arm is the first plain arm of its algorithm, or of the first run given if there is none. Without
    sample images there is no ``grid.png``. Files of an earlier comparison in ``out`` are replaced.

    Raises:
        UserError: no run, a folder that is none or was never evaluated, the same seed of one recipe twice, runs that
            train on different rewards, or an ``out`` that is a file or a run.
    """
    out = Path(out)
    if out.is_file() or (out / CONFIG).exists():
        raise UserError(f"out {str(out)!r}: is {'a file' if out.is_file() else 'a run'}; give a folder of its own")
    comparison = analyse([Run.read(path) for path in paths])
    return replace(comparison, files=write(comparison, out))


def analyse(runs: Sequence[Run]) -> Comparison:
    """The statistics of :func:`compare`, without files.

    Raises:
        UserError: as :func:`compare`.
    """
    if not runs:
        raise UserError("no runs to compare: give the folders that `diffexp train` wrote")
    goal, objective = runs[0].goal, runs[0].objective
    for run in runs:
        for kind, ours, theirs in (("train", goal, run.goal), ("are evaluated", objective, run.objective)):
            if ours != theirs:
                raise UserError(
                    f"runs {runs[0].name!r} and {run.name!r} {kind} on different goals, {' / '.join(ours)} and "
                    f"{' / '.join(theirs)}: compare runs of the same prompts and reward"
                )
    arms = arms_of(runs)
    baselines = [baseline_of(arm, arms) for arm in arms]
    ends = [min((float(c.queries[-1]) for c in arm.curves(objective).values()), default=math.inf) for arm in arms]
    results = [
        result(arm, own, objective, min(e for e, other in zip(ends, baselines, strict=True) if other is own))
        for arm, own in zip(arms, baselines, strict=True)
    ]
    return Comparison(objective, results, _notes(results, objective))


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Runs grouped by recipe, in the order given; equal labels get the settings in which they differ.

    Raises:
        UserError: if two runs of one recipe have the same seed.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault(repr(sorted(run.recipe.items())), {})
        if run.seed in group:
            names = f"{str(group[run.seed].path)!r} and {str(run.path)!r}"
            raise UserError(f"runs {names} are the same recipe with the same seed {run.seed}: give one of them")
        group[run.seed] = run
    firsts = [next(iter(group.values())) for group in groups.values()]
    return [
        Arm(_label(first, [other for other in firsts if other.label == first.label]), dict(sorted(group.items())))
        for first, group in zip(firsts, groups.values(), strict=True)
    ]


def baseline_of(arm: Arm, arms: Sequence[Arm]) -> Arm:
    """The first plain arm of the same algorithm, if possible with a seed of this one; without any, the first arm."""
    plain = [a for a in arms if not a.first.explores and a.first.algorithm == arm.first.algorithm]
    return next((a for a in plain if set(a.runs) & set(arm.runs)), plain[0] if plain else arms[0])


def _label(run: Run, namesakes: Sequence[Run]) -> str:
    if len(namesakes) == 1:
        return run.label
    keys = sorted({key for other in namesakes for key in other.recipe})
    differing = [key for key in keys if len({repr(other.recipe.get(key)) for other in namesakes}) > 1]
    return f"{run.label} ({', '.join(f'{key}={cut(str(run.recipe.get(key)), 60)}' for key in differing)})"


def result(arm: Arm, baseline: Arm, objective: Measure, common: float = math.inf) -> Result:
    """What one measure says of an arm beside its baseline, which may be the arm itself.

    The area under the curve is that of as many queries as both had, and at most ``common``.
    """
    measures = dict.fromkeys(measure for run in arm.runs.values() for measure in run.evaluations)
    start = baseline.start(objective)
    goal = float(np.mean(baseline.final(objective)))
    times = [run.seconds for run in arm.runs.values() if run.seconds is not None]
    budget = min(common, *(float(c.queries[-1]) for a in (arm, baseline) for c in a.curves(objective).values()))
    gains = goal > start and budget > 0
    areas = [nauc(c.queries, c.values, start, goal, budget) for c in arm.curves(objective).values()] if gains else []
    return Result(
        arm=arm,
        baseline=baseline,
        final={measure: bootstrap_mean(arm.final(measure)) for measure in measures},
        iqm=iqm(arm.final(objective)),
        nauc=bootstrap_mean(areas) if areas else None,
        levels=[_level(arm, baseline, objective, f, start + f * (goal - start)) for f in FRACTIONS] if gains else [],
        seconds=float(np.mean(times)) if times else None,
    )


def _level(arm: Arm, baseline: Arm, objective: Measure, fraction: float, reward: float) -> Level:
    def reaches(which: Arm) -> dict[int, Reach]:
        found = which.curves(objective)
        return {seed: queries_to_level(c.queries, smooth(c.values), reward) for seed, c in found.items()}

    ours, theirs = reaches(arm), reaches(baseline)
    shared = [seed for seed in ours if seed in theirs]
    ratio = query_ratio([ours[s] for s in shared], [theirs[s] for s in shared]) if shared else None
    return Level(fraction, reward, ours, None if arm is baseline else ratio)


def _notes(results: Sequence[Result], objective: Measure) -> list[str]:
    notes = []
    goal = results[0].arm.first.goal
    if objective != goal:
        trained, shown = (" on ".join(without_paths([one.reward, one.prompts])) for one in (goal, objective))
        notes.append(f"Training was for {trained}: final reward, queries, ratio, IQM and nAUC are of {shown} alone.")
    fewest = min(len(result.arm.runs) for result in results)
    if fewest == 1:
        notes.append("An arm with one seed has no interval: its result may be chance.")
    elif note := too_narrow(fewest):
        notes.append(note)
    for result in results:
        arm, baseline = result.arm, result.baseline
        if arm is not baseline and not set(arm.runs) & set(baseline.runs):
            notes.append(f"{arm.label} and {baseline.label} share no seed: no ratio, as ratios are paired by seed.")
        if arm is baseline and not result.levels:
            notes.append(f"{arm.label} gained nothing over its start: there is no level to reach and no ratio.")
        if any(curve.queries[0] > 0 for curve in arm.curves(objective).values()):
            notes.append(f"{arm.label} was not evaluated before training: its first evaluation stands for the start.")
        ends = {float(curve.queries[-1]) for curve in arm.curves(objective).values()}
        if len(ends) > 1:
            notes.append(f"{arm.label}: its seeds end at {min(ends):,.0f} to {max(ends):,.0f} queries.")
    ends = {result.arm.label: max(c.queries[-1] for c in result.arm.curves(objective).values()) for result in results}
    if max(ends.values()) > 1.1 * min(ends.values()):
        notes.append("Budgets differ: " + ", ".join(f"{label} {end:,.0f} queries" for label, end in ends.items()) + ".")
    return notes
