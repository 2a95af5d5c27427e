"""The tables of a report: of each suite, of the domains, of the rewards, of metrics and costs.

Each public function is what `kind` of a table in a study's file names; its arguments behind `name`
are the entry's other words. Numbers are means over seeds with their sample deviation; a gain
compares each run with the base of its own seed, drawn with the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from operator import attrgetter
from typing import Any

from cotgen_pl.evaluation.tables import DOMAINS
from cotgen_pl.study.definition import Group
from cotgen_pl.study.entries import Content, Entry, Spread, Table, compare
from cotgen_pl.study.folders import STRICT, Record, Records, SuiteVerdicts
from cotgen_pl.study.rows import (
    BEST,
    REWARD,
    Row,
    axis_beside_reward,
    base_records,
    best_records,
    domain_score,
    gain_of,
    rows_of,
    suite_score,
    suites_in,
)

COMPARISONS = {
    "free": "",
    "growing": " (growing: the images grow with it)",
    "controlled": " (controlled: the images are fixed)",
}
"""What stands behind a group's title."""
GAINS = (
    "Below each mean: the gain over the base of the same seed, and that gain in percent of the "
    "base's number. ± is the sample deviation over seeds."
)
STAR = " *"
IMAGES = "images sampled"
MEASURED = ("seconds", "peak memory, GB", "gain per minute")
"""How titles of columns begin that the clock and the machine decide: not the same of equal runs."""


Measure = Callable[[Record], float]


@dataclass(frozen=True)
class Column:
    """One number of each run."""

    title: str
    measure: Measure
    form: str = ".3f"
    compared: bool = True
    """Whether the gain over the base stands below it."""


def heading(group: Group) -> str:
    """A group's title, and what its runs have in common."""
    return group.title + COMPARISONS[group.comparison]


# Scores -----------------------------------------------------------------------------------------


def suites(
    records: Records,
    group: Group,
    name: str,
    means: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    marks: Sequence[Mapping[str, Any]] = (),
) -> list[Table]:
    """A table for each suite, with a column for each of its categories.

    Args:
        records: Of the study.
        group: Its runs are rows, beside the base and the best of four by each reward.
        name: Of the tables' files; the suite's name follows.
        means: By suite, and by names of your own, categories whose mean has a column too.
        marks: Each with `labels`, `domain` and `note`: in that domain's tables, rows with these
            labels have a star, and the note stands below.
    """
    rows = rows_of(records, group)
    tables = []
    for suite in suites_in(rows):
        own = [mark for mark in marks if mark["domain"] == suite.domain]
        columns = _suite_columns(suite, (means or {}).get(suite.suite, {}))
        title = f"{suite.suite}, {DOMAINS[suite.domain]}"
        note = " ".join([GAINS, *(f"* {mark['note']}" for mark in own)])
        table = _tabulate(f"{name}-{suite.suite}", title, group.axes, rows, columns, note)
        tables.append(_with_stars(table, list(group.axes), own))
    return tables


def _suite_columns(suite: SuiteVerdicts, means: Mapping[str, Sequence[str]]) -> list[Column]:
    def column(title: str, categories: Sequence[str | None], kind: str = "graded") -> Column:
        measure = partial(suite_score, suite=suite.suite, categories=categories, kind=kind)
        return Column(title, measure)

    return [
        column("mean", [None]),
        column("strict mean", [None], STRICT),
        *(column(title, categories) for title, categories in means.items()),
        *(column(suite.name_of(own), [own]) for own in dict.fromkeys(suite.categories)),
    ]


def _with_stars(table: Table, axes: Sequence[str], marks: Sequence[Mapping[str, Any]]) -> Table:
    """The same with a star behind the first label of each row that has the labels of a mark.

    Args:
        table: Its first columns are labels.
        axes: What these are the levels of.
        marks: As `suites` takes them.
    """
    rows = []
    for row in table.rows:
        labels = dict(zip(axes, map(str, row), strict=False))
        has_star = any(mark["labels"].items() <= labels.items() for mark in marks)
        rows.append([f"{row[0]}{STAR}", *row[1:]] if has_star else row)
    return replace(table, rows=rows)


