"""Claims and their tests, fixed in a file before any run: what is read there, and what is found.

A file of claims has `claims`, by name. Each has `says` (a sentence), `test`, `group`, `domain`, and
the places of the group that it compares by their labels: `of`, and `minus` (or `minus: base`). With
`each`, an entry stands for a claim per value: its names are filled into `says`, `of`, `minus` and
`domain` where they stand in braces. `paper: true` marks what arXiv 2505.17017 says. The tests:

    difference    `of` less `minus`, paired by seed and prompt, in the mean over all other labels
    order         best of `best_of` by each reward, then `of`, then `minus`: both steps, each reward
    correlation   of ranks: a scorer's uplift by the best of `best_of`, and the gain of `of`, over
                  the axis `over`
    spread        how much more `of` differs over the axis `over` than `minus` does
    efficiency    how much of the largest budget `of` saves against `minus` until half of the final
                  gain, along the axis `over` of numbers of images
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cotgen_pl.interfaces import check_choice
from cotgen_pl.study.definition import BASE, Cell, Group, read_yaml
from cotgen_pl.study.folders import Record, Records, SuiteVerdicts
from cotgen_pl.study.rows import best_suite, choosing_scores
from cotgen_pl.study.statistics import (
    Finding,
    Interval,
    bootstrap_seeds,
    half_gain_at,
    judge_claim,
    paired_interval,
    rank_correlation,
)

Numbers = NDArray[np.float64]
Test = Literal["difference", "order", "correlation", "spread", "efficiency"]
Labels = Mapping[str, str]

LEAST_SEEDS = 3  # below that, a resample is one seed alone too often: 1 in 2 of two
ENTRIES = {"says", "test", "group", "domain", "of", "minus", "over", "best_of", "each", "seeds"}
ENTRIES |= {"paper"}


@dataclass(frozen=True)
class Claim:
    """One claim and how it is tested."""

    name: str
    says: str
    test: Test
    group: str
    domain: str
    of: Labels
    minus: Labels | None = None
    """None is the base."""
    over: str = ""
    """The axis along which levels are compared."""
    best_of: int = 4
    paper: bool = False
    """Whether the paper says so; else it is a question of this study."""
    least_seeds: int = LEAST_SEEDS

    def check(self, group: Group) -> None:
        """Raise a ValueError where the group has not what the test compares."""
        places = [self.of] if self.minus is None else [self.of, self.minus]
        absent = [dict(labels) for labels in places if not cells_of(group, labels)]
        if absent or (self.over and self.over not in group.axes):
            raise ValueError(
                f"claim {self.name}: expected places and an axis of group {group.name} "
                f"({ {axis: list(levels) for axis, levels in group.axes.items()} }), got "
                f"{absent or self.over}; correct the file of claims"
            )


@dataclass(frozen=True)
class Found:
    """What a claim's test says."""

    claim: Claim
    finding: Finding | None
    """None where runs are missing: the claim is not tested."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """What was compared, each with its estimate."""
    seeds: int = 0


# Reading ----------------------------------------------------------------------------------------


def read_claims(path: str) -> list[Claim]:
    """The claims of a file.

    Raises:
        ValueError: There is no such file, or it has an entry that no test knows.
    """
    entries = read_yaml(path)["claims"]
    return [claim for name, entry in entries.items() for claim in _expand(path, name, entry)]


def _expand(path: str, name: str, entry: Mapping[str, Any]) -> Iterator[Claim]:
    needed = {"says", "test", "group", "domain", "of"}
    if not needed <= entry.keys() <= ENTRIES:
        raise ValueError(
            f"{path}: claim {name}: expected {sorted(needed)} among {sorted(ENTRIES)}, got "
            f"{sorted(entry)}; correct it"
        )
    check_choice("test", entry["test"], Test)
    each = entry.get("each", {})
    for values in itertools.product(*each.values()):
        filled = _fill(entry, dict(zip(each, values, strict=True)))
        minus = filled.get("minus", "base")
        yield Claim(
            name="-".join([name, *map(str, values)]),
            says=filled["says"],
            test=entry["test"],
            group=filled["group"],
            domain=filled["domain"],
            of=filled["of"],
            minus=None if minus == "base" else minus,
            over=entry.get("over", ""),
            best_of=entry.get("best_of", 4),
            paper=entry.get("paper", False),
            least_seeds=entry.get("seeds", LEAST_SEEDS),
        )


def _fill(value: Any, names: Mapping[str, Any]) -> Any:
    """A value with `{name}` replaced by that name's value, wherever it stands."""
    if isinstance(value, Mapping):
        return {key: _fill(entry, names) for key, entry in value.items() if key != "each"}
    if isinstance(value, str):
        for name, own in names.items():
            value = value.replace(f"{{{name}}}", str(own))
    return value


