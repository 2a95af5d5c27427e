"""The rule by which a study that tunes picks its settings: one for each algorithm, for all to see.

Of a group's places, the winner of each level of one axis is the one with the highest mean score on
one suite at the end of its run; where two are equal, the one that has moved less from the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cotgen_pl.study.definition import Cell
from cotgen_pl.study.folders import Record, Records


@dataclass(frozen=True)
class Candidate:
    """A place of the group with what it reached, mean over seeds."""

    cell: Cell
    score: float
    """Mean over categories of the suite that chooses."""
    kl_to_base: float


def choose_settings(rule: Mapping[str, Any], records: Records) -> dict[str, list[Candidate]]:
    """By algorithm, the candidates, the chosen one first.

    Args:
        rule: `groups` that compete, each for itself, and the `suite` that decides.
        records: Of the study that tunes.

    Raises:
        ValueError: A run is missing: whoever did not run cannot lose.
    """
    missing = [f"{run} seed {seed}" for run, seed in records.missing]
    if missing:
        raise ValueError(f"expected all runs before a choice, got none of {missing}; run them")
    return {
        group: sorted(
            (_candidate(cell, list(found.values()), rule["suite"]) for cell, found in rows),
            key=_rank,
        )
        for group in rule["groups"]
        if group in records.study.groups
        for rows in [list(records.rows(group))]
    }


def _rank(one: Candidate) -> tuple[float, float]:
    """Small for a good one; who has no score comes last."""
    return math.inf if math.isnan(one.score) else -one.score, one.kl_to_base


def _candidate(cell: Cell, found: Sequence[Record], suite: str) -> Candidate:
    scores = [record.suites[suite].mean() for record in found]
    return Candidate(
        cell, float(np.mean(scores)), float(np.mean([r.costs.kl_to_base for r in found]))
    )


def format_choice(choice: Mapping[str, Sequence[Candidate]]) -> str:
    """A table for each group, best first."""
    lines = []
    for group, candidates in choice.items():
        lines += [f"{group}, the first is chosen", f"{'':36s}{'score':>9s}{'KL to base':>12s}"]
        for one in candidates:
            name = ", ".join(f"{axis} {level}" for axis, level in one.cell.labels.items())
            lines.append(f"{name:36s}{one.score:9.4f}{one.kl_to_base:12.4f}")
    return "\n".join(lines)
