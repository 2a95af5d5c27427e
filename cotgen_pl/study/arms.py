"""What claims compare: the runs at a place of a group, with a score of each prompt, seed by seed.

Apart from `claims.py`, which says what is tested. Shapes are those of `statistics.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotgen_pl.study.definition import BASE, Cell, Group
from cotgen_pl.study.folders import Record, Records, SuiteVerdicts
from cotgen_pl.study.rows import best_suite, choosing_scores
from cotgen_pl.study.statistics import Interval, paired_interval, resample_means

Numbers = NDArray[np.float64]
Labels = Mapping[str, str]

# Places of a group ------------------------------------------------------------------------------


def cells_of(group: Group, labels: Labels) -> list[Cell]:
    """All places with these labels."""
    return [cell for cell in group.cells if labels.items() <= cell.labels.items()]


def twins(
    group: Group, of: Labels, minus: Labels | None, minus_group: Group
) -> list[tuple[Cell, Cell | None]]:
    """Each place of `of` with that of `minus` which is alike in all other labels; None: base."""
    if minus is None:
        return [(cell, None) for cell in cells_of(group, of)]
    others = {_rest(cell, minus): cell for cell in cells_of(minus_group, minus)}
    pairs = [(cell, others.get(_rest(cell, of))) for cell in cells_of(group, of)]
    return [(cell, other) for cell, other in pairs if other is not None]


def _rest(cell: Cell, labels: Labels) -> frozenset[tuple[str, str]]:
    return frozenset(item for item in cell.labels.items() if item[0] not in labels)


# Scores -----------------------------------------------------------------------------------------

Score = Callable[[SuiteVerdicts], Numbers]
"""Of each of a suite's P prompts, [P]."""


def trained_score(suite: SuiteVerdicts) -> Numbers:
    """The mean over a prompt's pictures."""
    return suite.prompt_means()


def best_of_score(reward: str, judge: str | None, n: int) -> Score:
    """What a suite's own scorer says of the best of n pictures by a reward; see `best_suite`."""

    def score(suite: SuiteVerdicts) -> Numbers:
        return best_suite(suite, choosing_scores(suite, reward, judge), n).graded[:, 0]

    return score


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a record for each seed, and what of it counts."""

    records: Mapping[int, Record]
    score: Score = trained_score

    def table(self, seeds: Sequence[int], domain: str) -> Numbers:
        """[S, P] over all suites of a domain."""
        return np.stack([self._row(self.records[seed], domain) for seed in seeds])

    def _row(self, record: Record, domain: str) -> Numbers:
        return np.concatenate([self.score(suite) for suite in record.suites_of(domain)])


def layout(record: Record, domain: str) -> tuple[Numbers, list[str]]:
    """[P] weights and strata (suite and category) of a domain's prompts."""
    suites = record.suites_of(domain)
    weights = np.concatenate([suite.weights() for suite in suites]) / len(suites)
    return weights, [f"{s.suite}/{category}" for s in suites for category in s.categories]


def compare(pairs: Sequence[tuple[Arm, Arm]], domain: str) -> tuple[Interval | None, int]:
    """The mean difference over pairs of arms, and the number of seeds that all of them have."""
    seeds = common_seeds([arm for pair in pairs for arm in pair])
    if not pairs or len(seeds) < 2:
        return None, len(seeds)
    tables = [a.table(seeds, domain) - b.table(seeds, domain) for a, b in pairs]
    weights, strata = layout(pairs[0][0].records[seeds[0]], domain)
    return paired_interval(np.mean(tables, axis=0), weights, strata), len(seeds)


def common_seeds(arms: Sequence[Arm]) -> list[int]:
    """Those that all arms have, in order."""
    shared = set.intersection(*(set(arm.records) for arm in arms)) if arms else set()
    return sorted(shared)


def resample_arms(
    arms: Sequence[Arm], seeds: Sequence[int], domain: str
) -> tuple[Numbers, Numbers]:
    """[A] means of a domain and [R, A] of its resamples; see `resample_means`."""
    weights, strata = layout(arms[0].records[seeds[0]], domain)
    return resample_means([arm.table(seeds, domain) for arm in arms], weights, strata)


def base_arm(records: Records, score: Score = trained_score) -> Arm:
    """The policy without training, of all of its seeds."""
    seeds = records.study.runs[BASE].seeds
    found = {seed: records.base(seed) for seed in seeds}
    return Arm({seed: record for seed, record in found.items() if record is not None}, score)


def arm_of(records: Records, cell: Cell | None) -> Arm:
    """The runs of a place; None is the base."""
    return base_arm(records) if cell is None else Arm(records.of(cell))