def domains(records: Records, group: Group, name: str) -> list[Table]:
    """Means over the suites of each domain, with images and the divergence that they took."""
    rows = rows_of(records, group)
    columns = [Column(IMAGES, attrgetter("costs.images"), ",.0f", compared=False)]
    for domain in dict.fromkeys(suite.domain for suite in suites_in(rows)):
        columns += [
            Column(DOMAINS[domain], partial(domain_score, domain=domain)),
            Column(f"{DOMAINS[domain]}, strict", partial(domain_score, domain=domain, kind=STRICT)),
        ]
    columns.append(Column("KL to the base", attrgetter("costs.kl_to_base"), compared=False))
    return [_tabulate(name, heading(group), group.axes, rows, columns, f"{GAINS} {KL_UNIT}")]


def shifts(records: Records, group: Group, name: str) -> list[Table]:
    """What is gained in domain, out of domain and under each shift, and what each move costs."""
    rows = [row for row in rows_of(records, group) if row.kind != "base"]
    near = _gain(records, partial(domain_score, domain="id"))
    moved = {DOMAINS["ood"]: _gain(records, partial(domain_score, domain="ood"))} | {
        f"shift of {suite.suite}": _gain(records, partial(suite_score, suite=suite.suite))
        for suite in suites_in(rows)
        if suite.domain == "shift"
    }
    columns = [Column(DOMAINS["id"], near, "+.3f", compared=False)]
    for title, far in moved.items():
        columns += [
            Column(title, far, "+.3f", compared=False),
            Column(f"cost, {title}", partial(_loss, near, far), "+.3f", compared=False),
        ]
    note = (
        "Gains over the base of the same seed, as means over categories. The cost of a move is the "
        "gain in domain less the gain there. ± is the sample deviation over seeds."
    )
    title = f"Which shift costs what: {heading(group)}"
    return [_tabulate(name, title, group.axes, rows, columns, note)]


def _gain(records: Records, score: Measure) -> Measure:
    """By how much a run's score lies above that of the base of its seed; NaN without a base."""

    def measure(record: Record) -> float:
        base = records.base(record.seed)
        return score(record) - score(base) if base else math.nan

    return measure


def _loss(near: Measure, far: Measure, record: Record) -> float:
    return near(record) - far(record)


def metrics(
    records: Records, group: Group, name: str, title: str, metrics: Mapping[str, str]
) -> list[Table]:
    """What was logged last under some names, and of the base what its evaluation says of it.

    Args:
        records: Of the study.
        group: Its runs are rows.
        name: Of the table's file.
        title: What they tell; the group's title follows.
        metrics: Logged names by the titles of their columns.
    """
    rows = [row for row in rows_of(records, group) if row.kind != "best"]
    columns = [
        Column(column, partial(last_value, metric=metric)) for column, metric in metrics.items()
    ]
    logged = ", ".join(f"`{metric}`" for metric in metrics.values())
    note = (
        f"The last that was logged as {logged}; docs/metrics.md says what each is. Of the "
        "base, which logs nothing: what its verdicts hold, or else its log, in three decimals. "
        f"{GAINS}"
    )
    return [_tabulate(name, f"{title}: {heading(group)}", group.axes, rows, columns, note)]


def last_value(record: Record, metric: str) -> float:
    """The last logged number of a metric; NaN where there is none."""
    return float(record.metrics[metric].values[-1]) if metric in record.metrics else math.nan


# Costs ------------------------------------------------------------------------------------------

KL_UNIT = "KL: exact over the codebook, along drawn images, mean per token, in nats."


def costs(records: Records, group: Group, name: str) -> list[Table]:
    """What each run took, and what it gained in a minute of training."""
    rows = [row for row in rows_of(records, group) if row.kind == "trained"]
    counts = [
        Column(title, attrgetter(f"costs.{attribute}"), form, compared=False)
        for title, attribute, form in (
            (IMAGES, "images", ",.0f"),
            ("sequences back-propagated", "sequences", ",.0f"),
            ("optimizer steps", "optimizer_steps", ",.0f"),
            (MEASURED[0], "seconds", ",.0f"),
            ("KL to the base", "kl_to_base", ".3f"),
            (MEASURED[1], "peak_memory_gb", ".2f"),
        )
    ]
    speeds = [
        Column(f"{MEASURED[2]}, {DOMAINS[d]}", _gain_per_minute(records, d), "+.3f", False)
        for d in ("id", "ood")
    ]
    note = (
        "A pair back-propagates two sequences; seconds are those of training without evaluations. "
        "Seconds, memory and gain per minute are measured; all else is the same of equal runs. "
        f"{KL_UNIT} ± is the sample deviation over seeds."
    )
    return [_tabulate(name, heading(group), group.axes, rows, [*counts, *speeds], note)]


