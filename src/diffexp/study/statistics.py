"""The statistics of the study: how many reward queries a method needs, and how sure we can be of it.

A curve is the mean reward of an evaluation, R(q), over the number q of reward queries that training had asked for.
Everything here is a function of plain arrays; :mod:`diffexp.study.comparison` applies it to run folders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean over seeds and its bootstrap interval; ``low`` and ``high`` are None where one seed allows none."""

    value: float
    low: float | None = None
    high: float | None = None


class Reach(NamedTuple):
    """When a curve reached a level: after ``queries``; or, where ``reached`` is false, later than ``queries``."""

    queries: float
    reached: bool = True


class Ratio(NamedTuple):
    """Queries of a method relative to those of the baseline, over the seeds that both have.

    The ratio lies in ``least``...``most``: one number if no run was censored, otherwise what is known of it (0 and
    infinity where a side is open). ``low`` and ``high`` bound it at 95 %; None with a single pair.
    ``statistic`` is "geometric mean", or "median" where a run was censored.
    """

    least: float
    most: float
    low: float | None
    high: float | None
    pairs: int
    statistic: str


def smooth(values: Sequence[float] | Array, window: int = 3) -> Array:
    """The running mean over ``window`` (odd) evaluations, centred; it narrows at both ends, to 1 at the first and last.

    S(k) = mean of R(k−h)...R(k+h), h = min(⌊window/2⌋, k, n−1−k). So a straight line stays as it is and S starts
    exactly at the untouched model's reward.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    halves = [min(window // 2, k, n - 1 - k) for k in range(n)]
    return np.array([values[k - h : k + h + 1].mean() for k, h in enumerate(halves)])


def queries_to_level(queries: Sequence[float] | Array, values: Sequence[float] | Array, level: float) -> Reach:
    """Q(τ): the queries after which the curve first meets ``level``, linear between evaluations.

    Q(τ) = min {q : R(q) ≥ τ}. A curve that stays below is right-censored at its last evaluation: it needs more.
    ``values`` are usually :func:`smooth`-ed.
    """
    found = at_level(values, queries, level)
    return Reach(float(queries[-1]), reached=False) if found is None else Reach(found)


def at_level(values: Sequence[float] | Array, others: Sequence[float] | Array, level: float) -> float | None:
    """What ``others`` are where the curve ``values`` first meets ``level``, linear in between; None if it stays below.

    So a second measure, such as diversity, can be compared between methods at equal reward.
    """
    values, others = np.asarray(values, dtype=float), np.asarray(others, dtype=float)
    above = np.flatnonzero(values >= level)
    if not len(above):
        return None
    k = int(above[0])
    if k == 0:
        return float(others[0])
    share = (level - values[k - 1]) / (values[k] - values[k - 1])
    return float(others[k - 1] + share * (others[k] - others[k - 1]))


def final_reward(values: Sequence[float] | Array) -> float:
    """The mean of the last 10 % of the evaluations, rounded up: at least the last one."""
    return float(np.mean(values[-math.ceil(len(values) / 10) :]))


def nauc(
    queries: Sequence[float] | Array, values: Sequence[float] | Array, start: float, goal: float, budget: float
) -> float:
    """The normalised area under the curve, (1/Q) ∫₀^Q (R(q) − R0) / (R* − R0) dq, for R0 = ``start``, R* = ``goal``.

    Q = ``budget``. 0 for a model that stays as it was, 1 for one that is at the goal from the first query on.
    """
    queries = np.asarray(queries, dtype=float)
    grid = np.unique(np.concatenate([[0.0, budget], queries[queries < budget]]))
    gains = (np.interp(grid, queries, values) - start) / (goal - start)
    return float(np.sum((gains[1:] + gains[:-1]) / 2 * np.diff(grid)) / budget)


def iqm(values: Sequence[float] | Array) -> float:
    """The interquartile mean: the mean of what is left without the lowest and the highest quarter, ⌊n/4⌋ each.

    Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def bootstrap_mean(values: Sequence[float] | Array, method: Literal["percentile", "BCa"] = "percentile") -> Estimate:
    """The mean over seeds with a bootstrap 95 % interval of 10,000 resamples; one value has no interval.

    With fewer than about ten seeds such intervals are too narrow: see :func:`too_narrow`.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean)
    if np.ptp(values) == 0:  # BCa is undefined without spread
        return Estimate(mean, mean, mean)
    from scipy.stats import bootstrap  # slow to import

    result = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method=method, rng=_generator()
    )
    return Estimate(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


COVERAGE = {2: 51, 3: 75, 4: 80, 5: 84, 6: 86, 7: 88, 8: 89, 9: 90}
"""In how many % of cases a percentile bootstrap of so few normal values has their mean in its 95 % interval."""


def too_narrow(seeds: int) -> str | None:
    """What to know of a bootstrap interval of so few seeds; None where it is about as wide as it should be."""
    if seeds not in COVERAGE:
        return None
    return (
        f"A bootstrap of {seeds} seeds is too narrow: its 95 % interval holds the true mean in about "
        f"{COVERAGE[seeds]} % of cases, and lies wholly above it in about {(100 - COVERAGE[seeds]) / 2:.0f} %."
    )


def query_ratio(method: Sequence[Reach], baseline: Sequence[Reach]) -> Ratio:
    """How many queries ``method`` needs for each query of ``baseline``; the k-th of both are runs of the same seed.

    Without censoring: the geometric mean exp(mean log(Q_method / Q_baseline)) with a percentile bootstrap over pairs.
    A censored run bounds its pair's ratio from one side only (from both it says nothing). Then the median of the lower
    and of the upper bounds encloses the median ratio, and the interval reaches from the low end of the one bootstrap to
    the high end of the other.
    """
    least, most = (np.array(side) for side in zip(*map(_ratio_bounds, method, baseline), strict=True))
    pairs = len(least)
    if np.array_equal(least, most):
        mean, low, high = bootstrap_mean(np.log(least))
        bounds = (None, None) if low is None or high is None else (math.exp(low), math.exp(high))
        return Ratio(math.exp(mean), math.exp(mean), *bounds, pairs, "geometric mean")
    low, high = (_median_bound(least, 0), _median_bound(most, -1)) if pairs > 1 else (None, None)
    return Ratio(float(np.median(least)), float(np.median(most)), low, high, pairs, "median")


def mean_curve(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array, Array]:
    """Mean and standard deviation over seeds of the curves (queries, values), linear between their evaluations.

    On all query counts at which any was evaluated and all have values; the standard deviation of one curve is 0.
    """
    start, stop = max(q[0] for q, _ in curves), min(q[-1] for q, _ in curves)
    grid = np.unique(np.concatenate([q for q, _ in curves]))
    grid = grid[(grid >= start) & (grid <= stop)]
    values = np.stack([np.interp(grid, q, v) for q, v in curves])
    return grid, values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(grid))


def _ratio_bounds(method: Reach, baseline: Reach) -> tuple[float, float]:
    # A level that the untouched model already meets would need 0 queries, whose ratio says nothing; count one.
    ratio = max(method.queries, 1.0) / max(baseline.queries, 1.0)
    return (ratio if baseline.reached else 0.0), (ratio if method.reached else math.inf)


def _median_bound(values: Array, end: Literal[0, -1]) -> float:
    # scipy interpolates between resamples, which turns two infinite ones into NaN: take an order statistic instead.
    draws = _generator().integers(len(values), size=(RESAMPLES, len(values)))
    tail = int((1 - CONFIDENCE) / 2 * RESAMPLES)
    return float(np.sort(np.median(values[draws], axis=1))[tail : RESAMPLES - tail][end])


def _generator() -> np.random.Generator:
    """The same draws for every interval: a table comes out the same each time."""
    return np.random.default_rng(0)
