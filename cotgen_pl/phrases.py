"""Phrase files: where the noun phrases of prompts stand, and what kind of word each word is.

T2I-CompBench asks spaCy for both. A phrase file holds the answers, so that scoring needs no spaCy,
and it holds no prompt: a line has the hash of a prompt and character spans in it. Its first line
says which spaCy and which model answered; 3.5.3 with en_core_web_sm 3.5.0 gives the published
metric. `tools/fetch.py phrases` writes one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUBLISHED = {"spacy": "3.5.3", "model": "en_core_web_sm 3.5.0"}
ADVICE = "make it with `python tools/fetch.py phrases`"


@dataclass(frozen=True)
class Parse:
    """What a parser says of one prompt."""

    phrases: list[str]
    """Its noun chunks."""
    words: list[tuple[str, str]]
    """Each token with its part of speech, like ("cup", "NOUN")."""


def hash_prompt(text: str) -> str:
    """The key of a prompt in a phrase file: the sha256 of its text without blanks around it."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


def describe_parser(language: Any, version: str) -> dict[str, str]:
    """The first line of a phrase file, for spaCy's loaded model and spaCy's version."""
    meta = language.meta
    return {"spacy": version, "model": f"{meta['lang']}_{meta['name']} {meta['version']}"}


def format_phrases(texts: Iterable[str], language: Any, version: str) -> str:
    """The content of a phrase file.

    Args:
        texts: Prompts; each distinct one is parsed once.
        language: A loaded model of spaCy's.
        version: Of spaCy.
    """
    distinct = dict.fromkeys(text.strip() for text in texts)
    rows = [describe_parser(language, version), *(_parse(t, language(t)) for t in distinct)]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _parse(text: str, document: Any) -> dict[str, Any]:
    chunks = [[chunk.start_char, chunk.end_char] for chunk in document.noun_chunks]
    words = [[word.idx, word.idx + len(word.text), word.pos_] for word in document]
    return {"prompt": hash_prompt(text), "chunks": chunks, "words": words}


class PhraseFile:
    """What a phrase file says, by prompt.

    Args:
        path: Of the file.

    Raises:
        ValueError: There is none, or it is no phrase file; the line is named.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        rows = self._read_rows()
        self.parser: dict[str, str] = next(rows)
        """Which spaCy and which model answered."""
        self._rows = {row["prompt"]: row for row in rows}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def is_published(self) -> bool:
        """Whether the parser is the one behind T2I-CompBench's published numbers."""
        return self.parser == PUBLISHED

    def find(self, text: str) -> Parse | None:
        """What the parser said of a prompt; None where the file does not have it."""
        text = text.strip()
        row = self._rows.get(hash_prompt(text))
        if row is None:
            return None
        phrases = [text[start:end] for start, end in row["chunks"]]
        return Parse(phrases, [(text[start:end], kind) for start, end, kind in row["words"]])

    def _read_rows(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            raise ValueError(f"expected a phrase file at {self.path}, got none; {ADVICE}")
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines or [""], 1):
            yield self._read_row(number, line)

    def _read_row(self, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if _is_header(row) if number == 1 else _is_row(row):
            return dict(row)
        expected = "spacy and model" if number == 1 else "prompt, chunks and words"
        raise ValueError(
            f"{self.path}:{number}: expected an object with {expected}, got {line[:60]!r}; {ADVICE}"
        )


def _is_header(row: Any) -> bool:
    match row:
        case {"spacy": str(), "model": str()}:
            return len(row) == 2
    return False


def _is_row(row: Any) -> bool:
    match row:
        case {"prompt": str(), "chunks": list(chunks), "words": list(words)}:
            return all(map(_is_span, chunks)) and all(map(_is_word, words))
    return False


def _is_span(span: Any) -> bool:
    match span:
        case [int(start), int(end)]:
            return 0 <= start <= end
    return False


def _is_word(word: Any) -> bool:
    match word:
        case [int(start), int(end), str()]:
            return 0 <= start <= end
    return False
