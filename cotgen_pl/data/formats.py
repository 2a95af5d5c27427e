"""The formats of prompt files, each read into `Prompt` records.

All of them hold one prompt per line, so there is one reader of lines and one function per format,
and every error names its line.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from cotgen_pl.interfaces import Prompt

Format = Literal["text", "jsonl", "geneval", "t2i_compbench", "t2i_r1", "flow_grpo"]

# The fact under which a prompt remembers its place, "path:line", for error messages.
ORIGIN = "_origin"


@dataclass
class PromptFile:
    """One file of prompts."""

    path: str
    """Absolute, or relative to the working directory."""
    format: Format
    """How it is written.

    text: a prompt per line.
    jsonl: an object per line: `prompt`, optional `category` and `generation_text`, all else facts.
    geneval: GenEval's evaluation_metadata.jsonl.
    t2i_compbench: T2I-CompBench's <category>_<train|val>[_<part>].txt.
    t2i_r1: T2I-R1's JSON lines.
    flow_grpo: its <split>_metadata.jsonl (its plain <split>.txt files are `text`).
    """
    category: str = ""
    """Given, it is the category of every prompt; empty, the file's own categories hold."""
    suite: str = "train"
    """The set that the prompts belong to."""
    weight: float = 1.0
    """Draws of each prompt per pass over the data; at 0.5 the halves of the file take turns."""

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ValueError(
                f"{self.path}: expected a format out of {get_args(Format)}, got {self.format!r}; "
                "name the one that the file is written in"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"{self.path}: expected a weight above 0, got {self.weight}; "
                "leave the file out to draw nothing from it"
            )


def read_prompts(file: PromptFile) -> list[Prompt]:
    """Read a file of prompts in its order.

    Besides the facts of its format, each prompt remembers "path:line" under `ORIGIN`.
    """
    return [_read_prompt(file, origin, line) for origin, line in _read_lines(Path(file.path))]