# Places of a group ------------------------------------------------------------------------------


def cells_of(group: Group, labels: Labels) -> list[Cell]:
    """All places with these labels."""
    return [cell for cell in group.cells if labels.items() <= cell.labels.items()]


def twins(group: Group, of: Labels, minus: Labels | None) -> list[tuple[Cell, Cell | None]]:
    """Each place of `of` with that of `minus` which is alike in all other labels; None: base."""
    if minus is None:
        return [(cell, None) for cell in cells_of(group, of)]
    others = {_rest(cell, minus): cell for cell in cells_of(group, minus)}
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
    _means: dict[tuple[int, str], float] = field(default_factory=dict, compare=False)

    def table(self, seeds: Sequence[int], domain: str) -> Numbers:
        """[S, P] over all suites of a domain."""
        return np.stack([self._row(self.records[seed], domain) for seed in seeds])

    def _row(self, record: Record, domain: str) -> Numbers:
        return np.concatenate([self.score(suite) for suite in record.suites_of(domain)])

    def mean(self, seed: int, domain: str) -> float:
        """Over a domain's suites, of the mean over categories; a resample asks for it again."""
        if (seed, domain) not in self._means:
            weights, _ = layout(self.records[seed], domain)
            row = self._row(self.records[seed], domain)
            known = ~np.isnan(row)
            total = (row[known] * weights[known]).sum() / weights[known].sum()
            self._means[seed, domain] = float(total)
        return self._means[seed, domain]


def layout(record: Record, domain: str) -> tuple[Numbers, list[str]]:
    """[P] weights and strata (suite and category) of a domain's prompts."""
    suites = record.suites_of(domain)
    weights = np.concatenate([suite.weights() for suite in suites]) / len(suites)
    return weights, [f"{s.suite}/{category}" for s in suites for category in s.categories]


def compare(pairs: Sequence[tuple[Arm, Arm]], domain: str) -> tuple[Interval | None, int]:
    """The mean difference over pairs of arms, and the number of seeds that all of them have."""
    seeds = _common_seeds([arm for pair in pairs for arm in pair])
    if not pairs or len(seeds) < 2:
        return None, len(seeds)
    tables = [a.table(seeds, domain) - b.table(seeds, domain) for a, b in pairs]
    weights, strata = layout(pairs[0][0].records[seeds[0]], domain)
    return paired_interval(np.mean(tables, axis=0), weights, strata), len(seeds)


def _common_seeds(arms: Sequence[Arm]) -> list[int]:
    shared = set.intersection(*(set(arm.records) for arm in arms)) if arms else set()
    return sorted(shared)


# Tests ------------------------------------------------------------------------------------------


def judge(claim: Claim, records: Records) -> Found:
    """What the finished runs say of a claim."""
    group = records.study.groups.get(claim.group)
    if group is None:
        return Found(claim, None)
    if claim.test in ("difference", "order"):
        return _by_differences(claim, records, group)
    statistic, arms = _STATISTICS[claim.test](claim, records, group)
    seeds = _common_seeds(arms)
    if len(seeds) < claim.least_seeds:
        return Found(claim, None, seeds=len(seeds))
    interval = bootstrap_seeds(lambda places: statistic([seeds[at] for at in places]), len(seeds))
    return Found(claim, judge_claim(interval), {claim.test: interval}, len(seeds))


def _base(records: Records, score: Score = trained_score) -> Arm:
    seeds = records.study.runs["base"].seeds
    found = {seed: records.base(seed) for seed in seeds}
    return Arm({seed: record for seed, record in found.items() if record is not None}, score)


def _arm(records: Records, cell: Cell | None) -> Arm:
    return _base(records) if cell is None else Arm(records.of(cell))


