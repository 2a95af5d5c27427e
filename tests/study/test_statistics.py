"""Intervals, findings and ranks against arithmetic by hand."""

import math

import numpy as np
import pytest

from cotgen_pl.study.statistics import (
    Interval,
    bootstrap_seeds,
    half_gain_at,
    judge_claim,
    paired_interval,
    rank_correlation,
    ranks,
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


def test_half_of_no_gain_is_not_known():
    assert math.isnan(half_gain_at([0, 10], [0.0, -0.1]))
    assert half_gain_at([0, 10, 20], [0.0, 0.3, 0.2]) == pytest.approx(10 / 3)


def test_seeds_are_resampled():
    values = [0.0, 1.0, 2.0]
    interval = bootstrap_seeds(lambda places: np.mean([values[p] for p in places]), 3)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((1, 0, 2))


def test_statistics_that_are_never_defined_have_no_interval():
    interval = bootstrap_seeds(lambda places: math.nan, 3)
    assert math.isnan(interval.low)
    assert judge_claim(interval) == "unclear"
