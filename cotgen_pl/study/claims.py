"""Claims and their tests, fixed in a file before any run: what is read there, and what is found.

A file of claims has `claims`, by name. Each has `says` (a sentence), `test`, `group`, `domain`, and
the places of the group that it compares by their labels: `of`, and `minus` (or `minus: base`). With
`each`, an entry stands for a claim per value: its names are filled into `says`, `of`, `minus` and
`domain` where they stand in braces. `minus_group` is the group of `minus`, where that is another.

`paper: true` marks what arXiv 2505.17017 says; `control: true` what must not be seen, lest another
finding be in doubt; `post_hoc: true` what was first claimed after runs that bear on it. The tests:

    difference    `of` less `minus`, paired by seed and prompt, in the mean over all other labels
    order         best of `best_of` by each reward, then `of`, then `minus`: both steps, each reward
    correlation   of ranks: a scorer's uplift by the best of `best_of`, and the gain of `of`, over
                  the axis `over`
    spread        how much more `of` differs over the axis `over` than `minus` does
    efficiency    what part of the largest number of `over`, such as images, `of` saves against
                  `minus` until half of the final gain; see `cotgen_pl.study.efficiency`

All of them are resampled over seeds and over prompts, both for all that is compared at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from cotgen_pl.interfaces import check_choice
from cotgen_pl.study.arms import (
    Arm,
    Labels,
    Numbers,
    arm_of,
    base_arm,
    best_of_score,
    cells_of,
    common_seeds,
    compare,
    resample_arms,
    twins,
)
from cotgen_pl.study.definition import BASE, Cell, Group, read_yaml
from cotgen_pl.study.efficiency import Side, check_numbers, compare_halves
from cotgen_pl.study.folders import Records
from cotgen_pl.study.statistics import (
    Finding,
    Interval,
    interval_of,
    judge_claim,
    rank_correlation,
)

Test = Literal["difference", "order", "correlation", "spread", "efficiency"]

LEAST_SEEDS = 3  # below that, a resample is one seed alone too often: 1 in 2 of two
ENTRIES = {"says", "test", "group", "domain", "of", "minus", "over", "best_of", "each", "seeds"}
ENTRIES |= {"paper", "control", "post_hoc", "minus_group"}


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
    minus_group: str = ""
    """The group of `minus`; empty is `group`."""
    control: bool = False
    """Whether it must not be seen, lest what else was found be in doubt."""
    post_hoc: bool = False
    """Whether it was first claimed after runs that bear on it."""

    def check(self, group: Group, minus_group: Group | None = None) -> None:
        """Raise a ValueError where the groups have not what the test compares.

        Args:
            group: Of `of`.
            minus_group: Of `minus`; None is `group`.
        """
        if self.minus_group and (self.test != "difference" or self.minus is None):
            raise ValueError(
                f"claim {self.name}: expected minus_group beside test: difference and the places "
                f"of minus, got test: {self.test} and minus: {self.minus or BASE}; leave it out"
            )
        for own, labels in ((group, self.of), (minus_group or group, self.minus)):
            absent = labels is not None and not cells_of(own, labels)
            if absent or (self.over and self.over not in own.axes):
                raise ValueError(
                    f"claim {self.name}: expected places and an axis of group {own.name} "
                    f"({ {axis: list(levels) for axis, levels in own.axes.items()} }), got "
                    f"{labels} over {self.over or 'no axis'}; correct the file of claims"
                )
        self._check_words(group)

    def _check_words(self, group: Group) -> None:
        """What each test asks for besides."""
        wants = {"over": self.test in _MEASURES, "minus": self.test in ("spread", "efficiency")}
        absent = [word for word, wanted in wants.items() if wanted and not getattr(self, word)]
        if self.test == "order" and "reward" not in group.axes:
            absent.append("an axis reward")
        if absent:
            raise ValueError(
                f"claim {self.name}: expected {absent[0]} beside test: {self.test} of group "
                f"{group.name}, got none; add it to the file of claims"
            )
        if self.test == "efficiency":
            check_numbers(group, self.over)


@dataclass(frozen=True)
class Found:
    """What a claim's test says."""

    claim: Claim
    finding: Finding | None
    """None where runs are missing: the claim is not tested."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """What was compared, each with its estimate."""
    seeds: int = 0
    reason: str = ""
    """What a reader must know of the numbers, such as why there is none."""


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
            minus_group=entry.get("minus_group", ""),
            control=entry.get("control", False),
            post_hoc=entry.get("post_hoc", False),
        )


def _fill(value: Any, names: Mapping[str, Any]) -> Any:
    """A value with `{name}` replaced by that name's value, wherever it stands."""
    if isinstance(value, Mapping):
        return {key: _fill(entry, names) for key, entry in value.items() if key != "each"}
    if isinstance(value, str):
        for name, own in names.items():
            value = value.replace(f"{{{name}}}", str(own))
    return value


