"""Grids of pictures: the same prompts and the same noise for all, each with its judge's verdict.

Each public function is what `kind` of a figure in a study's file names. No picture is chosen by
eye: of each category it is the first prompt whose picture was kept, and of each run the first seed
of the group.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from cotgen_pl.callbacks.samples import read_verdict
from cotgen_pl.evaluation.tables import DOMAINS
from cotgen_pl.study.definition import Group
from cotgen_pl.study.entries import NOTHING, Content, Picture, Table
from cotgen_pl.study.folders import Record, Records, SuiteVerdicts
from cotgen_pl.study.rows import Row, rows_of, suites_in
from cotgen_pl.study.tables import heading

SIDE = 96  # pixels that a small picture is at least enlarged to, by whole numbers
WIDEST = 192  # pixels that a large picture is reduced to
JUDGED = ("id", "ood")


def comparison(records: Records, group: Group, name: str, labels: Mapping[str, str]) -> list[Table]:
    """A table for each suite in and out of domain: prompts below each other, beside them the runs.

    Args:
        records: Of the study.
        group: Its base and its runs are columns.
        name: Of the tables' files; the suite's name follows.
        labels: Only runs with these are shown, such as those of one reward.
    """
    rows = [row for row in _first_seed(records, group) if _is_shown(row, labels)]
    titles = [_short_title(row, labels) for row in rows]
    title = ", ".join([group.title, *labels.values()])
    return [
        Table(
            f"{name}-{suite.suite}",
            f"{title}: {suite.suite}, {DOMAINS[suite.domain]}",
            ["prompt", *titles],
            [
                [prompt, *(picture_of(row, suite.suite, index) for row in rows)]
                for index, prompt in _prompts(rows, suite).items()
            ],
            1,
            CHOICE,
        )
        for suite in suites_in(rows)
        if suite.domain in JUDGED and _prompts(rows, suite)
    ]


def pictures(records: Records, group: Group, name: str, per_suite: int = 3) -> list[Table]:
    """A row for the base and for each place of a group, a column for each prompt.

    Args:
        records: Of the study.
        group: What is shown.
        name: Of the table's file.
        per_suite: Prompts of each suite in and out of domain, of different categories.
    """
    rows = _first_seed(records, group)
    shown = [
        (suite, index, prompt)
        for suite in suites_in(rows)
        if suite.domain in JUDGED
        for index, prompt in itertools.islice(_prompts(rows, suite).items(), per_suite)
    ]
    lines: list[list[Content]] = [
        [row.title, *(picture_of(row, suite.suite, index) for suite, index, _ in shown)]
        for row in rows
    ]
    columns = ["", *(f"{prompt} ({DOMAINS[suite.domain]})" for suite, _, prompt in shown)]
    return [Table(name, heading(group), columns, lines, 1, CHOICE)] if shown else []


CHOICE = (
    "The same prompts and the same noise for all, of one seed. Of each category the first prompt "
    "whose picture was kept; none was chosen by eye. Below each picture: the judge's score and "
    "what it missed."
)


# Which pictures ---------------------------------------------------------------------------------


def _first_seed(records: Records, group: Group) -> list[Row]:
    """The base and the runs with the record of the group's first seed alone, where it is there."""
    seed = group.cells[0].seeds[0]
    return [
        Row(row.kind, row.labels, {seed: row.records[seed]})
        for row in rows_of(records, group)
        if row.kind != "best" and seed in row.records
    ]


def _is_shown(row: Row, labels: Mapping[str, str]) -> bool:
    return row.kind == "base" or labels.items() <= row.labels.items()


def _short_title(row: Row, labels: Mapping[str, str]) -> str:
    """Without the labels that all have."""
    own = [label for axis, label in row.labels.items() if axis not in labels and label]
    return ", ".join(own) if row.kind == "trained" and own else row.title


def _prompts(rows: Sequence[Row], suite: SuiteVerdicts) -> dict[int, str]:
    """By place in the suite, the first prompt of each category whose picture any row has."""
    kept = {index for row in rows for index in _record(row).pictures.get(suite.suite, {})}
    first: dict[str, tuple[int, str]] = {}
    for index, prompt, category in zip(suite.indices, suite.prompts, suite.categories, strict=True):
        if index in kept:
            first.setdefault(category, (index, prompt))
    return dict(first.values())


def _record(row: Row) -> Record:
    return next(iter(row.records.values()))


# One picture ------------------------------------------------------------------------------------


def picture_of(row: Row, suite_name: str, index: int) -> Content:
    """What a row's policy drew for a prompt of a suite, or nothing where it was not kept."""
    record = _record(row)
    path = record.pictures.get(suite_name, {}).get(index)
    if path is None:
        return NOTHING
    suite = record.suites[suite_name]
    place = suite.indices.index(index)
    png, side = read_picture(path)
    details = suite.details[place][0] or {}
    return Picture(
        name=re.sub(r"[^\w.-]+", "-", f"{record.run}-{record.seed}-{suite_name}-{index}"),
        png=png,
        side=side,
        alt=f"{row.title}: {suite.prompts[place]}",
        score=float(suite.graded[place, 0]),
        verdict=tuple(text for text, _ in read_verdict(details)),
    )


def read_picture(path: Path) -> tuple[bytes, int]:
    """A PNG as it is shown, and its width: small pictures enlarged without smoothing."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width > WIDEST:
        size = (WIDEST, round(picture.height * WIDEST / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    else:
        factor = max(1, -(-SIDE // picture.width))
        size = (picture.width * factor, picture.height * factor)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    return data.getvalue(), picture.width
