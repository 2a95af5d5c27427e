"""Prompt files that a study makes before its first run: parts of others, without leaks.

A smaller or less diverse part of the training prompts is a file of its own, so that every
algorithm reads the very same prompts. An entry of a study's `prompts` has

    files           what is read, as `PromptData` takes them
    categories      those that are kept; absent keeps all
    number          how many are kept, as equally many of each category as there are; absent: all
    held_out        files whose prompts are left out, see `cotgen_pl.leaks.find_leaks`
    distinct        whether a prompt that comes again is left out
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.files import write_whole
from cotgen_pl.interfaces import Prompt, check_positive
from cotgen_pl.leaks import find_leaks, first_by_text
from cotgen_pl.rules.words import plain_text
from cotgen_pl.study.definition import Study

ENTRIES = {"files", "categories", "number", "held_out", "distinct"}


@dataclass(frozen=True)
class PromptCounts:
    """What became of the prompts that were read."""

    name: str
    read: int
    leaks: int
    """Equal to a held-out one."""
    duplicates: int
    kept: int


def make_prompts(study: Study) -> list[PromptCounts]:
    """Write `<study's folder>/prompts/<name>.jsonl` for each entry.

    Raises:
        ValueError: A file that is there has other prompts: runs may have been trained on them.
    """
    made = []
    for name, entry in study.prompts.items():
        prompts, counts = select_prompts(name, entry)
        path = study.folder / "prompts" / f"{name}.jsonl"
        text = "".join(f"{json.dumps(_as_row(prompt), ensure_ascii=False)}\n" for prompt in prompts)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"expected {path} to hold the prompts that the study names, got others; name "
                "another folder for the study, or remove that file and the runs that read it"
            )
        if not path.is_file():
            _write(path, text)
        made.append(counts)
    return made


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def select_prompts(name: str, entry: Mapping[str, Any]) -> tuple[list[Prompt], PromptCounts]:
    """The prompts of an entry in the order of its files, and how many were left out why.

    Raises:
        ValueError: The entry has other words, names a category that no prompt has, weighs a file,
            or asks for more prompts than there are.
    """
    if not entry.keys() <= ENTRIES or "files" not in entry:
        raise ValueError(
            f"prompts {name}: expected files and any of {sorted(ENTRIES)}, got {sorted(entry)}; "
            "correct the study's file"
        )
    check_positive(number=entry.get("number"))
    read = _read_all(entry["files"], name)
    kept = _of_categories(read, entry["categories"], name) if "categories" in entry else read
    clean = _without_leaks(kept, _read_all(entry.get("held_out", []), name))
    leaks = len(kept) - len(clean)
    chosen = list(first_by_text(clean).values()) if entry.get("distinct") else clean
    duplicates = len(clean) - len(chosen)
    if "number" in entry:
        chosen = _take(chosen, entry["number"], name)
    return chosen, PromptCounts(name, len(read), leaks, duplicates, len(chosen))


def _read_all(files: Sequence[Mapping[str, Any]], name: str) -> list[Prompt]:
    sources = [PromptFile(**file) for file in files]
    weighted = [source.path for source in sources if source.weight != 1]
    if weighted:
        raise ValueError(
            f"prompts {name}: expected files without weight, got one on {weighted[0]}; each prompt "
            "is taken once here: weigh the file that is made where a run's data name it"
        )
    return [prompt for source in sources for prompt in read_prompts(source)]


def _of_categories(prompts: Sequence[Prompt], wanted: Sequence[str], name: str) -> list[Prompt]:
    found = dict.fromkeys(prompt.category for prompt in prompts)
    unknown = [category for category in wanted if category not in found]
    if unknown:
        raise ValueError(
            f"prompts {name}: expected categories among {', '.join(found)}, got {unknown}; name "
            "those"
        )
    return [prompt for prompt in prompts if prompt.category in wanted]


def _without_leaks(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[Prompt]:
    equal = {plain_text(train.text) for train, _ in find_leaks(prompts, held_out)}
    return [prompt for prompt in prompts if plain_text(prompt.text) not in equal]


def _take(prompts: Sequence[Prompt], number: int, name: str) -> list[Prompt]:
    """As equally many of each category as `number` allows, spread evenly over each one's list."""
    categories = list(dict.fromkeys(prompt.category for prompt in prompts))
    share, rest = divmod(number, len(categories))
    kept: set[int] = set()
    for place, category in enumerate(categories):
        own = [row for row, prompt in enumerate(prompts) if prompt.category == category]
        wanted = share + (place < rest)
        if wanted > len(own):
            raise ValueError(
                f"prompts {name}: expected {wanted} of category {category}, got {len(own)}; lower "
                "number"
            )
        kept |= {own[len(own) * step // wanted] for step in range(wanted)}
    return [prompt for row, prompt in enumerate(prompts) if row in kept]


def _as_row(prompt: Prompt) -> dict[str, Any]:
    """What the format `jsonl` reads as the same prompt."""
    facts = {name: value for name, value in prompt.facts.items() if not name.startswith("_")}
    text = {"prompt": prompt.text, "category": prompt.category}
    drawn = {} if prompt.drawn_text == prompt.text else {"generation_text": prompt.drawn_text}
    return text | drawn | facts