def _gain_per_minute(records: Records, domain: str) -> Measure:
    gain = _gain(records, partial(domain_score, domain=domain))
    return lambda record: 60 * gain(record) / record.costs.seconds


# Rewards ----------------------------------------------------------------------------------------


def rewards(
    records: Records, group: Group, name: str, marks: Sequence[Mapping[str, Any]] = ()
) -> list[Table]:
    """Of each reward, what it gains by choosing alone, and what training on it gains.

    Args:
        records: Of the study.
        group: Its rewards are rows.
        name: Of the table's file.
        marks: As `suites` takes them; a note says which domain it is about.

    Raises:
        ValueError: The group has other axes than `reward` and one more.
    """
    other = axis_beside_reward(group)
    found = {(row.labels[REWARD], row.labels[other]): row for row in rows_of(records, group)}
    bases = base_records(records, group)
    ways = [(way, domain) for way in (BEST, *group.axes[other]) for domain in ("id", "ood")]
    lines: list[list[Content]] = []
    for reward in group.axes[REWARD]:
        gains = [gain_of(found.get((reward, way)), bases, domain) for way, domain in ways]
        seeds = max(gain.seeds for gain in gains)
        if seeds:
            lines.append([reward, seeds, *(Entry(g, form="+.3f", row_seeds=seeds) for g in gains)])
    columns = [REWARD, "seeds", *(f"{way}, {DOMAINS[domain]}" for way, domain in ways)]
    note = (
        f"Gains over the base of the same seed. {BEST.capitalize()}: of the base's pictures the "
        "reward chooses, without any training. ± is the sample deviation over seeds; a number of "
        "fewer seeds than its row says of how many."
    )
    note = " ".join([note, *(f"* {DOMAINS[mark['domain']]}: {mark['note']}" for mark in marks)])
    return [_with_stars(Table(name, heading(group), columns, lines, 2, note), [REWARD], marks)]


def uplifts(records: Records, group: Group, name: str) -> list[Table]:
    """What the best of four of the base's pictures by each scorer reaches, on every suite.

    Scorers are the group's rewards, and all others that looked at the base's pictures.
    """
    bases, judge = base_records(records, group), records.study.judge
    watched = [name for base in bases.values() for s in base.suites.values() for name in s.watched]
    scorers = dict.fromkeys([*group.axes.get(REWARD, ()), *([judge] if judge else []), *watched])
    rows = [Row("base", {CHOOSER: "none: the base"}, bases)]
    rows += [Row("best", {CHOOSER: s}, best_records(bases, s, judge)) for s in scorers]
    columns = [
        Column(f"{suite.suite}, {DOMAINS[suite.domain]}", partial(suite_score, suite=suite.suite))
        for suite in suites_in(rows)
    ]
    title = f"{BEST.capitalize()} by each scorer, on every suite"
    return [_tabulate(name, title, [CHOOSER], rows, columns, GAINS)]


CHOOSER = "chosen by"


# Making a table ---------------------------------------------------------------------------------


def _tabulate(
    name: str,
    title: str,
    axes: Collection[str],
    rows: Sequence[Row],
    columns: Sequence[Column],
    note: str,
) -> Table:
    """Rows and columns in which any number is known; the rest is left out."""
    base = next((row.records for row in rows if row.kind == "base"), {})
    cells = [[_entry(column, row, base) for column in columns] for row in rows]
    kept = [any(line[place].score.seeds for line in cells) for place in range(len(columns))]
    lines: list[list[Content]] = [
        [*row.labels.values(), len(row.records), *compress(line, kept)]
        for row, line in zip(rows, cells, strict=True)
        if any(entry.score.seeds for entry in line)
    ]
    titles = [
        *(axis.replace("_", " ") for axis in axes),
        "seeds",
        *compress([column.title for column in columns], kept),
    ]
    unknown = [column.title for column, keep in zip(columns, kept, strict=True) if not keep]
    if unknown:
        note += f" Not known of any row: {', '.join(unknown)}."
    return Table(name, title, titles, lines, len(axes) + 1, note)


def _entry(column: Column, row: Row, base: Mapping[int, Record]) -> Entry:
    values = {seed: column.measure(record) for seed, record in row.records.items()}
    entry = Entry(Spread.of(values.values()), form=column.form)
    if row.kind != "base" and column.compared:
        of_base = {seed: column.measure(record) for seed, record in base.items()}
        entry = compare(values, of_base, column.form)
    return replace(entry, row_seeds=len(row.records))
