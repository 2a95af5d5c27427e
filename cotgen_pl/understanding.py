"""Questions about pictures: read from files, asked, and their answers judged.

Apart from the policies because asking needs no more than transformers' own model and processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from cotgen_pl.rules.words import plain_words

Match = Literal["exact", "contains"]
FIELDS = ("picture", "question", "answer")


@dataclass(frozen=True)
class Question:
    """A picture, what is asked about it, and the answer that is right."""

    picture: Path
    question: str
    answer: str
    category: str
    """Empty where the file names none."""
    origin: str
    """Path and line, for messages."""


def read_questions(file: Path) -> list[Question]:
    """The questions of a JSONL file: `picture`, `question`, `answer` and optionally `category`.

    A relative path of a picture starts at the file's own folder. Pictures are opened, not decoded.

    Raises:
        ValueError: There is no file or nothing in it, a line is not of this form, or its picture
            is missing or no picture; the line is named.
    """
    if not file.is_file():
        raise ValueError(
            f"expected a JSONL file of questions at {file.absolute()}, got none; correct the path "
            "(a relative one starts at the working directory)"
        )
    lines = enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1)
    questions = [_read_question(file, n, line) for n, line in lines if line.strip()]
    if not questions:
        raise ValueError(f"{file}:1: expected at least one question, got an empty file; add some")
    return questions


def _read_question(file: Path, number: int, line: str) -> Question:
    origin = f"{file}:{number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{origin}: expected a JSON object, got {line[:60]!r} ({error}); write one object per "
            "line"
        ) from error
    texts: list[Any] = [row.get(name) if isinstance(row, dict) else None for name in FIELDS]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f'{origin}: expected {{"picture": path, "question": text, "answer": text}}, got '
            f"{line[:80]!r}; give each line all three"
        )
    category = row.get("category") or ""
    if not isinstance(category, str) or "/" in category or category == "mean":
        raise ValueError(
            f"{origin}: expected a category that names a metric, so without '/' and not 'mean', "
            f"got {category!r}; rename it"
        )
    picture, question, answer = texts
    found = Question(file.parent / picture, question.strip(), answer, category, origin)
    with _naming_the_line(found):
        Image.open(found.picture).close()
    return found


def load_picture(question: Question) -> Image.Image:
    """A question's picture, as RGB."""
    with _naming_the_line(question), Image.open(question.picture) as picture:
        return picture.convert("RGB")


@contextmanager
def _naming_the_line(question: Question) -> Iterator[None]:
    """Say where the question stands if its picture cannot be read."""
    try:
        yield
    except (OSError, SyntaxError) as error:  # the latter is Pillow's for a broken PNG
        raise ValueError(
            f"{question.origin}: expected a picture at {question.picture}, got: {error}; correct "
            "the path (a relative one starts at the folder of the JSONL file), or replace the file"
        ) from error


def is_right(response: str, answer: str, match: Match) -> bool:
    """Whether a response gives the answer, both without case, punctuation and articles.

    Args:
        response: What the model said.
        answer: What is right.
        match: `exact`, or `contains`: its words stand in the response, one after another.

    >>> is_right(" A red  Circle.", "red circle", "exact")
    True
    >>> is_right("It is a red circle.", "red circle", "exact")
    False
    >>> is_right("It is a red circle.", "red circle", "contains")
    True
    >>> is_right("infrared circle", "red circle", "contains")
    False
    """
    said, wanted = (" ".join(plain_words(text)) for text in (response, answer))
    return said == wanted if match == "exact" else f" {wanted} " in f" {said} "


@torch.no_grad()
def answer_questions(
    model: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    max_tokens: int,
) -> list[str]:
    """Greedy answers by transformers' own `generate`, a batch at once.

    Args:
        model: A `JanusForConditionalGeneration`.
        processor: Its processor; puts a picture's tokens in the place of its image token.
        pictures: B of them.
        texts: B prompts, each with one image token.
        max_tokens: Longest answer.

    Raises:
        ValueError: A text with picture and answer is longer than the model's context.
    """
    inputs = [
        processor(text=[text], images=[picture], return_tensors="pt")
        for text, picture in zip(texts, pictures, strict=True)
    ]
    rows = [entry["input_ids"][0] for entry in inputs]
    end = processor.tokenizer.eos_token_id  # fills rows too, where nothing sees it
    longest, room = max(map(len, rows)), model.config.text_config.max_position_embeddings
    if longest + max_tokens > room:
        raise ValueError(
            f"expected question, picture and answer of at most {room} tokens, got {longest} and an "
            f"answer of up to {max_tokens}; shorten {max(texts, key=len)[:80]!r}, or lower "
            "max_tokens"
        )
    ids = torch.stack([nn.functional.pad(row, (longest - len(row), 0), value=end) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    mask = (torch.arange(longest) >= longest - lengths).long()  # [B, L]
    with _same_type_at_head(model):
        said = model.generate(
            inputs=ids.to(model.device),
            attention_mask=mask.to(model.device),
            pixel_values=torch.cat([entry["pixel_values"] for entry in inputs]).to(model.device),
            generation_mode="text",
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_tokens,
            eos_token_id=end,
            pad_token_id=end,
        )
    answers: list[str] = processor.batch_decode(said[:, longest:], skip_special_tokens=True)
    return answers


@contextmanager
def _same_type_at_head(model: Any) -> Iterator[None]:
    """Bring hidden states to the type of the text head, which stays as it was read.

    Layers that train are float32 where all else is bfloat16.
    """

    def cast(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].to(next(head.parameters()).dtype),)

    hook = model.lm_head.register_forward_pre_hook(cast)
    try:
        yield
    finally:
        hook.remove()
