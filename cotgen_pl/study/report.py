"""The report of a study: which tables, charts and pictures stand where, and what is said of them.

All of it is made of records: what no run folder holds is not in the report, and is named as
missing. What is shown is listed in the study's file, each entry with its `group`, with `kind` (a
function of `tables.py`, `figures.py` or `grids.py`) and with that function's own arguments:

    tables:   suites, shifts, domains, rewards, uplifts, metrics, costs, half_gain
    figures:  summary, curves, uplift, best_of_n, levels, comparison, pictures
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cotgen_pl.files import write_whole
from cotgen_pl.interfaces import check_choice
from cotgen_pl.study import efficiency, figures, grids, tables
from cotgen_pl.study.claims import Found
from cotgen_pl.study.definition import Group, Study
from cotgen_pl.study.entries import Content, Illustration, Table
from cotgen_pl.study.folders import Records
from cotgen_pl.study.page import Block, Section, as_html, as_markdown, files_of
from cotgen_pl.study.rows import REWARD, axis_beside_reward
from cotgen_pl.study.sections import (
    claim_blocks,
    introduction,
    missing_blocks,
    origin_blocks,
)

Maker = Callable[..., Sequence[Table | Illustration]]

TABLES: Mapping[str, Maker] = {
    f.__name__: f
    for f in (
        tables.suites,
        tables.shifts,
        tables.domains,
        tables.rewards,
        tables.uplifts,
        tables.metrics,
        tables.costs,
        efficiency.half_gain,
    )
}
FIGURES: Mapping[str, Maker] = {
    f.__name__: f
    for f in (
        figures.summary,
        figures.curves,
        figures.uplift,
        figures.best_of_n,
        figures.levels,
        grids.comparison,
        grids.pictures,
    )
}
SECTIONS = {
    "Results": ("suites", "shifts"),
    "Against images and against divergence": ("curves",),
    "Rewards by themselves": ("rewards", "uplifts", "uplift", "best_of_n"),
    "Strategies and variants": ("levels", "domains", "metrics"),
    "Pictures": ("comparison", "pictures"),
    "Costs": ("half_gain", "costs"),
}
"""Sections by title, with what is shown in them, in this order within each group."""
COMMON = ("group", "kind", "deviation")
"""Words of every entry; `deviation` is for `cotgen_pl.study.checks`: whether it needs two seeds."""
OWNED = ("figures", "pictures", "tables")
"""Subfolders of a report; what an earlier report left there is removed."""


def write_report(records: Records, claims: Sequence[Found], folder: Path) -> Path:
    """Write the page, the same in Markdown, and the files beside it.

    Args:
        records: All that the report tells.
        claims: With what became of them.
        folder: For `report.html`, `report.md` and the subfolders `OWNED`.

    Returns:
        Path of the page.

    Raises:
        ValueError: The study shows what there is not; see `check_shown`.
    """
    check_shown(records.study)
    sections = write_sections(records, claims)
    files = files_of(sections)
    files["report.md"] = as_markdown(records.study.title, sections).encode()
    files["report.html"] = as_html(records.study.title, sections).encode()
    for path in (p for name in OWNED for p in (folder / name).glob("*") if p.is_file()):
        path.unlink()
    for name, content in files.items():
        write_whole(folder / name, partial(_write_bytes, content))
    return folder / "report.html"


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


# What a study's file may ask for ----------------------------------------------------------------


def check_shown(study: Study) -> None:
    """Refuse tables and figures that no function makes.

    Raises:
        ValueError: Names the entry, and the words that it may have.
    """
    for known, entries in ((TABLES, study.tables), (FIGURES, study.figures)):
        for name, entry in entries.items():
            if entry.get("kind") not in known:
                raise ValueError(
                    f"{name}: expected kind to be one of {', '.join(known)}, got "
                    f"{entry.get('kind')!r}; name one"
                )
            taken = list(inspect.signature(known[entry["kind"]]).parameters.values())[3:]
            words = [parameter.name for parameter in taken]
            needed = {p.name for p in taken if p.default is inspect.Parameter.empty}
            unknown, missing = _arguments(entry).keys() - words, needed - entry.keys()
            if unknown or missing:
                raise ValueError(
                    f"{name}: expected words of {entry['kind']} ({', '.join(words)}), got unknown "
                    f"{sorted(unknown)}, missing {sorted(missing)}; correct the entry"
                )
            check_axes(name, entry, study.groups[entry["group"]])
            if entry["kind"] == "half_gain":
                efficiency.check_half_gain(name, entry, study.groups)


BY_REWARD = ("rewards", "uplift")
"""Kinds of entries for groups with an axis `reward` and one more."""


def check_axes(name: str, entry: Mapping[str, Any], group: Group) -> None:
    """Refuse an entry that asks for axes or levels that its group does not have."""
    if entry["kind"] in BY_REWARD:
        axis_beside_reward(group)
    wanted = [entry["axis"]] if "axis" in entry else []
    wanted += [REWARD] if entry["kind"] == "best_of_n" else []
    absent = [axis for axis in wanted if axis not in group.axes]
    labels = [entry.get("labels", {}), *(mark["labels"] for mark in entry.get("marks", ()))]
    for axis, level in (item for own in labels for item in own.items()):
        absent += [f"{axis} {level!r}"] if level not in group.axes.get(axis, ()) else []
    if absent:
        axes = {axis: list(levels) for axis, levels in group.axes.items()}
        raise ValueError(
            f"{name}: expected axes and levels of group {group.name} ({axes}), got {absent[0]}; "
            "correct the entry"
        )
    for across in entry.get("against", ()):
        check_choice("against", across, figures.Against)


def _arguments(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in COMMON}


def shown_blocks(records: Records, kinds: Sequence[str]) -> Iterator[Table | Illustration]:
    """What the study's file lists of some kinds, group by group; nothing without a finished run."""
    study, known = records.study, {**TABLES, **FIGURES}
    entries = [*study.tables.items(), *study.figures.items()]
    for group in study.groups.values():
        for kind in kinds:
            for name, entry in entries:
                if (entry["group"], entry["kind"]) == (group.name, kind) and any(
                    records.rows(group)
                ):
                    yield from known[kind](records, group, name, **_arguments(entry))


# Sections ---------------------------------------------------------------------------------------


def write_sections(records: Records, claims: Sequence[Found]) -> list[Section]:
    """All sections that have something to say, in order."""
    shown = [Section(title, list(shown_blocks(records, s))) for title, s in SECTIONS.items()]
    sections = [
        Section("In short", [*introduction(records), *shown_blocks(records, ("summary",))]),
        Section("Claims", claim_blocks(claims)),
        *shown,
        Section("What is missing", [*missing_blocks(records), *refused_blocks(records)]),
        Section("How it was made", origin_blocks(records)),
    ]
    return [section for section in sections if section.blocks]


def refused_blocks(records: Records) -> list[Block]:
    """Finished runs that are not those of the study's file; no number of theirs is told."""
    rows: list[list[Content]] = [
        [run, seed, f"made with other settings: {difference}"]
        for (run, seed), difference in records.refused.items()
    ]
    note = (
        "The folder's saved configuration differs from what the study's file says now. Change the "
        "file back, name another folder for the study, or remove the run's folder."
    )
    columns = ["run", "seed", "why it is left out"]
    title = "Runs that were made with other settings"
    return [Table("refused-runs", title, columns, rows, 1, note)] if rows else []
