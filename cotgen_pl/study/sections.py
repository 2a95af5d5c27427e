"""What a report says in words: what was run, what came of the claims, what is missing, its origin.

Apart from `report.py`, which says where tables and charts stand. No sentence here has a number that
the records or the claims do not have.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from math import isnan
from typing import Any

import numpy as np

from cotgen_pl.study.claims import Found
from cotgen_pl.study.definition import Run
from cotgen_pl.study.entries import NOTHING, Content, Table
from cotgen_pl.study.folders import Record, Records
from cotgen_pl.study.page import Block, Code, Points
from cotgen_pl.study.statistics import MOST_UNDEFINED, SMALLEST_EFFECT, Interval, judge_claim

# Introduction -----------------------------------------------------------------------------------


def introduction(records: Records) -> list[Block]:
    """What was run, and how to read the numbers."""
    study = records.study
    planned = sum(1 for _ in study.seeded_runs())
    finished = planned - len(records.missing)
    return [
        f"{finished} of {planned} runs are finished ({len(study.runs)} settings, each with its "
        "seeds). Every number is made from the files of a finished run's folder; a folder that is "
        "gone takes its rows along.",
        "In domain means prompts like those that were trained on; out of domain means other words "
        "and other wording. Scores are the suites' own, 0 to 1; `strict` counts a picture only "
        "where all of its prompt holds. ± is the sample deviation over seeds, ± ? that there is "
        "one seed.",
    ]


# Claims -----------------------------------------------------------------------------------------

UNTESTED = "not tested"
FINDINGS = ("seen", "not seen", "unclear", UNTESTED)
TEST = (
    "What is claimed was written down before any run, but for what is marked as added after the "
    "runs; how it is tested may have been corrected since, which the CHANGELOG tells. Seen: the "
    f"95 % interval lies above 0, and the mean is at least {SMALLEST_EFFECT}. Not seen: its upper "
    f"end lies below {SMALLEST_EFFECT}. Else unclear, and so is what has no number in more than "
    f"{MOST_UNDEFINED:.0%} of the resamples. The numbers are differences of scores between 0 and "
    "1 where no other unit stands behind them. Every interval is resampled over seeds and over "
    "prompts within suite and category, both drawn alike for all that a claim compares, the base "
    "too, and so paired by seed and prompt. Those of three seeds are too narrow: three seeds have "
    "only 10 different resamples (six have 462). Not tested: runs are missing."
)
UNITS = {
    "correlation": "in rank correlation",
    "spread": "in the sample deviation over {over}",
    "efficiency": "of the largest number of {over}",
}
"""What stands behind a test's number, where that is not a score's difference."""


def claim_blocks(claims: Sequence[Found]) -> list[Block]:
    """What was found of each claim, what of it contradicts the paper, and which controls fail."""
    if not claims:
        return []
    counts = {finding: [_finding(c) for c in claims].count(finding) for finding in FINDINGS}
    told = ", ".join(f"{number} {finding}" for finding, number in counts.items() if number)
    rows: list[list[Content]] = [
        [found.claim.says, _finding(found), tuple(_numbers(found)), found.seeds, _whose(found)]
        for found in claims
    ]
    columns = ["claim", "finding", "mean (95 % interval)", "seeds", "whose"]
    return [
        f"Of {len(claims)} claims: {told}.",
        *surprises(claims),
        *undecided([found for found in claims if found.claim.paper]),
        Table("claims", "Claims and findings", columns, rows, 1, TEST),
    ]


def _whose(found: Found) -> str:
    claim = found.claim
    marks = ["a control"] * claim.control + ["added after the runs"] * claim.post_hoc
    return ", ".join(["the paper" if claim.paper else "ours", *marks])


def surprises(claims: Sequence[Found]) -> list[Block]:
    """What the paper says and these runs do not, and the controls that fail, in so many words."""
    paper = [found for found in claims if found.claim.paper]
    controls = [found for found in claims if found.claim.control]
    against = [found for found in paper if found.finding == "not seen"]
    failing = [found for found in controls if found.finding == "seen"]
    heads = []
    if paper:
        heads.append(
            f"{len(against)} of the paper's {len(paper)} claims "
            f"{'is' if len(against) == 1 else 'are'} contradicted here"
        )
    if controls:
        open_ones = sum(found.finding in (None, "unclear") for found in controls)
        heads.append(
            f"{len(failing)} of {len(controls)} controls {'fails' if len(failing) == 1 else 'fail'}"
            f", {open_ones} could not be decided"
        )
    points = [
        f"The paper: {found.claim.says}. Here {_contradiction(found)}." for found in against
    ] + [
        f"Control fails: {found.claim.says}. Here {'; '.join(_numbers(found))}. Gains elsewhere "
        "may in part be of the same kind."
        for found in failing
    ]
    if not points:
        return [f"{'; '.join(heads)}."] * bool(heads)
    return [f"{'; '.join(heads)}:", Points(points)]


def undecided(claims: Sequence[Found]) -> list[Block]:
    """The paper's claims that these runs neither show nor contradict."""
    points = [
        f"The paper: {found.claim.says}. Here {_finding(found)}"
        f"{f': {told}' if (told := '; '.join(_numbers(found))) != NOTHING else ''}."
        for found in claims
        if found.finding not in ("seen", "not seen")
    ]
    if not points:
        return []
    return [f"Not decided, {len(points)} of the paper's {len(claims)} claims:", Points(points)]


