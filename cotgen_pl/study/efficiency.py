"""What half of a gain took, and what a fixed gain took: of claims, and of a table.

Levels such as numbers of images are runs of their own, each scored at its end. Between two levels
a gain is taken as linear. Before the first level nothing was measured: what is reached there is
known to take at most that level's number, and is called censored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cotgen_pl.evaluation.tables import DOMAINS
from cotgen_pl.study.arms import Labels, Numbers, cells_of
from cotgen_pl.study.definition import Cell, Group
from cotgen_pl.study.entries import NOTHING, Content, Table
from cotgen_pl.study.folders import Record, Records
from cotgen_pl.study.rows import domain_score
from cotgen_pl.study.statistics import (
    Crossing,
    Interval,
    half_gain_at,
    interval_of,
    reached_at,
)
from cotgen_pl.study.tables import heading


@dataclass(frozen=True)
class Side:
    """The runs of some labels along an axis of numbers."""

    title: str
    axis: str
    spent: tuple[float, ...]
    """[N] ascending, the axis' levels."""
    cells: tuple[Cell, ...]
    """[N]."""

    @classmethod
    def of(cls, group: Group, labels: Labels, axis: str) -> Side:
        """Of a group's places with these labels."""
        cells = sorted(cells_of(group, labels), key=lambda cell: float(cell.labels[axis]))
        spent = tuple(float(cell.labels[axis]) for cell in cells)
        return cls(", ".join(labels.values()), axis, spent, tuple(cells))


# Claims -----------------------------------------------------------------------------------------


def compare_halves(own: Side, other: Side, center: Numbers, draws: Numbers) -> tuple[Interval, str]:
    """How much less one side took than another until half of its final gain.

    In parts of its largest number. A censored crossing counts as the first level in the mean; the
    interval reaches from the least to the most that it may have been, 0 and the first level. Where
    both are censored there is no mean.

    Args:
        own: With N levels.
        other: With M levels.
        center: [1 + N + M], the means of the base, of `own` and of `other`.
        draws: [R, 1 + N + M], the same resampled.

    Returns:
        The interval, above 0 where `own` took less, and what must be known of it.
    """

    def halves(means: Numbers) -> tuple[Crossing, Crossing]:
        gains, number = means[1:] - means[0], len(own.spent)
        return half_gain_at(own.spent, gains[:number]), half_gain_at(other.spent, gains[number:])

    def saved(means: Numbers, most: bool) -> float:
        first, second = halves(means)
        difference = second.at - first.least if most else second.least - first.at
        return difference / own.spent[-1]

    least, most = (interval_of(partial(saved, most=m), center, draws) for m in (False, True))
    first, second = halves(center)
    known = not (first.censored and second.censored)
    mean = (second.at - first.at) / own.spent[-1] if known else math.nan
    reason = _reason(own, other, first, second)
    return Interval(mean, least.low, most.high, least.undefined), reason


def _reason(own: Side, other: Side, first: Crossing, second: Crossing) -> str:
    crossings = {own.title: first, other.title: second}
    without = [title for title, crossing in crossings.items() if math.isnan(crossing.at)]
    if without:
        return f"no final gain to halve: {' and '.join(without)}"
    early = [title for title, crossing in crossings.items() if crossing.censored]
    if not early:
        return ""
    gained = f"half of the gain came before the first measured level ({_told(first, second)})"
    if len(early) == 2:
        return f"of both, {gained}: which was earlier is not known"
    return f"of {early[0]}, {gained}: the interval holds all that this may have been"


def _told(*crossings: Crossing) -> str:
    """The censored ones, each once."""
    return ", ".join(dict.fromkeys(tell(c) for c in crossings if c.censored))


def tell(crossing: Crossing, never: str = NOTHING) -> str:
    """A crossing in words, such as "at most 2,048"; `never` where it was not reached."""
    if math.isnan(crossing.at):
        return never
    return f"{'at most ' if crossing.censored else ''}{crossing.at:,.0f}"


# The tables -------------------------------------------------------------------------------------

READING = (
    "Between measured levels gains are taken as linear; `at most` stands where it was reached "
    "before the first one. First line: by the mean gains over seeds; below: of each seed alone."
)
HALF = (
    "Until half of the gain that the largest level ends with; another final gain is another goal, "
    "so an algorithm that gains little may seem quick."
)
SECONDS = (
    "Until the gain over the base is first reached; seconds are those of training without "
    "evaluations, as the runs logged them, of each level's whole run. `not reached`: no level has "
    "the gain."
)


def half_gain(
    records: Records,
    group: Group,
    name: str,
    axis: str,
    gain: float,
    more: Mapping[str, str] | None = None,
) -> list[Table]:
    """What half of the final gain took, and the seconds that a fixed gain took.

    Args:
        records: Of the study.
        group: Its images grow along `axis`; seconds are those of its runs.
        name: Of the tables' files.
        axis: Whose levels are numbers, such as of images.
        gain: Over the base, whose seconds are told, above 0.
        more: By further axes of numbers, the names of the groups that have them.

    Returns:
        Two tables, without those that have no row.
    """
    groups = {axis: group}
    for other, named in (more or {}).items():
        if named in records.study.groups:
            groups[other] = records.study.groups[named]
    made = [
        _half_gain_table(records, groups, name, list({axis: 0, **(more or {})})),
        _seconds_table(records, group, f"{name}-seconds", axis, gain),
    ]
    return [table for table in made if table.rows]


