"""A finished run folder, read into one record: all that a report may tell of a run.

Nothing here knows how runs are started, and nothing is kept: what is not in the folder is not in
the record, and a folder that is gone takes its rows along. Files are those of docs/runs.md, "What a
run leaves".
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotgen_pl.study.definition import BASE, Cell, Group, Study

Numbers = NDArray[np.float64]

STRICT = "strict"  # a reward's part of this name is 1 for a right picture, else 0
WATCHED = "watched/"


# Records ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SuiteVerdicts:
    """What is said of G pictures of each of a suite's P prompts, at the end of a run.

    All runs have the same prompts in the same order, and of one seed the same noise: prompt p's
    copy g of one run pairs with that of another.
    """

    suite: str
    domain: str
    """`id`, `ood` or `shift`."""
    indices: list[int]
    """[P], each prompt's place in the suite; names its picture, see `Record.pictures`."""
    prompts: list[str]
    """[P]."""
    categories: list[str]
    """[P]."""
    graded: Numbers
    """[P, G], the suite's own score; NaN for no verdict."""
    strict: Numbers | None
    """[P, G], 1 for a right picture and 0 for another; None where the scorer has no such part."""
    watched: Mapping[str, Numbers]
    """[P, G] by reward that only watched, such as `narrow`; the base has those of all scorers."""
    details: list[list[Any]]
    """P lists of G, what the scorer tells of each picture; None for nothing."""
    names: Mapping[str, str] = field(default_factory=dict)
    """By category what its score is called, where not by the category: brackets tell what is not
    as the benchmark's authors publish it."""

    def name_of(self, category: str) -> str:
        """What the score of a category is called."""
        return self.names.get(category, category)

    def score(self, kind: str = "graded") -> Numbers:
        """[P, G] of `graded` or `strict`; all NaN where there is no strict score."""
        if kind == STRICT:
            return np.full_like(self.graded, math.nan) if self.strict is None else self.strict
        return self.graded

    def weights(self, category: str | None = None) -> Numbers:
        """[P], of each prompt in the suite's mean over categories, or in that of one category."""
        kept = np.array([category in (None, own) for own in self.categories])
        names = sorted({own for own, keep in zip(self.categories, kept, strict=True) if keep})
        counts = np.array([self.categories.count(own) for own in self.categories])
        return np.where(kept, 1.0 / counts / max(1, len(names)), 0.0)

    def prompt_means(self, kind: str = "graded") -> Numbers:
        """[P], mean over the pictures that have a verdict; NaN where none has."""
        values = self.score(kind)
        known = ~np.isnan(values)
        sums, numbers = np.where(known, values, 0.0).sum(1), known.sum(1)
        return np.divide(sums, numbers, out=np.full(len(values), math.nan), where=numbers > 0)

    def mean(self, category: str | None = None, kind: str = "graded") -> float:
        """Mean over categories of the mean over pictures; of one category, over its pictures.

        Pictures without a verdict are left out; NaN where a category has no verdict at all.
        """
        names = [category] if category is not None else sorted(set(self.categories))
        own = np.array(self.categories)
        values = self.score(kind)
        return float(np.mean([_known_mean(values[own == name]) for name in names]))


@dataclass(frozen=True)
class Curve:
    """A metric against what was spent until it was logged."""

    updates: Numbers
    """[N]."""
    images: Numbers
    """[N], sampled for training."""
    values: Numbers
    """[N]."""


@dataclass(frozen=True)
class Costs:
    """What a run took, until its end. NaN for the base, and for what its folder does not say."""

    images: float
    """Sampled for training."""
    sequences: float
    """Back-propagated; a pair has two."""
    optimizer_steps: float
    seconds: float
    """Of training, without evaluations."""
    kl_to_base: float
    """Exact over the codebook, along drawn images, mean per token, in nats."""
    peak_memory_gb: float


@dataclass(frozen=True)
class Record:
    """All that a finished run folder says."""

    folder: Path
    run: str
    seed: int
    suites: Mapping[str, SuiteVerdicts]
    """By name, of the end of training; of the base as it is."""
    metrics: Mapping[str, Curve]
    """By logged name, such as `val/id/mean`; the base has only its suites' diversity."""
    costs: Costs
    pictures: Mapping[str, Mapping[int, Path]]
    """By suite and by the prompt's place in it, the picture of copy 0, where it was kept."""
    found: Mapping[str, Any]
    """run.json: commit, versions and the policy; of the base, which has no such file, the versions
    that its verdicts name, without a commit."""

    def domain_mean(self, domain: str, kind: str = "graded") -> float:
        """Mean over a domain's suites of each one's mean over categories."""
        return float(np.mean([s.mean(kind=kind) for s in self.suites_of(domain)]))

    def suites_of(self, domain: str) -> list[SuiteVerdicts]:
        """The suites of a domain.

        Raises:
            ValueError: There is none.
        """
        found = [suite for suite in self.suites.values() if suite.domain == domain]
        if not found:
            raise ValueError(
                f"{self.folder}: expected a suite of domain {domain}, got "
                f"{[suite.domain for suite in self.suites.values()]}; evaluate one"
            )
        return found


