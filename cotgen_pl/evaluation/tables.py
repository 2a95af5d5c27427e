"""A thorough evaluation for people and for other programs: tables as papers have them, and files.

Apart from `callbacks/evaluation.py`, which says when this is made: verdicts in, text and files out.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cotgen_pl.evaluation.suites import (
    OWN,
    JudgedSuite,
    Metrics,
    domain_mean,
    domains_of,
)
from cotgen_pl.evaluation.verdicts import as_plain, digest
from cotgen_pl.files import write_whole
from cotgen_pl.monitors import mean_error

NUM_ERRORS = 1.96  # on each side: 95 % of a normal distribution
STRICT = "strict"  # a reward's part of this name is 1 for a right picture, else 0
MEAN = "mean"
DOMAINS = {"id": "in domain", "ood": "out of domain", "shift": "shift"}


@dataclass
class Row:
    """A line of a suite's table: a category, or all of them."""

    name: str
    score: float
    """Mean over pictures; in the last line, mean over categories."""
    half_width: float
    """Of the 95 % confidence interval; NaN where a category has only one prompt."""
    prompts: int
    missing: int
    """Pictures without a verdict."""
    images_right: float | None
    """Share of pictures that are right, where the reward has a strict part."""
    prompts_right: float | None
    """Share of prompts with any right picture; likewise."""


def suite_rows(judged: JudgedSuite) -> list[Row]:
    """A row for each category, and one for their mean.

    The interval is the normal approximation over prompts, score ± 1.96 errors: of a category's
    error see `cotgen_pl.monitors.mean_error`; of the mean over C categories it is
    sqrt(sum(error²)) / C, since categories are fixed and prompts are drawn within them. Of few
    prompts, or prompts that nearly all score the same, it is too narrow. Shares are
    of pictures and prompts that have a verdict, in the last line over all categories at once, as
    evaluation/summary_scores.py of github.com/djghosh13/geneval at af4902f has them.
    """
    rows = []
    for category, part in _by_category(judged).items():
        values = part.verdicts[OWN]["total"]
        rows.append(_row(part.name_of(category), part, values.nanmean().item(), mean_error(values)))
    score = judged.mean(judged.verdicts[OWN]["total"])
    return [*rows, _row(MEAN, judged, score, suite_error(judged))]


def suite_error(judged: JudgedSuite) -> float:
    """The standard error of a suite's mean over categories."""
    parts = _by_category(judged).values()
    return math.hypot(*(mean_error(part.verdicts[OWN]["total"]) for part in parts)) / len(parts)


def _by_category(judged: JudgedSuite) -> dict[str, JudgedSuite]:
    return {
        category: judged.part([p for p in judged.prompts if p.category == category])
        for category in dict.fromkeys(judged.categories)
    }


def _row(name: str, judged: JudgedSuite, score: float, error: float) -> Row:
    missing = int(judged.verdicts[OWN]["total"].isnan().sum())
    shares = (
        _right(judged.verdicts[OWN][STRICT]) if STRICT in judged.verdicts[OWN] else (None, None)
    )
    return Row(name, score, NUM_ERRORS * error, len(judged.prompts), missing, *shares)


def _right(strict: Tensor) -> tuple[float, float]:
    """Shares of right pictures, and of prompts with any, of [P, G] with NaN for no verdict."""
    known = ~strict.isnan()
    prompts = (strict == 1).any(1)[known.any(1)]
    return (strict == 1)[known].double().mean().item(), prompts.double().mean().item()


def _copies(judged: JudgedSuite) -> int:
    return judged.verdicts[OWN]["total"].shape[1]


# Text -------------------------------------------------------------------------------------------


def format_tables(suites: Sequence[JudgedSuite]) -> str:
    """A table for each suite, and one of the means over a domain's suites with their gap."""
    tables = [_format_suite(judged) for judged in suites]
    has_means = domains_of([judged.suite for judged in suites])
    return "\n\n".join([*tables, _format_domains(suites)] if has_means else tables)


def _format_suite(judged: JudgedSuite) -> str:
    title = (
        f"{judged.suite.name}, {DOMAINS[judged.domain]}, images of each prompt: {_copies(judged)}"
    )
    return format_rows(title, suite_rows(judged))


def format_rows(title: str, rows: Sequence[Row]) -> str:
    """The table of a suite, or of a folder of pictures, below a title."""
    columns = {
        "score": [f"{row.score:.4f}" for row in rows],
        "95 %": [_half_width(row.half_width) for row in rows],
        "prompts": [str(row.prompts) for row in rows],
        "images right": [_percent(row.images_right) for row in rows],
        "prompts right": [_percent(row.prompts_right) for row in rows],
        "no verdict": [str(row.missing) for row in rows],
    }
    if rows[-1].images_right is None:
        del columns["images right"], columns["prompts right"]
    if not rows[-1].missing:
        del columns["no verdict"]
    return "\n".join([title, *_align([row.name for row in rows], columns)])


def _format_domains(suites: Sequence[JudgedSuite]) -> str:
    """Means over suites; errors add up as those of categories do."""
    means, errors = {}, {}
    for domain in domains_of([judged.suite for judged in suites]):
        own = [suite_error(judged) for judged in suites if judged.domain == domain]
        means[DOMAINS[domain]] = domain_mean(suites, domain)
        errors[DOMAINS[domain]] = math.hypot(*own) / len(own)
    if len(means) == 2:
        means["gap"] = means[DOMAINS["id"]] - means[DOMAINS["ood"]]
        errors["gap"] = math.hypot(*errors.values())
    columns = {
        "score": [f"{mean:.4f}" for mean in means.values()],
        "95 %": [_half_width(NUM_ERRORS * error) for error in errors.values()],
    }
    return "\n".join(["means over suites", *_align(list(means), columns)])


