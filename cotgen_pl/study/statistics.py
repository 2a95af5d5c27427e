"""The arithmetic of a study: intervals, verdicts on claims, ranks. Arrays in, numbers out.

Legend: S seeds, P prompts, K things that are ranked, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Finding = Literal["seen", "not seen", "unclear"]

SMALLEST_EFFECT = 0.02  # of a score in 0 to 1, the least that a claim speaks of
RESAMPLES = 4000  # the ends of a 95 % interval then stand on 100 resamples each
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its percentile bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float


def judge_claim(interval: Interval, smallest: float = SMALLEST_EFFECT) -> Finding:
    """Whether a claim that something is above 0 is seen, by its interval.

    Seen: the interval lies above 0 and the mean is at least `smallest`. Not seen: its upper bound
    lies below `smallest`. Else unclear; so is an interval that is not known, and one around no
    number, such as what half of a gain took where nothing was gained.

    >>> judge_claim(Interval(0.05, 0.01, 0.09)), judge_claim(Interval(0.0, -0.01, 0.01))
    ('seen', 'not seen')
    >>> judge_claim(Interval(0.05, -0.01, 0.11)), judge_claim(Interval(0.015, 0.005, 0.025))
    ('unclear', 'unclear')
    >>> judge_claim(Interval(math.nan, -0.09, -0.05))
    'unclear'
    """
    if math.isnan(interval.mean):
        return "unclear"
    if interval.low > 0 and interval.mean >= smallest:
        return "seen"
    return "not seen" if interval.high < smallest else "unclear"


def paired_interval(
    differences: Numbers, weights: Numbers, strata: Sequence[str], seed: int = 0
) -> Interval:
    """Of the mean of differences that are paired by seed and prompt.

    Seeds are drawn with replacement, and prompts with replacement within their stratum, both for
    the whole table at once: a prompt is as hard in all runs. Of few seeds the interval is too
    narrow, as those of the percentile bootstrap are.

    Args:
        differences: [S, P]; NaN for no verdict, which is left out.
        weights: [P], of each prompt in the mean; summing to 1.
        strata: [P], such as suite and category, whose numbers of prompts are fixed.
        seed: Of the resampling.
    """
    generator = np.random.default_rng(seed)
    by_seed = resample_counts(len(differences), ["all"] * len(differences), generator)
    by_prompt = resample_counts(len(weights), strata, generator) * weights
    known = (~np.isnan(differences)).astype(np.float64)
    values = np.nan_to_num(differences)
    sums, shares = (_weighted(by_seed, table, by_prompt) for table in (values, known))
    means = np.divide(sums, shares, out=np.full_like(sums, math.nan), where=shares > 0)
    ones = np.ones((1, len(differences)))
    center = _weighted(ones, values, weights[None]) / _weighted(ones, known, weights[None])
    return Interval(float(center[0]), *percentiles(means))


def resample_counts(number: int, strata: Sequence[str], generator: np.random.Generator) -> Numbers:
    """[R, N]: how often each of N things is drawn, with replacement within its stratum."""
    counts = np.zeros((RESAMPLES, number))
    for stratum in dict.fromkeys(strata):
        places = [place for place, own in enumerate(strata) if own == stratum]
        size = len(places)
        counts[:, places] = generator.multinomial(size, np.full(size, 1 / size), RESAMPLES)
    return counts


def _weighted(by_seed: Numbers, values: Numbers, by_prompt: Numbers) -> Numbers:
    """[R], the sum of values [S, P] under weights [R, S] and [R, P]."""
    return ((by_seed @ values) * by_prompt).sum(1)


def percentiles(samples: Numbers) -> tuple[float, float]:
    """Both ends of the interval that holds 95 % of the samples that are numbers."""
    known = samples[~np.isnan(samples)]
    if not known.size:
        return math.nan, math.nan
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_seeds(
    statistic: Callable[[Sequence[int]], float], num_seeds: int, seed: int = 0
) -> Interval:
    """Of a statistic of runs, resampled by seed alone.

    Args:
        statistic: Takes places of seeds, some of them several times.
        num_seeds: S.
        seed: Of the resampling.
    """
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, num_seeds, (RESAMPLES // 4, num_seeds))
    samples = np.array([statistic(draw.tolist()) for draw in draws])
    # A rank correlation of equal values is not defined, so such draws of seeds do not count.
    return Interval(statistic(range(num_seeds)), *percentiles(samples))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing the mean of theirs.

    NaN for fewer than two values, or where all of one side are equal.

    >>> rank_correlation([0.1, 0.2, 0.5], [3, 4, 9])
    1.0
    """
    a, b = ranks(first), ranks(second)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1].round(12))


def ranks(values: Sequence[float]) -> Numbers:
    """[K] from 1, the smallest first; equal values share the mean of their places."""
    numbers = np.asarray(values, dtype=np.float64)
    below = (numbers[:, None] > numbers[None]).sum(1)
    equal = (numbers[:, None] == numbers[None]).sum(1)
    return below + (equal + 1) / 2


def half_gain_at(spent: Sequence[float], gains: Sequence[float]) -> float:
    """What had been spent when half of the final gain was first reached, between points linear.

    Args:
        spent: [N] ascending, such as images or prompts; the first is the start.
        gains: [N], over the start; the last is the final one.

    Returns:
        NaN where the final gain is not above 0.

    >>> half_gain_at([0, 100, 200], [0.0, 0.3, 0.4])  # 0.2 lies at two thirds of the first piece
    66.66666666666667
    """
    wanted = gains[-1] / 2
    if not wanted > 0:
        return math.nan
    for at in range(1, len(gains)):
        if gains[at] >= wanted:
            rise = gains[at] - gains[at - 1]
            share = (wanted - gains[at - 1]) / rise
            return float(spent[at - 1] + share * (spent[at] - spent[at - 1]))
    return math.nan


def deviation(values: Sequence[float]) -> float:
    """The sample deviation; NaN for fewer than two values.

    >>> deviation([1.0, 3.0])
    1.4142135623730951
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