# Tests ------------------------------------------------------------------------------------------


def judge(claim: Claim, records: Records) -> Found:
    """What the finished runs say of a claim."""
    group = records.study.groups.get(claim.group)
    minus_group = records.study.groups.get(claim.minus_group or claim.group)
    if group is None or minus_group is None:
        return Found(claim, None)
    if claim.test in ("difference", "order"):
        return _by_differences(claim, records, group, minus_group)
    arms, measure = _MEASURES[claim.test](claim, records, group)
    seeds = common_seeds(arms)
    if len(seeds) < claim.least_seeds:
        return Found(claim, None, seeds=len(seeds))
    interval, reason = measure(*resample_arms(arms, seeds, claim.domain))
    return Found(claim, judge_claim(interval), {claim.test: interval}, len(seeds), reason)


def _by_differences(claim: Claim, records: Records, group: Group, minus_group: Group) -> Found:
    """Seen where each step is seen, not seen where one is not."""
    steps = _steps(claim, records, twins(group, claim.of, claim.minus, minus_group))
    compared = {name: compare(pairs, claim.domain) for name, pairs in steps.items()}
    seeds = min((number for _, number in compared.values()), default=0)
    known = {name: interval for name, (interval, _) in compared.items() if interval is not None}
    if len(known) < len(compared) or seeds < claim.least_seeds:
        return Found(claim, None, known, seeds)
    findings = [judge_claim(interval) for interval in known.values()]
    if all(finding == "seen" for finding in findings):
        return Found(claim, "seen", known, seeds)
    return Found(claim, "not seen" if "not seen" in findings else "unclear", known, seeds)


def _steps(
    claim: Claim, records: Records, pairs: Sequence[tuple[Cell, Cell | None]]
) -> dict[str, list[tuple[Arm, Arm]]]:
    """The differences that a claim is about, by name; each is a mean over pairs."""
    if claim.test == "difference":
        return {"difference": [(arm_of(records, a), arm_of(records, b)) for a, b in pairs]}
    steps = {}
    for first, second in pairs:
        reward = first.labels["reward"]
        best = base_arm(records, best_of_score(reward, records.study.judge, claim.best_of))
        upper, lower = (arm_of(records, cell) for cell in (first, second))
        steps[f"{reward}: best of {claim.best_of} less {_title(first)}"] = [(best, upper)]
        steps[f"{reward}: {_title(first)} less {_title(second)}"] = [(upper, lower)]
    return steps


def _title(cell: Cell | None) -> str:
    """Its levels on the axes beside the rewards."""
    labels = {} if cell is None else cell.labels
    return ", ".join(label for axis, label in labels.items() if axis != "reward") or BASE


Measure = Callable[[Numbers, Numbers], tuple[Interval, str]]
"""From means [A] of arms and resampled ones [R, A], an interval, and what must be known of it."""


def _correlation(claim: Claim, records: Records, group: Group) -> tuple[list[Arm], Measure]:
    cells, judge_name = cells_of(group, claim.of), records.study.judge
    scores = [best_of_score(c.labels[claim.over], judge_name, claim.best_of) for c in cells]
    best = [base_arm(records, score) for score in scores]
    arms = [base_arm(records), *best, *(arm_of(records, cell) for cell in cells)]

    def statistic(means: Numbers) -> float:
        gains = means[1:] - means[0]
        return rank_correlation(gains[: len(best)], gains[len(best) :])

    return arms, lambda center, draws: (interval_of(statistic, center, draws), "")


def _spread(claim: Claim, records: Records, group: Group) -> tuple[list[Arm], Measure]:
    assert claim.minus is not None
    own, other = (
        [arm_of(records, cell) for cell in cells_of(group, labels)]
        for labels in (claim.of, claim.minus)
    )

    def statistic(means: Numbers) -> float:
        return float(np.std(means[: len(own)], ddof=1) - np.std(means[len(own) :], ddof=1))

    return [*own, *other], lambda center, draws: (interval_of(statistic, center, draws), "")


def _efficiency(claim: Claim, records: Records, group: Group) -> tuple[list[Arm], Measure]:
    assert claim.minus is not None
    own, other = (Side.of(group, labels, claim.over) for labels in (claim.of, claim.minus))
    arms = [arm_of(records, cell) for cell in (*own.cells, *other.cells)]
    return [base_arm(records), *arms], partial(compare_halves, own, other)


_MEASURES = {"correlation": _correlation, "spread": _spread, "efficiency": _efficiency}
