"""Intervals, findings and ranks against arithmetic by hand."""

import math

import numpy as np
import pytest

from cotgen_pl.study.statistics import (
    Crossing,
    Interval,
    half_gain_at,
    interval_of,
    judge_claim,
    paired_interval,
    rank_correlation,
    ranks,
    reached_at,
    resample_means,
)


@pytest.mark.parametrize(
    ("interval", "finding"),
    [
        ((0.05, 0.001, 0.1), "seen"),
        ((0.05, 0.0, 0.1), "unclear"),  # 0 is not above 0
        ((0.019, 0.001, 0.03), "unclear"),  # below the smallest effect
        ((0.0, -0.01, 0.019), "not seen"),
        ((-0.1, -0.2, -0.05), "not seen"),
        ((0.01, -0.01, 0.02), "unclear"),
        ((math.nan, math.nan, math.nan), "unclear"),
    ],
)
def test_findings_follow_the_rule(interval, finding):
    assert judge_claim(Interval(*interval)) == finding


def test_interval_of_equal_differences_is_a_point():
    interval = paired_interval(np.full((3, 4), 0.25), np.full(4, 0.25), ["a", "a", "b", "b"])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_interval_is_that_of_a_plain_bootstrap():
    """Against loops over resamples with another generator."""
    generator = np.random.default_rng(1)
    table = generator.normal(0.1, 0.3, (5, 40)) + generator.normal(0, 0.1, (5, 1))
    strata = ["a"] * 10 + ["b"] * 30
    weights = np.array([0.5 / 10] * 10 + [0.5 / 30] * 30)
    means = []
    for _ in range(3000):
        seeds = generator.integers(0, 5, 5)
        drawn = [*generator.integers(0, 10, 10), *(10 + generator.integers(0, 30, 30))]
        part = table[seeds][:, drawn]
        means.append(0.5 * part[:, :10].mean() + 0.5 * part[:, 10:].mean())
    interval = paired_interval(table, weights, strata)
    assert interval.mean == pytest.approx((table @ weights).mean())
    assert [interval.low, interval.high] == pytest.approx(
        np.percentile(means, [2.5, 97.5]), abs=0.015
    )


def test_missing_verdicts_are_left_out():
    table = np.array([[0.5, math.nan], [0.5, 0.5]])
    assert paired_interval(table, np.array([0.5, 0.5]), ["a", "a"]).mean == pytest.approx(0.5)


def test_equal_values_share_their_rank():
    assert ranks([0.5, 0.1, 0.5]).tolist() == [2.5, 1, 2.5]
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == -1
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_ranks_of_what_is_not_known_are_no_number():
    assert math.isnan(rank_correlation([1, math.nan, 3], [1, 2, 3]))
    assert math.isnan(rank_correlation([1, 2, 3], [1, 2, math.nan]))


def test_half_of_no_gain_is_not_known():
    assert math.isnan(half_gain_at([10], [-0.1]).at)
    assert half_gain_at([10, 20, 30], [0.0, 0.3, 0.2]) == Crossing(pytest.approx(10 + 10 / 3))


def test_what_is_reached_before_the_first_measured_point_is_censored():
    assert half_gain_at([10, 20], [0.3, 0.4]) == Crossing(10, censored=True)
    assert half_gain_at([10, 20], [0.1, 0.4]) == Crossing(pytest.approx(10 + 10 / 3))
    assert [Crossing(10, censored=True).least, Crossing(10).least] == [0, 10]


def test_a_gain_that_no_point_has_is_never_reached():
    assert math.isnan(reached_at([10, 20], [0.01, 0.04], 0.05).at)
    assert reached_at([10, 20], [0.01, 0.09], 0.05) == Crossing(pytest.approx(15))


def test_runs_are_resampled_alike_over_seeds_and_prompts():
    """Two runs that differ by 0.1 in every picture differ by 0.1 in every resample."""
    table = np.random.default_rng(0).normal(0.5, 0.2, (3, 8))
    weights, strata = np.full(8, 1 / 8), ["a"] * 4 + ["b"] * 4
    center, draws = resample_means([table, table + 0.1], weights, strata)
    assert center == pytest.approx([table.mean(), table.mean() + 0.1])
    np.testing.assert_allclose(draws[:, 1] - draws[:, 0], 0.1)
    by_prompts_alone = np.tile(table[:1], (3, 1))
    assert resample_means([by_prompts_alone], weights, strata)[1].std() > 0.01
    by_seeds_alone = np.tile(table[:, :1], (1, 8))
    assert resample_means([by_seeds_alone], weights, strata)[1].std() > 0.01


def test_a_statistic_is_judged_with_its_undefined_resamples():
    draws = np.linspace(0.1, 0.9, 100)[:, None]
    for number, finding in ((5, "seen"), (6, "unclear")):
        least = draws[number - 1, 0]
        interval = interval_of(lambda m: m[0] if m[0] > least else math.nan, draws[50], draws)  # noqa: B023
        assert interval.undefined == pytest.approx(number / 100)
        assert interval.low > least
        assert judge_claim(interval) == finding


def test_statistics_that_are_never_defined_have_no_interval():
    interval = interval_of(lambda means: math.nan, np.zeros(1), np.zeros((9, 1)))
    assert math.isnan(interval.low)
    assert interval.undefined == 1
    assert judge_claim(interval) == "unclear"
