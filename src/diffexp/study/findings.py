"""The study in numbers: what every panel of a figure measures of its arms, and what the paper's claims come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffexp.runs.names import TITLES
from diffexp.runs.reading import Measure, Run
from diffexp.study.claims import CLAIMS, Verdict, of_difference, of_ratio, together
from diffexp.study.comparison import Arm as Seeds
from diffexp.study.comparison import Result, result
from diffexp.study.comparison_report import estimate_text, ratio_text
from diffexp.study.paper import Arm, Panel
from diffexp.study.statistics import Array, Estimate, at_level, bootstrap_mean, final_reward, smooth
from diffexp.study.variants import VARIANTS


@dataclass(frozen=True, eq=False)
class Measured:
    """A panel under one measure: each of its arms with its runs by seed, as far as there are any."""

    panel: Panel
    measure: Measure
    arms: Mapping[Arm, Seeds]

    @property
    def where(self) -> str:
        """The panel and its measure, in words."""
        return f"{self.panel.title}: {self.measure.reward} on {self.measure.prompts}"

    @property
    def baseline(self) -> Seeds:
        """The panel's first arm."""
        return next(iter(self.arms.values()))

    def result(self, arm: Arm) -> Result:
        return result(self.arms[arm], self.baseline, self.measure)


@dataclass(frozen=True)
class Finding:
    """One test of a claim: what was compared, in words; the number; over how many pairs of seeds; the verdict."""

    where: str
    what: str
    number: str
    pairs: int
    verdict: Verdict


def findings(name: str, panels: Sequence[Measured]) -> list[Finding]:
    """Every test of the claim of figure ``name``, as far as its runs are there."""
    found = []
    for measured in panels:
        for test in CLAIMS[name].tests if name in CLAIMS else ():
            arms = {arm.variant: arm for arm in measured.arms}
            better, worse = arms.get(test.better), arms.get(test.worse)
            if better and worse and shared(measured, better, worse):
                found.append(compared(measured, better, worse, test.kind))
    return found


def compared(measured: Measured, better: Arm, worse: Arm, kind: str) -> Finding:
    """One test: the better arm beside the worse one."""
    what = f"{label(better)} over {label(worse)}: {kind}"
    if kind == "fewer queries":
        levels = result(measured.arms[better], measured.arms[worse], measured.measure).levels
        ratio = levels[-1].ratio if levels else None
        number, found = ratio_text(ratio), of_ratio(ratio)
    else:
        difference = paired(measured, better, worse, REWARDS[kind])
        number, found = signed(difference), of_difference(difference)
    if why := confounded(measured, better, worse):
        number, found = f"{number}; {why}", Verdict.UNKNOWN
    return Finding(measured.where, what, number, len(shared(measured, better, worse)), found)


def confounded(measured: Measured, one: Arm, other: Arm) -> str:
    """Two arms' precisions where runs of a seed differ in them, which may be all that sets them apart; else empty."""
    for seed in shared(measured, one, other):
        mine, theirs = (measured.arms[arm].runs[seed].recipe.get("model.precision") for arm in (one, other))
        if mine != theirs:
            return f"{mine} against {theirs}"
    return ""


def shared(measured: Measured, one: Arm, other: Arm) -> list[int]:
    """The seeds that both arms were evaluated with."""
    theirs = measured.arms[other].curves(measured.measure)
    return [seed for seed in measured.arms[one].curves(measured.measure) if seed in theirs]


def highest(values: Array) -> float:
    """The highest reward of the smoothed curve."""
    return float(smooth(values).max())


REWARDS: Mapping[str, Callable[[Array], float]] = {"higher reward": final_reward, "higher maximum": highest}
"""What a test of rewards compares of each run's curve."""


def paired(measured: Measured, one: Arm, other: Arm, of: Callable[[Array], float]) -> Estimate:
    """How much higher the reward of one arm is, paired by seed."""
    mine, theirs = (measured.arms[arm].curves(measured.measure) for arm in (one, other))
    return bootstrap_mean([of(mine[seed].values) - of(theirs[seed].values) for seed in shared(measured, one, other)])


def diversity_gain(measured: Measured, arm: Arm, baseline: Arm) -> Estimate | None:
    """How much more diverse an arm's images are at equal reward, paired by seed; None where nothing can be compared.

    The reward is the highest that both runs of a seed reach, by their smoothed curves; a pair of which one never gains
    anything would compare the untouched model with itself.
    """
    gains = []
    for seed in shared(measured, arm, baseline):
        pairs = [equal(measured.arms[which].runs[seed], measured.measure) for which in (arm, baseline)]
        if all(len(diversity) for _, diversity in pairs):
            level = min(float(rewards.max()) for rewards, _ in pairs)
            if level <= max(float(rewards[0]) for rewards, _ in pairs):
                continue
            mine, theirs = (at_level(rewards, diversity, level) for rewards, diversity in pairs)
            gains.append((mine or 0.0) - (theirs or 0.0))
    return bootstrap_mean(gains) if gains else None


def equal(run: Run, measure: Measure) -> tuple[Array, Array]:
    """Smoothed reward and diversity of the same evaluations; the latter empty where it was not measured in all."""
    rewards, diversity = run.evaluations[measure].values, run.diversity.get(measure.prompts)
    if diversity is None or len(diversity.values) != len(rewards):
        return smooth(rewards), np.array([])
    return smooth(rewards), smooth(diversity.values)


def rows(measured: Measured) -> list[list[str]]:
    """The table of a panel: a header, then a row an arm."""
    table = [["arm", "seeds", "final reward", "IQM", "ratio at 0.5", "at 0.8", "at 1", "diversity at equal reward"]]
    first = next(iter(measured.arms))
    for arm, runs in measured.arms.items():
        if not runs.runs:
            table.append([measured.panel.label(arm), "0", *["not run yet"] * 6])
            continue
        one = measured.result(arm)
        ratios = ["1.00" if arm == first else ratio_text(level.ratio) for level in one.levels] or ["–"] * 3
        more = None if arm == first else diversity_gain(measured, arm, first)
        table.append(
            [
                measured.panel.label(arm),
                str(len(runs.runs)),
                estimate_text(one.final.get(measured.measure)),
                estimate_text(Estimate(one.iqm, None, None)),
                *ratios,
                "–" if more is None else signed(more),
            ]
        )
    return table


def label(arm: Arm) -> str:
    return VARIANTS[arm.variant].label.format(TITLES[arm.algorithm])


def signed(estimate: Estimate) -> str:
    """A difference, with its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.3g}"
    return f"{estimate.value:+.3g} [{estimate.low:+.3g}, {estimate.high:+.3g}]"


def verdict(found: Sequence[Finding]) -> Verdict:
    """What a claim comes to."""
    return together([finding.verdict for finding in found])