def _by_differences(claim: Claim, records: Records, group: Group) -> Found:
    """Seen where each step is seen, not seen where one is not."""
    steps = _steps(claim, records, group)
    compared = {name: compare(pairs, claim.domain) for name, pairs in steps.items()}
    seeds = min((number for _, number in compared.values()), default=0)
    known = {name: interval for name, (interval, _) in compared.items() if interval is not None}
    if len(known) < len(compared) or seeds < claim.least_seeds:
        return Found(claim, None, known, seeds)
    findings = [judge_claim(interval) for interval in known.values()]
    if all(finding == "seen" for finding in findings):
        return Found(claim, "seen", known, seeds)
    return Found(claim, "not seen" if "not seen" in findings else "unclear", known, seeds)


def _steps(claim: Claim, records: Records, group: Group) -> dict[str, list[tuple[Arm, Arm]]]:
    """The differences that a claim is about, by name; each is a mean over pairs."""
    pairs = twins(group, claim.of, claim.minus)
    if claim.test == "difference":
        return {"difference": [(_arm(records, a), _arm(records, b)) for a, b in pairs]}
    steps = {}
    for first, second in pairs:
        reward = first.labels["reward"]
        best = _base(records, best_of_score(reward, records.study.judge, claim.best_of))
        upper, lower = (_arm(records, cell) for cell in (first, second))
        steps[f"{reward}: best of {claim.best_of} less {_title(first)}"] = [(best, upper)]
        steps[f"{reward}: {_title(first)} less {_title(second)}"] = [(upper, lower)]
    return steps


def _title(cell: Cell | None) -> str:
    """Its levels on the axes beside the rewards."""
    labels = {} if cell is None else cell.labels
    return ", ".join(label for axis, label in labels.items() if axis != "reward") or BASE


Statistic = Callable[[Sequence[int]], float]


def _correlation(claim: Claim, records: Records, group: Group) -> tuple[Statistic, list[Arm]]:
    base = _base(records)
    cells = cells_of(group, claim.of)
    arms = [_arm(records, cell) for cell in cells]
    scores = [
        best_of_score(c.labels[claim.over], records.study.judge, claim.best_of) for c in cells
    ]
    best = [_base(records, score) for score in scores]

    def gain(arm: Arm, seeds: Sequence[int]) -> float:
        return _mean(arm, seeds, claim.domain) - _mean(base, seeds, claim.domain)

    def statistic(seeds: Sequence[int]) -> float:
        return rank_correlation([gain(b, seeds) for b in best], [gain(a, seeds) for a in arms])

    return statistic, [base, *arms]


def _spread(claim: Claim, records: Records, group: Group) -> tuple[Statistic, list[Arm]]:
    assert claim.minus is not None
    sides = [
        [_arm(records, cell) for cell in cells_of(group, labels)]
        for labels in (claim.of, claim.minus)
    ]

    def statistic(seeds: Sequence[int]) -> float:
        own, other = ([_mean(arm, seeds, claim.domain) for arm in side] for side in sides)
        return float(np.std(own, ddof=1) - np.std(other, ddof=1))

    return statistic, [arm for side in sides for arm in side]


def _efficiency(claim: Claim, records: Records, group: Group) -> tuple[Statistic, list[Arm]]:
    assert claim.minus is not None
    base = _base(records)
    sides = [
        _by_number(records, cells_of(group, labels), claim.over)
        for labels in (claim.of, claim.minus)
    ]

    def needed(side: Sequence[tuple[float, Arm]], seeds: Sequence[int]) -> float:
        start = _mean(base, seeds, claim.domain)
        gains = [_mean(arm, seeds, claim.domain) - start for _, arm in side]
        return half_gain_at([0.0, *(number for number, _ in side)], [0.0, *gains])

    def statistic(seeds: Sequence[int]) -> float:
        own, other = (needed(side, seeds) for side in sides)
        return (other - own) / sides[0][-1][0]

    return statistic, [base, *(arm for side in sides for _, arm in side)]


def _by_number(records: Records, cells: Sequence[Cell], axis: str) -> list[tuple[float, Arm]]:
    ordered = sorted(cells, key=lambda cell: float(cell.labels[axis]))
    return [(float(cell.labels[axis]), _arm(records, cell)) for cell in ordered]


def _mean(arm: Arm, seeds: Sequence[int], domain: str) -> float:
    return math.fsum(arm.mean(seed, domain) for seed in seeds) / len(seeds)


_STATISTICS = {"correlation": _correlation, "spread": _spread, "efficiency": _efficiency}
