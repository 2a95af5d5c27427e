"""Scores that T2I-CompBench's own tools wrote, so that published detectors count beside ours.

Each of them, UniDet for positions among them, leaves a `vqa_result.json` in the folder of its
category (github.com/Karine-Huang/T2I-CompBench at 1b70949): a list of objects, `question_id` the
number of the picture in the order of the folder and `answer` its score.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_vqa_result(file: Path) -> dict[int, float]:
    """The score of each picture, by its number.

    Raises:
        ValueError: It is no such file, or an entry has no number or no finite score, or a picture
            has two.
    """
    if not file.is_file():
        raise ValueError(
            f"expected a vqa_result.json at {file}, got no file; name what T2I-CompBench's "
            "evaluation wrote"
        )
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor text
        raise ValueError(
            f"{file}: expected JSON, got {error}; run T2I-CompBench's evaluation again"
        ) from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"{file}: expected a list of question_id and answer, got "
            f"{'an empty list' if rows == [] else type(rows).__name__}; name a vqa_result.json"
        )
    scores: dict[int, float] = {}
    for place, row in enumerate(rows):
        number, score = _read_entry(row, f"{file}, entry {place}")
        if number in scores:
            raise ValueError(
                f"{file}, entry {place}: expected each picture once, got question_id {number} "
                "again; run T2I-CompBench's evaluation again into an empty folder"
            )
        scores[number] = score
    return scores


def _read_entry(row: Any, origin: str) -> tuple[int, float]:
    try:
        number, score = _read_number(row["question_id"]), float(row["answer"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{origin}: expected a question_id and an answer that is a number, got {row!r}; run "
            "T2I-CompBench's evaluation again"
        ) from error
    if not math.isfinite(score):
        raise ValueError(
            f"{origin}: expected a finite score, got {score} for picture {number}; run "
            "T2I-CompBench's evaluation of it again"
        )
    return number, score


def _read_number(value: Any) -> int:
    """A picture's number of 0 or more, which some of the tools write as a text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{value!r} is no number of a picture")
    number = int(value)
    if number < 0:
        raise ValueError(f"{number} is no number of a picture")
    return number