def check_half_gain(name: str, entry: Mapping[str, Any], groups: Mapping[str, Group]) -> None:
    """Refuse a table of `half_gain` that the groups which are there cannot give.

    Raises:
        ValueError: A group has not such an axis, or the gain is not above 0.
    """
    if not entry["gain"] > 0:
        raise ValueError(
            f"{name}: expected a gain above 0, got {entry['gain']}; name one such as 0.05"
        )
    for axis, named in {entry["axis"]: entry["group"], **entry.get("more", {})}.items():
        if named in groups:
            check_numbers(groups[named], axis)


def check_numbers(group: Group, axis: str) -> None:
    """Raise a ValueError where an axis of a group is not one of numbers."""
    levels = group.axes.get(axis, ())
    if not levels or not all(level.replace(".", "", 1).isdigit() for level in levels):
        raise ValueError(
            f"group {group.name}: expected an axis {axis} whose levels are numbers, got "
            f"{list(levels) or list(group.axes)}; name another axis"
        )


def _half_gain_table(
    records: Records, groups: Mapping[str, Group], name: str, axes: Sequence[str]
) -> Table:
    """A row for each place beside the axis and each domain, a column for each axis."""
    first = next(iter(groups))
    others = [axis for axis in groups[first].axes if axis != first]
    rows: list[list[Content]] = []
    for labels in _places(groups[first], others):
        sides = {axis: Side.of(group, labels, axis) for axis, group in groups.items()}
        for domain in ("id", "ood"):
            found = {a: _gains(records, side.cells, domain) for a, side in sides.items()}
            told = [
                _halves(sides[axis].spent, found[axis]) if axis in sides else NOTHING
                for axis in axes
            ]
            if any(found.values()):
                seeds = max(map(len, found.values()))
                rows.append([*labels.values(), DOMAINS[domain], seeds, *told])
    title = f"{' and '.join(axes).capitalize()} needed for half of the final gain"
    columns = [*others, "domain", "seeds", *axes]
    return Table(name, title, columns, rows, len(others) + 2, f"{HALF} {READING}")


def _halves(spent: Sequence[float], gains: Mapping[int, Numbers]) -> Content:
    if not gains:
        return NOTHING
    return _lines(lambda own: tell(half_gain_at(spent, own), "no gain"), gains)


def _seconds_table(records: Records, group: Group, name: str, axis: str, gain: float) -> Table:
    others = [other for other in group.axes if other != axis]
    rows: list[list[Content]] = []
    for labels in _places(group, others):
        cells = Side.of(group, labels, axis).cells
        for domain in ("id", "ood"):
            gains = _gains(records, cells, domain)
            if gains:
                told = _seconds(records, cells, gains, gain)
                rows.append([*labels.values(), DOMAINS[domain], len(gains), *told])
    columns = [*others, "domain", "seeds", f"seconds until {gain:+.3f}", "seconds of the levels"]
    title = f"Seconds until a gain of {gain:+.3f}: {heading(group)}"
    return Table(name, title, columns, rows, len(others) + 2, f"{SECONDS} {READING}")


def _seconds(
    records: Records, cells: Sequence[Cell], gains: Mapping[int, Numbers], wanted: float
) -> list[Content]:
    """When a gain was reached, and what was spent until the end of each level."""
    spent = {
        seed: np.array([records.of(cell)[seed].costs.seconds for cell in cells]) for seed in gains
    }
    both = {seed: np.stack([spent[seed], gains[seed]]) for seed in gains}

    def told(own: Numbers) -> str:
        if np.isnan(own[0]).any():
            return "seconds not logged"
        return tell(reached_at(own[0], own[1], wanted), "not reached")

    means = np.mean(list(spent.values()), axis=0)
    return [_lines(told, both), ", ".join(f"{seconds:,.0f}" for seconds in means)]


def _places(group: Group, axes: Sequence[str]) -> list[dict[str, str]]:
    """The labels on some axes that a group's places have, each once."""
    found = [{axis: cell.labels[axis] for axis in axes} for cell in group.cells]
    return [labels for at, labels in enumerate(found) if labels not in found[:at]]


def _gains(records: Records, cells: Sequence[Cell], domain: str) -> dict[int, Numbers]:
    """[N] over the base, by each seed that the base and all places have."""
    runs = [records.of(cell) for cell in cells]
    found: dict[int, Numbers] = {}
    for seed in sorted(set.intersection(*map(set, runs))) if runs else ():
        base = records.base(seed)
        if base is not None:
            found[seed] = _over(base, [run[seed] for run in runs], domain)
    return found


def _over(base: Record, runs: Sequence[Record], domain: str) -> Numbers:
    scores = np.array([domain_score(record, domain) for record in runs])
    return scores - domain_score(base, domain)


def _lines(told: Callable[[Numbers], str], by_seed: Mapping[int, Numbers]) -> tuple[str, str]:
    """What is told of the mean over seeds, and of each seed."""
    own = "; ".join(told(values) for values in by_seed.values())
    return told(np.mean(list(by_seed.values()), axis=0)), f"seeds: {own}"