def _read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines that are not blank, stripped, each behind its place, "path:line"."""
    if not path.is_file():
        raise ValueError(
            f"expected a file of prompts at {path.absolute()}, got none; correct the path "
            "(a relative one starts at the working directory) or download the file"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{number}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}; "
            "save the file as UTF-8"
        ) from error
    # Cut where editors count lines; str.splitlines also cuts at separators inside a JSON text.
    lines = [(f"{path}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    filled = [(origin, line) for origin, line in lines if line]
    if not filled:
        raise ValueError(
            f"{path}:1: expected at least one prompt, got an empty file; write one prompt per line"
        )
    return filled


def _read_prompt(file: PromptFile, origin: str, line: str) -> Prompt:
    match file.format:
        case "text":
            prompt = Prompt(line)
        case "jsonl":
            prompt = _jsonl_prompt(_row(origin, line), origin)
        case "geneval":
            prompt = _geneval_prompt(_row(origin, line), origin)
        case "t2i_compbench":
            prompt = _t2i_compbench_prompt(file, line)
        case "t2i_r1":
            prompt = _t2i_r1_prompt(_row(origin, line), origin)
        case "flow_grpo":
            prompt = _flow_grpo_prompt(_row(origin, line), origin)
    return replace(
        prompt,
        suite=file.suite,
        category=file.category or prompt.category,
        facts=prompt.facts | {ORIGIN: origin},
    )


def _require(holds: bool, origin: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(
            f"{origin}: expected {expected}, got {got!r}; correct this line, or name the format "
            "that the file is written in"
        )


def _row(origin: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{origin}: expected a JSON object, got {line[:60]!r} ({error}); "
            'write one object per line, like {"prompt": "a red cube"}'
        ) from error
    _require(isinstance(row, dict), origin, "a JSON object", row)
    return row


def _take_text(row: dict[str, Any], column: str, origin: str) -> str:
    """Take a text that must be there out of a row."""
    text = row.pop(column, None)
    holds = isinstance(text, str) and bool(text.strip())
    _require(holds, origin, f"a text under {column!r}", text)
    return text.strip()


def _take_optional_text(row: dict[str, Any], column: str, origin: str) -> str:
    """Take a text out of a row that may be missing, null or empty there."""
    text = row.pop(column, None) or ""
    _require(isinstance(text, str), origin, f"a text or nothing under {column!r}", text)
    return text.strip()


def _jsonl_prompt(row: dict[str, Any], origin: str) -> Prompt:
    return Prompt(
        _take_text(row, "prompt", origin),
        category=_take_optional_text(row, "category", origin),
        generation_text=_take_optional_text(row, "generation_text", origin),
        facts=row,
    )


def _geneval_prompt(row: dict[str, Any], origin: str) -> Prompt:
    text, tag = _take_text(row, "prompt", origin), _take_text(row, "tag", origin)
    return Prompt(text, category=tag, facts=_geneval_facts(row, origin))


def _flow_grpo_prompt(row: dict[str, Any], origin: str) -> Prompt:
    """One row of flow_grpo's metadata, which its rewards see whole.

    Those of dataset/geneval were made by GenEval's own script
    (https://github.com/yifan123/flow_grpo/issues/4); its other data sets have other columns.
    """
    text = _take_text(row, "prompt", origin)
    tag = _take_optional_text(row, "tag", origin)
    clauses = _geneval_facts(row, origin) if "include" in row else {}
    return Prompt(text, category=tag, facts=row | clauses)


def _geneval_facts(row: dict[str, Any], origin: str) -> dict[str, Any]:
    include, exclude = row.get("include"), row.get("exclude", [])
    _require(
        isinstance(include, list) and include != [], origin, "clauses under 'include'", include
    )
    _require(isinstance(exclude, list), origin, "a list under 'exclude'", exclude)
    expected = (
        'a clause {"class": text, "count": 1 or more} with optional "color": text and '
        '"position": [relation, number of a clause of include]'
    )
    for clause in [*row["include"], *exclude]:
        _require(_is_clause(clause, len(row["include"])), origin, expected, clause)
    return {"include": include, "exclude": exclude}


def _is_clause(clause: Any, num_included: int) -> bool:
    match clause:
        case {"class": str(), "count": int(count), **rest} if count >= 1:
            return isinstance(rest.get("color", ""), str) and _is_position(
                rest.get("position", ["", 0]), num_included
            )
    return False


def _is_position(position: Any, num_included: int) -> bool:
    match position:
        case [str(), int(target)]:
            return 0 <= target < num_included
    return False


def _t2i_compbench_prompt(file: PromptFile, line: str) -> Prompt:
    """One line of <category>_<split>.txt, or of <category>_<split>_<part>.txt (3-in-1)."""
    name = re.fullmatch(r"(.+?)_(train|val)(?:_(.+))?", Path(file.path).stem)
    if name is None:
        raise ValueError(
            f"{file.path}: expected a name that tells category and split, like color_train.txt or "
            f"complex_val_action.txt, got {Path(file.path).name}; keep the official name, or take "
            "the format text"
        )
    category, split, part = name.groups()
    return Prompt(
        line, category=category, facts={"split": split} | ({"part": part} if part else {})
    )


def _t2i_r1_prompt(row: dict[str, Any], origin: str) -> Prompt:
    """One row of T2I-R1's data; which facts it has depends on its task."""
    facts = {}
    for column, (expected, holds) in _T2I_R1_FACTS.items():
        if row.get(column) is not None:
            _require(holds(row[column]), origin, f"{expected} under {column!r}", row[column])
            facts[column] = row[column]
    text, task = _take_text(row, "prompt", origin), _take_text(row, "task_type", origin)
    return Prompt(text, category=task, facts=facts)


def _are_nouns(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(noun, str) for noun in value)


def _is_relation(value: Any) -> bool:
    match value:
        case {"obj1": str(), "obj2": str(), "locality": str()}:
            return True
    return False


def _is_count(value: Any) -> bool:
    match value:
        case {"obj_name": str(), "num": int()}:
            return True
    return False


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_count(item) for item in value)


# What T2I-R1's rewards read of a row, and how it is told from something else.
_T2I_R1_FACTS = {
    "nouns": ("a list of texts", _are_nouns),
    "attr_nouns": ("a list of texts", _are_nouns),
    "spatial_info": ("obj1, obj2 and locality", _is_relation),
    "numeracy_info": ("a list of obj_name with num", _are_counts),
}
