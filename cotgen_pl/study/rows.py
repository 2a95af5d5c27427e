"""What a group compares: the base, its best of four pictures by each reward, the trained policies.

The best of four has records like a run's, so that tables and figures treat all three alike. It is
what a reward reaches without any training: its intrinsic generalisation (arXiv 2505.17017).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from cotgen_pl.best_of_n import best_of_n_curve
from cotgen_pl.evaluation.tables import DOMAINS
from cotgen_pl.study.definition import BASE, Group
from cotgen_pl.study.entries import Spread
from cotgen_pl.study.folders import Costs, Numbers, Record, Records, SuiteVerdicts

REWARD = "reward"
"""The axis whose levels are rewards; the base's watched scores go by the same names."""
ALGORITHM = "algorithm"
CANDIDATES = 4  # of one prompt, as many as the paper's groups and its best-of-4 have
BEST = f"best of {CANDIDATES}"
NO_COSTS = Costs(*[math.nan] * 6)

Kind = Literal["base", "best", "trained"]


@dataclass(frozen=True)
class Row:
    """A place in a comparison, with its records by seed."""

    kind: Kind
    labels: Mapping[str, str]
    """Level by axis of the group, for all of its axes."""
    records: Mapping[int, Record]

    @property
    def title(self) -> str:
        """Its levels in one line."""
        return ", ".join(label for label in self.labels.values() if label)


def rows_of(records: Records, group: Group) -> list[Row]:
    """The base, the best of four by each reward, and each place of a group that has a record."""
    judge, bases = records.study.judge, base_records(records, group)
    rows = [Row("base", _labels(group, {next(iter(group.axes)): BASE}), bases)] if bases else []
    for reward in group.axes.get(REWARD, ()):
        found = best_records(bases, reward, judge)
        if found:
            rows.append(Row("best", _labels(group, _best_labels(group, reward)), found))
    trained = [Row("trained", cell.labels, found) for cell, found in records.rows(group)]
    return rows + trained


def base_records(records: Records, group: Group) -> dict[int, Record]:
    """By seed of a group's runs, the policy without training."""
    seeds = dict.fromkeys(seed for cell in group.cells for seed in cell.seeds)
    found = {seed: records.base(seed) for seed in seeds}
    return {seed: record for seed, record in found.items() if record is not None}


def _labels(group: Group, own: Mapping[str, str]) -> dict[str, str]:
    return {axis: own.get(axis, "") for axis in group.axes}


def _best_labels(group: Group, reward: str) -> dict[str, str]:
    """The second axis says that nothing was trained; without one the first has to."""
    others = [axis for axis in group.axes if axis != REWARD]
    return {REWARD: reward, others[0]: BEST} if others else {REWARD: f"{reward}, {BEST}"}


def axis_beside_reward(group: Group) -> str:
    """The other axis of a group that compares rewards.

    Raises:
        ValueError: The group has not these two.
    """
    others = [axis for axis in group.axes if axis != REWARD]
    if len(others) != 1 or REWARD not in group.axes:
        raise ValueError(
            f"group {group.name}: expected an axis {REWARD!r} and one more, got "
            f"{list(group.axes)}; show another group by its rewards"
        )
    return others[0]


def has_scores(record: Record) -> bool:
    """Whether any picture of it has a verdict."""
    return any(not np.isnan(suite.graded).all() for suite in record.suites.values())


def suites_in(rows: Iterable[Row]) -> list[SuiteVerdicts]:
    """One of each suite that any record has: in domain first, then out of domain, then shifts."""
    found = {s.suite: s for row in rows for r in row.records.values() for s in r.suites.values()}
    return sorted(found.values(), key=lambda suite: list(DOMAINS).index(suite.domain))


# Best of four -----------------------------------------------------------------------------------


def best_record(base: Record, reward: str, judge: str | None, n: int = CANDIDATES) -> Record:
    """What the base would reach if of each n pictures a reward chose the one to show."""
    suites = {
        name: best_suite(suite, choosing_scores(suite, reward, judge), n)
        for name, suite in base.suites.items()
    }
    return replace(base, suites=suites, metrics={}, costs=NO_COSTS, pictures={})


def best_records(bases: Mapping[int, Record], reward: str, judge: str | None) -> dict[int, Record]:
    """By seed, the best of four of the base by a reward; nothing where it did not look."""
    chosen = {seed: best_record(record, reward, judge) for seed, record in bases.items()}
    return {seed: record for seed, record in chosen.items() if has_scores(record)}


def choosing_scores(suite: SuiteVerdicts, reward: str, judge: str | None) -> Numbers | None:
    """[P, G], what a reward says of the base's pictures; None where it did not look at them."""
    return suite.graded if reward == judge else suite.watched.get(reward)


def best_suite(suite: SuiteVerdicts, chosen_by: Numbers | None, n: int) -> SuiteVerdicts:
    """One expected verdict for each prompt, of the best of n of its pictures by other scores.

    NaN where there are no such scores, or fewer than n pictures.
    """

    def best(values: Numbers) -> Numbers:
        if chosen_by is None or values.shape[1] < n:
            return np.full((len(values), 1), math.nan)
        return best_of_n(values, chosen_by)[:, n - 1 : n]

    strict = None if suite.strict is None else best(suite.strict)
    return replace(suite, graded=best(suite.graded), strict=strict, watched={})


def best_of_n(values: Numbers, chosen_by: Numbers) -> Numbers:
    """[P, G], column n - 1 the expected value of the best of n; see `cotgen_pl.best_of_n`."""
    return best_of_n_curve(torch.from_numpy(values), torch.from_numpy(chosen_by)).numpy()


# Scores -----------------------------------------------------------------------------------------


def suite_score(
    record: Record, suite: str, categories: Sequence[str | None] = (None,), kind: str = "graded"
) -> float:
    """Mean over categories of a suite, or of all of them (None); NaN for a suite that is not there.

    A category that the suite does not have is NaN too.
    """
    own = record.suites.get(suite)
    known = own is not None and all(c is None or c in own.categories for c in categories)
    return float(np.mean([own.mean(c, kind) for c in categories])) if own and known else math.nan


def domain_score(record: Record, domain: str, kind: str = "graded") -> float:
    """Mean over a domain's suites; NaN where it has none."""
    has_domain = any(suite.domain == domain for suite in record.suites.values())
    return record.domain_mean(domain, kind) if has_domain else math.nan


def domain_scores(records: Mapping[int, Record], domain: str) -> dict[int, float]:
    """By seed, the mean over a domain's suites."""
    return {seed: domain_score(record, domain) for seed, record in records.items()}


def gain_of(row: Row | None, bases: Mapping[int, Record], domain: str) -> Spread:
    """What a row gained over the base of each seed, in a domain's mean."""
    records = row.records if row else {}
    both = {seed: record for seed, record in records.items() if seed in bases}
    base = domain_scores(bases, domain)
    gains = (score - base[seed] for seed, score in domain_scores(both, domain).items())
    return Spread.of(gains)
