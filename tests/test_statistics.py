"""The statistics on curves worked by hand, and on samples whose distribution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from diffexp.study import statistics
from diffexp.study.statistics import Reach


def test_smoothing_by_hand():
    np.testing.assert_allclose(statistics.smooth([0.0, 3.0, 0.0, 6.0, 3.0]), [0.0, 1.0, 3.0, 3.0, 3.0])
    np.testing.assert_allclose(statistics.smooth([1.0]), [1.0])
    np.testing.assert_allclose(statistics.smooth([2.0, 5.0]), [2.0, 5.0])


def test_smoothing_keeps_a_straight_line():
    line = np.linspace(-3, 8, 12)
    np.testing.assert_allclose(statistics.smooth(line), line)
    np.testing.assert_allclose(statistics.smooth(line, window=5), line)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0.0, Reach(0.0)),  # met before training
        (0.5, Reach(50.0)),  # half of the way to the second evaluation
        (1.0, Reach(100.0)),  # exactly at an evaluation
        (1.7, Reach(360.0)),  # from 0.5 at 200 to 2 at 400, 1.2 of 1.5 is four fifths of the way
        (2.5, Reach(400.0, reached=False)),
    ],
)
def test_queries_to_level_by_hand(level: float, expected: Reach):
    queries, rewards = [0, 100, 200, 400], [0.0, 1.0, 0.5, 2.0]
    found = statistics.queries_to_level(queries, rewards, level)
    assert found.reached == expected.reached
    assert found.queries == pytest.approx(expected.queries)


def test_the_first_crossing_counts_even_if_the_reward_falls_again():
    assert statistics.queries_to_level([0, 10, 20], [0.0, 2.0, 0.0], 1.0) == Reach(5.0)


@pytest.mark.parametrize(("n", "last"), [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3), (70, 7)])
def test_final_reward_is_the_mean_of_the_last_tenth(n: int, last: int):
    rewards = np.arange(n, dtype=float) ** 2
    assert statistics.final_reward(rewards) == pytest.approx(rewards[n - last :].mean())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11, 30])
def test_iqm_is_scipys_trimmed_mean(n: int):
    values = np.random.default_rng(n).standard_cauchy(n)
    assert statistics.iqm(values) == pytest.approx(scipy.stats.trim_mean(values, 0.25))


def test_area_under_the_curve_by_hand():
    area = statistics.nauc([0, 10, 20], [1.0, 2.0, 3.0], start=1.0, goal=3.0, budget=20)
    assert area == pytest.approx(0.5)
    # Up to 15 queries the line ends at 2.5, three quarters of the gain; a triangle of half that height.
    assert statistics.nauc([0, 10, 20], [1.0, 2.0, 3.0], 1.0, 3.0, 15) == pytest.approx(0.375)
    assert statistics.nauc([0, 20], [1.0, 1.0], 1.0, 3.0, 20) == 0.0
    assert statistics.nauc([0, 20], [3.0, 3.0], 1.0, 3.0, 20) == 1.0


def test_one_seed_has_no_interval():
    assert statistics.bootstrap_mean([2.5]) == (2.5, None, None)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_equal_seeds_have_an_interval_of_no_width(method):
    assert statistics.bootstrap_mean([2.5, 2.5, 2.5], method=method) == (2.5, 2.5, 2.5)


def test_bootstrap_is_the_same_again_whatever_the_global_generator_does():
    values = [1.0, 2.0, 4.0, 7.0]
    first = statistics.bootstrap_mean(values)
    state = np.random.get_state()  # noqa: NPY002
    assert statistics.bootstrap_mean(values) == first
    assert all(np.array_equal(a, b) for a, b in zip(state, np.random.get_state(), strict=True))  # noqa: NPY002


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_bootstrap_interval_nears_the_normal_one(method):
    """For many normal values the interval of their mean is mean ± 1.96 s/√n."""
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    estimate = statistics.bootstrap_mean(values, method=method)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says(monkeypatch):
    """With 20 normal values the percentile interval covers like mean ± 1.96 s√(19/20)/√20: 92.6 % (Student's t)."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    generator = np.random.default_rng(7)
    trials = 300
    hits = 0
    for _ in range(trials):
        estimate = statistics.bootstrap_mean(generator.normal(3.0, 1.0, size=20))
        hits += estimate.low <= 3.0 <= estimate.high
    expected = 1 - 2 * scipy.stats.t.sf(1.96 * math.sqrt(19 / 20), df=19)
    error = math.sqrt(expected * (1 - expected) / trials)
    assert abs(hits / trials - expected) < 3 * error


def test_ratio_by_hand():
    ratio = statistics.query_ratio([Reach(50), Reach(80)], [Reach(100), Reach(40)])
    assert ratio.least == ratio.most == pytest.approx(1.0)  # sqrt(0.5 · 2)
    assert (ratio.low, ratio.high) == (pytest.approx(0.5), pytest.approx(2.0))
    assert ratio.statistic == "geometric mean"


def test_ratio_of_one_pair_has_no_interval():
    ratio = statistics.query_ratio([Reach(80)], [Reach(100)])
    assert (ratio.least, ratio.most, ratio.low, ratio.high) == (pytest.approx(0.8), pytest.approx(0.8), None, None)


def test_a_censored_method_bounds_the_ratio_from_below():
    ratio = statistics.query_ratio([Reach(100, False)], [Reach(50)])
    assert (ratio.least, ratio.most) == (2.0, math.inf)


def test_a_censored_baseline_bounds_the_ratio_from_above():
    ratio = statistics.query_ratio([Reach(50)], [Reach(100, False)])
    assert (ratio.least, ratio.most) == (0.0, 0.5)


def test_two_censored_runs_say_nothing():
    ratio = statistics.query_ratio([Reach(100, False)], [Reach(100, False)])
    assert (ratio.least, ratio.most) == (0.0, math.inf)


def test_one_censored_run_of_three_leaves_the_median_known():
    method = [Reach(50), Reach(60), Reach(100, False)]
    ratio = statistics.query_ratio(method, [Reach(100)] * 3)
    assert (ratio.least, ratio.most, ratio.statistic) == (0.6, 0.6, "median")
    assert ratio.low == 0.5
    assert ratio.high == math.inf


def test_a_level_met_before_training_does_not_make_the_ratio_infinite():
    ratio = statistics.query_ratio([Reach(0)], [Reach(100)])
    assert ratio.least == pytest.approx(0.01)


def test_mean_curve_on_unequal_grids():
    slow = np.array([0.0, 20.0]), np.array([0.0, 2.0])
    fast = np.array([0.0, 10.0, 30.0]), np.array([0.0, 3.0, 5.0])
    grid, mean, spread = statistics.mean_curve([slow, fast])
    np.testing.assert_allclose(grid, [0, 10, 20])
    np.testing.assert_allclose(mean, [0, 2, 3])  # at 20 the second has 4, between 3 and 5
    np.testing.assert_allclose(spread, [0, math.sqrt(2), math.sqrt(2)])
    assert not statistics.mean_curve([slow])[2].any()


def brute_force_reach(queries: list[float], rewards: list[float], level: float) -> float | None:
    """Q(tau) of the study's definition, from a scan of the curve in steps of a quarter query; None if censored."""
    last = len(rewards) - 1
    smoothed = [
        rewards[k] if k in (0, last) else (rewards[k - 1] + rewards[k] + rewards[k + 1]) / 3 for k in range(last + 1)
    ]
    for segment in range(last):
        (q0, q1), (r0, r1) = queries[segment : segment + 2], smoothed[segment : segment + 2]
        for step in range(int((q1 - q0) * 4) + 1):
            if r0 + (r1 - r0) * step / 4 / (q1 - q0) >= level:
                return q0 + step / 4
    return None


def all_resamples(values: list[float], summary) -> list[float]:
    """The summary of every resample that three seeds have, in order: the bootstrap distribution itself."""
    return sorted(summary([values[i], values[j], values[k]]) for i in range(3) for j in range(3) for k in range(3))


@pytest.mark.parametrize("censored", [False, True])
def test_the_studys_ratio_by_brute_force(censored: bool):
    """Three noisy curves a side: levels, reaches, ratio and its bootstrap, all computed again by other means."""
    rng, queries = np.random.default_rng(4), [192.0 * k for k in range(5)]
    baseline = [[7.0, 7.2, 7.5, 7.6, 8.0], [7.0, 7.3, 7.4, 7.8, 7.9], [7.0, 7.1, 7.6, 7.7, 8.1]]
    method = [
        [r + (0.1 if censored else 0.3) * k / 4 + rng.normal(0, 0.02) for k, r in enumerate(one)] for one in baseline
    ]
    if censored:
        method[1] = [7.0, 7.1, 7.1, 7.2, 7.2]
    start, goal = 7.0, (8.0 + 7.9 + 8.1) / 3  # the last tenth of five evaluations is the last one
    for fraction in (0.5, 0.8, 1.0):
        level = start + fraction * (goal - start)
        reaches = [
            [statistics.queries_to_level(queries, statistics.smooth(one), level) for one in side]
            for side in (method, baseline)
        ]
        scanned = [[brute_force_reach(queries, one, level) for one in side] for side in (method, baseline)]
        for found, expected in zip([*reaches[0], *reaches[1]], [*scanned[0], *scanned[1]], strict=True):
            assert found.reached == (expected is not None)
            assert found.queries == pytest.approx(768.0 if expected is None else expected, abs=0.25)
        ratio = statistics.query_ratio(*reaches)
        least = [(m or 768.0) / b if b else 0.0 for m, b in zip(*scanned, strict=True)]
        most = [m / (b or 768.0) if m else math.inf for m, b in zip(*scanned, strict=True)]
        if least == most:
            logs = [math.log(one) for one in least]
            means = [math.exp(mean) for mean in all_resamples(logs, lambda three: sum(three) / 3)]
            assert ratio.statistic == "geometric mean"
            assert ratio.least == ratio.most == pytest.approx(math.exp(sum(logs) / 3), rel=2e-3)
            assert (ratio.low, ratio.high) == pytest.approx((means[0], means[-1]), rel=2e-3)
        else:
            assert ratio.statistic == "median"
            assert (ratio.least, ratio.most) == pytest.approx((sorted(least)[1], sorted(most)[1]), rel=2e-3)
            assert ratio.low == pytest.approx(all_resamples(least, lambda three: sorted(three)[1])[0], rel=2e-3)
            assert ratio.high == pytest.approx(all_resamples(most, lambda three: sorted(three)[1])[-1], rel=2e-3)


def test_a_second_measure_at_equal_reward_by_hand():
    rewards, diversity = [1.0, 2.0, 4.0], [0.9, 0.7, 0.5]
    assert statistics.at_level(rewards, diversity, 3.0) == pytest.approx(0.6)
    assert statistics.at_level(rewards, diversity, 0.5) == 0.9
    assert statistics.at_level(rewards, diversity, 4.1) is None
