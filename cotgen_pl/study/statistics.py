"""The arithmetic of a study: intervals, verdicts on claims, ranks. Arrays in, numbers out.

Legend: S seeds, P prompts, A runs that are compared, K things that are ranked, R resamples.
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
MOST_UNDEFINED = 0.05  # of the resamples; an interval of the rest alone is about other cases


@dataclass(frozen=True)
class Interval:
    """An estimate and its percentile bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float
    undefined: float = 0.0
    """Share of the resamples, 0 to 1, that give no number; the ends are those of the others."""


def judge_claim(interval: Interval, smallest: float = SMALLEST_EFFECT) -> Finding:
    """Whether a claim that something is above 0 is seen, by its interval.

    Seen: the interval lies above 0 and the mean is at least `smallest`. Not seen: its upper bound
    lies below `smallest`. Else unclear; so is an interval that is not known, one around no number,
    such as what half of a gain took where nothing was gained, and one of which more than
    `MOST_UNDEFINED` of the resamples give no number.

    >>> judge_claim(Interval(0.05, 0.01, 0.09)), judge_claim(Interval(0.0, -0.01, 0.01))
    ('seen', 'not seen')
    >>> judge_claim(Interval(0.05, -0.01, 0.11)), judge_claim(Interval(0.015, 0.005, 0.025))
    ('unclear', 'unclear')
    >>> judge_claim(Interval(math.nan, -0.09, -0.05))
    'unclear'
    """
    if math.isnan(interval.mean) or interval.undefined > MOST_UNDEFINED:
        return "unclear"
    if interval.low > 0 and interval.mean >= smallest:
        return "seen"
    return "not seen" if interval.high < smallest else "unclear"


def paired_interval(
    differences: Numbers, weights: Numbers, strata: Sequence[str], seed: int = 0
) -> Interval:
    """Of the mean of differences that are paired by seed and prompt; see `resample_means`.

    Args:
        differences: [S, P]; NaN for no verdict, which is left out.
        weights: [P], of each prompt in the mean; summing to 1.
        strata: [P].
        seed: Of the resampling.
    """
    center, draws = resample_means([differences], weights, strata, seed)
    return interval_of(lambda means: float(means[0]), center, draws)


def resample_means(
    tables: Sequence[Numbers], weights: Numbers, strata: Sequence[str], seed: int = 0
) -> tuple[Numbers, Numbers]:
    """The weighted means of several runs, as they are and resampled.

    Seeds are drawn with replacement, and prompts with replacement within their stratum, both for
    all runs at once: a prompt is as hard in all runs, so that they stay paired. Of few seeds the
    intervals are too narrow, as those of the percentile bootstrap are.

    Args:
        tables: A of [S, P], all of the same seeds and prompts; NaN for no verdict, which is left
            out of its run's mean.
        weights: [P], of each prompt in the mean; summing to 1.
        strata: [P], such as suite and category, whose numbers of prompts are fixed.
        seed: Of the resampling.

    Returns:
        [A] and [R, A]; NaN where a run has no verdict that counts.
    """
    generator, number = np.random.default_rng(seed), len(tables[0])
    by_seed = resample_counts(number, ["all"] * number, generator)
    by_prompt = resample_counts(len(weights), strata, generator) * weights
    center = [_means(np.ones((1, number)), table, weights[None]) for table in tables]
    draws = [_means(by_seed, table, by_prompt) for table in tables]
    return np.concatenate(center), np.stack(draws, axis=1)


def _means(by_seed: Numbers, table: Numbers, by_prompt: Numbers) -> Numbers:
    """[R], of what is known in [S, P]."""
    known = (~np.isnan(table)).astype(np.float64)
    sums, shares = (_weighted(by_seed, t, by_prompt) for t in (np.nan_to_num(table), known))
    return np.divide(sums, shares, out=np.full_like(sums, math.nan), where=shares > 0)


def interval_of(statistic: Callable[[Numbers], float], center: Numbers, draws: Numbers) -> Interval:
    """Of a statistic of several runs' means, which `resample_means` gives.

    Args:
        statistic: Takes [A] means; NaN where it is not defined.
        center: [A].
        draws: [R, A].
    """
    samples = np.array([statistic(means) for means in draws])
    undefined = float(np.isnan(samples).mean())
    return Interval(statistic(center), *percentiles(samples), undefined)


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


def rank_correlation(first: Sequence[float] | Numbers, second: Sequence[float] | Numbers) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing the mean of theirs.

    NaN for fewer than two values, where all of one side are equal, and where one is NaN.

    >>> rank_correlation([0.1, 0.2, 0.5], [3, 4, 9])
    1.0
    """
    if np.isnan(first).any() or np.isnan(second).any():
        return math.nan
    a, b = ranks(first), ranks(second)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1].round(12))


def ranks(values: Sequence[float] | Numbers) -> Numbers:
    """[K] from 1, the smallest first; equal values share the mean of their places."""
    numbers = np.asarray(values, dtype=np.float64)
    below = (numbers[:, None] > numbers[None]).sum(1)
    equal = (numbers[:, None] == numbers[None]).sum(1)
    return below + (equal + 1) / 2


@dataclass(frozen=True)
class Crossing:
    """What had been spent when a gain was first reached."""

    at: float
    """NaN where it was not reached."""
    censored: bool = False
    """Whether it was reached at or before the first measured point: `at` is that point, at most."""

    @property
    def least(self) -> float:
        """The least that it may have been."""
        return 0.0 if self.censored else self.at


NEVER = Crossing(math.nan)


def half_gain_at(spent: Sequence[float] | Numbers, gains: Sequence[float] | Numbers) -> Crossing:
    """What had been spent when half of the final gain was first reached.

    Args:
        spent: [N] ascending, such as images or prompts, of each measured point.
        gains: [N], over the start; the last is the final one.

    Returns:
        `NEVER` where the final gain is not above 0.

    >>> half_gain_at([100, 200, 300], [0.1, 0.3, 0.4])
    Crossing(at=150.0, censored=False)
    """
    return reached_at(spent, gains, gains[-1] / 2) if gains[-1] > 0 else NEVER


def reached_at(
    spent: Sequence[float] | Numbers, gains: Sequence[float] | Numbers, wanted: float
) -> Crossing:
    """What had been spent when a gain was first reached, between measured points linear.

    Before the first point nothing was measured, so nothing is told of it but that it is before.

    Args:
        spent: [N] ascending, of each measured point; the start, which has no gain, is not one.
        gains: [N].
        wanted: The gain, above 0.

    >>> reached_at([100, 200], [0.3, 0.4], 0.2)
    Crossing(at=100.0, censored=True)
    """
    for at, gain in enumerate(gains):
        if gain >= wanted and at == 0:
            return Crossing(float(spent[0]), censored=True)
        if gain >= wanted:
            share = (wanted - gains[at - 1]) / (gain - gains[at - 1])
            return Crossing(float(spent[at - 1] + share * (spent[at] - spent[at - 1])))
    return NEVER


def deviation(values: Sequence[float]) -> float:
    """The sample deviation; NaN for fewer than two values.

    >>> deviation([1.0, 3.0])
    1.4142135623730951
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