def _contradiction(found: Found) -> str:
    """The comparisons that contradict a claim, the opposite before what is merely not seen.

    The opposite is found where the negative of the number would be seen.
    """
    intervals = found.intervals
    opposite = {name for name, own in intervals.items() if judge_claim(_negative(own)) == "seen"}
    unseen = {name for name, interval in intervals.items() if judge_claim(interval) == "not seen"}
    kept = opposite or unseen
    lines = [
        line for name, line in zip(intervals, _write_intervals(found), strict=True) if name in kept
    ]
    of_all = f" in {len(kept)} of {len(intervals)} comparisons" if len(intervals) > 1 else ""
    told = "the opposite is found" if opposite else "it is not seen"
    return f"{told}{of_all}: {'; '.join(lines)}"


def _negative(interval: Interval) -> Interval:
    return Interval(-interval.mean, -interval.high, -interval.low, interval.undefined)


def _finding(found: Found) -> str:
    return found.finding or UNTESTED


def _numbers(found: Found) -> list[str]:
    """Its intervals, and what a reader must know of them."""
    return [*_write_intervals(found), *([found.reason] if found.reason else [])]


def _write_intervals(found: Found) -> list[str]:
    """A line for each comparison; the name of the only one says nothing."""
    named = len(found.intervals) > 1
    unit = UNITS.get(found.claim.test, "").format(over=found.claim.over)
    return [
        f"{f'{name}: ' if named else ''}{_write_interval(interval, unit)}"
        for name, interval in found.intervals.items()
    ] or [NOTHING]


def _write_interval(interval: Interval, unit: str) -> str:
    if isnan(interval.mean):
        return "no number"
    numbers = f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f}) {unit}".rstrip()
    share = f"{interval.undefined:.1%}" if interval.undefined >= 0.001 else "less than 0.1%"
    without = f", {share} of the resamples have no number" if interval.undefined else ""
    return f"{numbers}{without}"


# What is missing --------------------------------------------------------------------------------


def missing_blocks(records: Records) -> list[Block]:
    """Runs that are not finished, and pictures that no judge could read."""
    blocks: list[Block] = []
    seeds: dict[str, list[int]] = {}
    for run, seed in (place for place in records.missing if place not in records.refused):
        seeds.setdefault(run, []).append(seed)
    if seeds:
        groups = _groups_by_run(records)
        rows: list[list[Content]] = [
            [run, groups.get(run, NOTHING), ", ".join(map(str, own))] for run, own in seeds.items()
        ]
        note = "Not run, not finished, or failed; nothing of them is in any number."
        columns = ["run", "of", "seeds"]
        blocks.append(Table("missing-runs", "Runs that are not here", columns, rows, 1, note))
    unread = [point for record in records.records.values() for point in _unread(record)]
    if unread:
        blocks += ["Pictures without a verdict, which no mean counts:", Points(unread)]
    return blocks or ["Nothing: all runs of the study are finished, and every picture was judged."]


def _groups_by_run(records: Records) -> dict[str, str]:
    """The groups that a run is part of, with what may be dropped first."""
    groups: dict[str, list[str]] = {}
    for group in records.study.groups.values():
        for cell in group.cells:
            groups.setdefault(cell.run, []).append(f"{group.title} ({group.priority})")
    return {run: "; ".join(dict.fromkeys(titles)) for run, titles in groups.items()}


def _unread(record: Record) -> list[str]:
    numbers = {name: int(np.isnan(s.graded).sum()) for name, s in record.suites.items()}
    return [
        f"`{record.run}`, seed {record.seed}, {suite}: {number} of "
        f"{record.suites[suite].graded.size}"
        for suite, number in numbers.items()
        if number
    ]


# Origin -----------------------------------------------------------------------------------------

VERSIONS = ("commit", "cotgen_pl", "torch", "transformers", "lightning")


def origin_blocks(records: Records) -> list[Block]:
    """Commit and versions as the runs wrote them down, and each run's config and command."""
    found = [record.found for record in records.records.values() if record.found]
    told = {
        name: ", ".join(dict.fromkeys(str(f[name]) for f in found if f.get(name)))
        for name in VERSIONS
    }
    versions = [f"{name}: {value}" for name, value in told.items() if value]
    runs = [run for run in records.study.runs.values() if _folders(records, run)]
    rows: list[list[Content]] = [
        [run.name, f"{len(_folders(records, run))} of {len(run.seeds)}", run.config] for run in runs
    ]
    commands = "\n".join(dict.fromkeys(command_of(run) for run in runs))
    note = f"Folders: `{records.study.folder}/RUN/seed_SEED`, each with its whole `config.yaml`."
    columns = ["run", "seeds finished", "config"]
    return [
        *([Points(versions)] if versions else []),
        Table("runs", "Runs", columns, rows, 1, note),
        "What each run's command says beside its seed and its folder:",
        Code(commands),
    ]


def _folders(records: Records, run: Run) -> list[Record]:
    return [record for (name, _), record in records.records.items() if name == run.name]


def command_of(run: Run) -> str:
    """A run's command line, without its seed and its folder."""
    words = ["python", "tools/main.py", run.command, "--config", run.config]
    for name, value in run.overrides.items():
        words += [f"--{name}", _as_word(value)]
    start = f"  # begins where {run.starts_from} ends" if run.starts_from else ""
    return shlex.join(words) + start


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