def _align(names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines with names on the left and each column as wide as its widest entry."""
    table = {"": [name.ljust(max(map(len, names))) for name in names], **columns}
    widths = {title: max(len(title), *map(len, entries)) for title, entries in table.items()}
    lines = zip(*[[title, *entries] for title, entries in table.items()], strict=True)
    return [
        "  ".join(e.rjust(w) for e, w in zip(line, widths.values(), strict=True)) for line in lines
    ]


def _half_width(value: float) -> str:
    return "±?" if math.isnan(value) else f"±{value:.4f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def full_name(name: str) -> str:
    """How a score is logged where it is of all prompts, while others are of a sample.

    >>> full_name("val/ood/mean")
    'val/full/ood/mean'
    """
    return f"val/full/{name.removeprefix('val/')}"


def format_table(first: Metrics, last: Metrics) -> str:
    """Scores at the start and at the end, one line per category.

    A part that is the suite's mean under another name, at both times, has no line; nor has the
    score of a sample beside that of all prompts.
    """
    lines = (
        [f"{'':44s}{'start':>8s}{'end':>8s}{'change':>9s}"] if first else [f"{'':44s}{'score':>8s}"]
    )
    for name, value in last.items():
        if full_name(name) in last:
            continue
        suite, is_part, _ = name.rpartition("/parts/")
        if is_part and all(m.get(name) == m.get(f"{suite}/mean") for m in (first, last)):
            continue
        label = name.removeprefix("val/")
        if first:
            start = first.get(name, float("nan"))
            lines.append(f"{label:44s}{start:8.3f}{value:8.3f}{value - start:+9.3f}")
        else:
            lines.append(f"{label:44s}{value:8.3f}")
    return "\n".join(lines)


def warn_of_equal(judged: JudgedSuite) -> None:
    """One score for all pictures is seldom what they deserve."""
    totals = judged.verdicts[OWN]["total"]
    known = totals[~totals.isnan()]
    scores = known.unique()
    if len(scores) < 2 and totals.numel() > 1:
        got = f"no verdict on all {totals.numel()} pictures"
        if len(scores):
            got = f"{scores.item():g} for all {len(known)} pictures with a verdict"
        rank_zero_warn(
            f"suite {judged.suite.name}: expected scores that differ, got {got}; look at some of "
            "them, and at the scorer's own weights"
        )


# Files ------------------------------------------------------------------------------------------


def write_verdicts(
    folder: Path,
    judged: JudgedSuite,
    variant: Mapping[str, Any],
    seeds: Sequence[int],
    details: Mapping[int, Sequence[Any]],
) -> None:
    """Write `<suite>.json` and `<suite>.csv`; those of another variant get its digest as a suffix.

    Args:
        folder: Where.
        judged: All prompts of a suite.
        variant: What was evaluated; see `verdicts.describe_variant`.
        seeds: P * G, of each picture.
        details: Of each prompt's pictures, by its place in the suite.
    """
    name = judged.suite.name
    _keep_others(folder, name, digest(variant))
    records = list(_picture_records(judged, seeds, details))
    head = {
        "suite": name,
        "domain": judged.domain,
        "digest": digest(variant),
        "variant": variant,
        "diversity": as_plain(judged.mean(judged.diversity)),
        "table": [as_plain(vars(row)) for row in suite_rows(judged)],
    }
    lines = ",\n".join(f"    {json.dumps(record, ensure_ascii=False)}" for record in records)
    begin = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    text = f'{begin},\n  "verdicts": [\n{lines}\n  ]\n}}\n'
    write_whole(folder / f"{name}.json", lambda part: part.write_text(text, encoding="utf-8"))
    write_whole(folder / f"{name}.csv", lambda part: _write_csv(part, records))


def _keep_others(folder: Path, name: str, own: str) -> None:
    path = folder / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["digest"] if path.exists() else own
    if before != own:
        for file in (path, path.with_suffix(".csv")):
            if file.exists():
                file.replace(folder / f"{name}-{before}{file.suffix}")


def _picture_records(
    judged: JudgedSuite, seeds: Sequence[int], details: Mapping[int, Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    """JSON values of each picture: what it is of, and all that is said of it."""
    copies, own = _copies(judged), judged.verdicts[OWN]
    parts = {name: values for name, values in own.items() if name != "total"}
    others = {name: v["total"] for name, v in judged.verdicts.items() if name != OWN}
    for row, prompt in enumerate(judged.prompts):
        for copy in range(copies):
            yield {
                "index": prompt.index,
                "prompt": prompt.text,
                "category": prompt.category,
                "copy": copy,
                "seed": seeds[row * copies + copy],
                "total": as_plain(own["total"][row, copy].item()),
                "parts": {name: as_plain(v[row, copy].item()) for name, v in parts.items()},
                "others": {name: as_plain(v[row, copy].item()) for name, v in others.items()},
                "details": details[prompt.index][copy] if prompt.index in details else None,
            }


def _write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The same in columns; parts as `parts/<name>`, details as JSON, nothing for no verdict."""
    plain = ("index", "prompt", "category", "copy", "seed", "total")
    first = records[0]
    columns = [*plain, *(f"parts/{name}" for name in first["parts"]), *first["others"], "details"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for record in records:
            told = "" if record["details"] is None else json.dumps(record["details"])
            numbers = [*record["parts"].values(), *record["others"].values()]
            writer.writerow([*(record[name] for name in plain), *numbers, told])