@dataclass(frozen=True)
class Records:
    """The records of a study, and what is not there."""

    study: Study
    records: Mapping[tuple[str, int], Record]
    """By run and seed."""
    missing: tuple[tuple[str, int], ...]
    """Runs and seeds that are not finished, or were made with other settings."""
    refused: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Those with other settings than the study's file names, with what differs."""

    def base(self, seed: int) -> Record | None:
        """The policy without training, drawn with the noise of a seed."""
        return self.records.get((BASE, seed))

    def of(self, cell: Cell) -> dict[int, Record]:
        """By seed, the finished runs of a place in a group."""
        return {s: self.records[cell.run, s] for s in cell.seeds if (cell.run, s) in self.records}

    def rows(self, group: Group | str) -> Iterator[tuple[Cell, dict[int, Record]]]:
        """Each place of a group with its finished runs; places without any are left out."""
        own = self.study.groups[group] if isinstance(group, str) else group
        for cell in own.cells:
            found = self.of(cell)
            if found:
                yield cell, found


# Reading ----------------------------------------------------------------------------------------


def read_record(folder: Path, run: str, seed: int) -> Record:
    """Read a finished run folder.

    Raises:
        ValueError: It holds no verdicts.
    """
    contents = _read_contents(folder / "evaluation")
    suites = {name: _read_suite(content) for name, content in contents.items()}
    if not suites:
        raise ValueError(
            f"expected verdicts in {folder / 'evaluation'}, got none; let the run finish, with "
            "SuiteEvaluation among its callbacks"
        )
    metrics = _read_metrics(folder / "metrics.csv") or _read_diversity(folder, contents)
    return Record(
        folder=folder,
        run=run,
        seed=seed,
        suites=suites,
        metrics=metrics,
        costs=_costs(metrics),
        pictures={name: _read_pictures(folder, name) for name in suites},
        found=_read_found(folder, contents.values()),
    )


def _read_contents(folder: Path) -> dict[str, Any]:
    """By suite; `<suite>-<digest>.json` has older verdicts, of other weights or seeds."""
    contents = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*.json"))}
    return {name: content for name, content in contents.items() if content["suite"] == name}


def _read_found(folder: Path, contents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    path = folder / "run.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    versions = [content.get("variant", {}).get("versions", {}) for content in contents]
    return {name: version for own in versions for name, version in own.items()}


def _read_suite(content: Mapping[str, Any]) -> SuiteVerdicts:
    rows = sorted(content["verdicts"], key=lambda row: (row["index"], row["copy"]))
    copies = 1 + max(row["copy"] for row in rows)
    first = rows[::copies]
    categories = dict.fromkeys(row["category"] for row in first)

    def table(value: Any) -> Numbers:
        numbers = [math.nan if v is None else v for v in map(value, rows)]
        return np.array(numbers, dtype=np.float64).reshape(-1, copies)

    others = [name for name in rows[0]["others"] if name.startswith(WATCHED)]
    return SuiteVerdicts(
        suite=content["suite"],
        domain=content["domain"],
        indices=[row["index"] for row in first],
        prompts=[row["prompt"] for row in first],
        categories=[row["category"] for row in first],
        graded=table(lambda row: row["total"]),
        strict=table(lambda row: row["parts"][STRICT]) if STRICT in rows[0]["parts"] else None,
        watched={
            name.removeprefix(WATCHED): table(lambda row, name=name: row["others"][name])
            for name in others
        },
        details=[
            [row["details"] for row in rows[at : at + copies]] for at in range(0, len(rows), copies)
        ],
        # The file's own table has a row for each category in the order of prompts, then the mean.
        names=dict(zip(categories, (row["name"] for row in content["table"]), strict=False)),
    )


def _read_metrics(path: Path) -> dict[str, Curve]:
    """Every logged number by its name; none where there is no file."""
    if not path.is_file():
        return {}
    points: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            points.setdefault(row["metric"], []).append((int(row["step"]), float(row["value"])))
    images = {0: 0.0, **dict(points.get("perf/images_sampled", []))}
    return {name: _curve(sorted(values), images) for name, values in points.items()}


def _read_diversity(folder: Path, contents: Mapping[str, Any]) -> dict[str, Curve]:
    """Of a run that logs nothing, such as the base, each suite's diversity by its logged name.

    From the verdicts; where these were written before they had it, from what the run printed, which
    has three decimals.
    """
    log = folder / "log.txt"
    printed = dict(PRINTED.findall(log.read_text(encoding="utf-8"))) if log.is_file() else {}
    found: dict[str, Curve] = {}
    for suite, content in contents.items():
        name = f"{content['domain']}/{suite}/diversity"
        value = content.get("diversity", printed.get(name))
        if value is not None:
            found[f"val/{name}"] = Curve(np.zeros(1), np.zeros(1), np.array([float(value)]))
    return found


PRINTED = re.compile(r"^((?:id|ood|shift)/\S+/diversity) +(\d\.\d{3})$", re.MULTILINE)
"""A line of the scores that `validate` prints: name and number."""


def _curve(points: Sequence[tuple[int, float]], images: Mapping[int, float]) -> Curve:
    steps = [step for step, _ in points]
    return Curve(
        np.array(steps, dtype=np.float64),
        np.array([images.get(step, math.nan) for step in steps]),
        np.array([value for _, value in points]),
    )


def _costs(metrics: Mapping[str, Curve]) -> Costs:
    def last(name: str) -> float:
        return float(metrics[name].values[-1]) if name in metrics else math.nan

    return Costs(
        images=last("perf/images_sampled"),
        sequences=last("perf/sequences_backpropagated"),
        optimizer_steps=last("perf/optimizer_steps"),
        seconds=last("perf/training_s"),
        kl_to_base=last("val/kl_to_base"),
        peak_memory_gb=last("perf/peak_memory_gb"),
    )


def _read_pictures(folder: Path, suite: str) -> dict[int, Path]:
    paths = (folder / "evaluation" / "pictures" / suite).glob("*.png")
    return {int(path.stem): path for path in sorted(paths)}


def _known_mean(values: Numbers) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
