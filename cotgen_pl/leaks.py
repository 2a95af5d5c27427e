"""Held-out prompts that training contains: found, and left out.

Equal are prompts whose `plain_text` is the same. Nearly equal are others that

* have the same words in any order, articles and the endings of plurals aside ("two dogs and a cat",
  "a cat and two dogs"), or
* have the same words in the same order, articles aside, but for one, whose two forms are of four
  letters or more and one letter apart: added, missing or another ("a metal bench", "a metall
  bench"). Among shorter words most such pairs are two things: cat, car.

A prompt in other words is not found. The time is in proportion to the number of words: 10,000
training prompts against 5,000 held-out ones take about a second on one core where they have ten
words, and nine where they have 70.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from cotgen_pl.interfaces import Prompt
from cotgen_pl.rules.words import plain_text, plain_words

LeakAction = Literal["drop", "warn", "stop"]
Row = tuple[tuple[str, ...], Prompt]  # a prompt behind its words
LEAST_LETTERS = 4  # of words that may differ by a letter
PLURAL = re.compile(r"(?<=\w\w)(?:ies|es|s|y|e)$")  # "y" and "e" for berry and glove themselves


@dataclass(frozen=True)
class NearLeak:
    """A held-out prompt and one to train on that is nearly the same."""

    train: Prompt
    held_out: Prompt
    kind: Literal["same words", "one letter"]


@runtime_checkable
class PromptSource(Protocol):
    """What holds prompts to train on: a data module, or a callback that draws pairs for some."""

    def train_prompts(self) -> Iterable[Prompt]:
        """All of them, those that were left out among them."""

    def drop_prompts(self, leaks: Callable[[Prompt], bool]) -> None:
        """Leave out those that leak, as if no file had them."""


def find_leaks(train: Iterable[Prompt], held_out: Iterable[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """The held-out prompts that training contains, each behind its first twin in training."""
    seen = first_by_text(train)
    pairs = ((seen.get(plain_text(prompt.text)), prompt) for prompt in held_out)
    return [(twin, prompt) for twin, prompt in pairs if twin is not None]


def find_near_leaks(train: Iterable[Prompt], held_out: Iterable[Prompt]) -> list[NearLeak]:
    """The held-out prompts that are nearly in training, each with its first likeness there.

    Equal ones are not among them. Prompts of the same `plain_text` count as one.
    """
    seen = first_by_text(train)
    asked = [(t, prompt) for t, prompt in first_by_text(held_out).items() if t not in seen]
    rows = [(plain_words(text), prompt) for text, prompt in seen.items()]
    wanted = [(plain_words(text), prompt) for text, prompt in asked]
    one_letter, same_words = _one_letter(rows, wanted), _same_words(rows, wanted)
    found = {**one_letter, **same_words}  # by number; the same words come first
    return [found[number] for number in sorted(found)]


def first_by_text(prompts: Iterable[Prompt]) -> dict[str, Prompt]:
    """The first prompt of each `plain_text`."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(plain_text(prompt.text), prompt)
    return first


def leave_out(
    prompts: Sequence[Prompt],
    weights: Sequence[float],
    leaks: Callable[[Prompt], bool],
    fewest: int = 1,
) -> tuple[list[Prompt], list[float]]:
    """The prompts that do not leak, in their order, and the weight of each.

    Args:
        prompts: To train on.
        weights: Of each prompt.
        leaks: Whether a prompt leaks.
        fewest: Prompts that must be left.
    """
    kept = [(p, w) for p, w in zip(prompts, weights, strict=True) if not leaks(p)]
    if len(kept) < fewest:
        raise ValueError(
            f"expected at least {fewest} prompts to train on that no suite holds out, got "
            f"{len(kept)} of {len(prompts)}; train on other prompts, or set leaks: warn on "
            "SuiteEvaluation to train on what it scores"
        )
    return [prompt for prompt, _ in kept], [weight for _, weight in kept]


def fingerprint(prompts: Sequence[Prompt], weights: Sequence[float]) -> str:
    """16 hexadecimal digits that tell data sets apart: texts and weights, in their order."""
    rows = [[p.text, p.generation_text, w] for p, w in zip(prompts, weights, strict=True)]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


def check_same_prompts(before: str, now: str, number: int) -> None:
    """Refuse to resume a run with other prompts, which would come in another order.

    Args:
        before: `fingerprint` of what the run that is resumed trained on.
        now: Of what this one would.
        number: How many that is.
    """
    if before != now:
        raise ValueError(
            f"expected to go on with the prompts that the run began with, got others ({number} of "
            "them); resume with the same prompt files, suites and leaks"
        )


def _same_words(train: Sequence[Row], held_out: Sequence[Row]) -> dict[int, NearLeak]:
    """By the held-out row's number."""
    seen: dict[tuple[str, ...], Prompt] = {}
    for words, prompt in train:
        seen.setdefault(_word_set(words), prompt)
    twins = [seen.get(_word_set(words)) for words, _ in held_out]
    return {
        number: NearLeak(twin, prompt, "same words")
        for number, ((_, prompt), twin) in enumerate(zip(held_out, twins, strict=True))
        if twin is not None
    }


def _word_set(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(map(_singular, words)))


def _singular(word: str) -> str:
    """A word without what its plural may change; not always a word.

    >>> [_singular(word) for word in ("dogs", "boxes", "box", "gloves", "glove")]
    ['dog', 'box', 'box', 'glov', 'glov']
    """
    return PLURAL.sub("", word)


def _one_letter(train: Sequence[Row], held_out: Sequence[Row]) -> dict[int, NearLeak]:
    """By the held-out row's number.

    Two words are one letter apart only if they, or what is left of them without one letter, are
    equal; such forms are looked up, and only of words whose neighbours are the same in both sets.
    """
    around = {key for words, _ in held_out for key, _ in _words_between(words)}
    index: dict[Hashable, list[tuple[str, Prompt]]] = defaultdict(list)
    for words, prompt in train:
        for key, word in _words_between(words):
            if key in around:
                for form in _forms(word):
                    index[key, form].append((word, prompt))
    found = {}
    for number, (words, prompt) in enumerate(held_out):
        twin = _find_one_letter(words, index)
        if twin is not None:
            found[number] = NearLeak(twin, prompt, "one letter")
    return found


def _find_one_letter(
    words: tuple[str, ...], index: Mapping[Hashable, Sequence[tuple[str, Prompt]]]
) -> Prompt | None:
    for key, word in _words_between(words):
        for form in sorted(_forms(word)):
            for other, prompt in index.get((key, form), ()):
                if _one_letter_apart(word, other):
                    return prompt
    return None


def _words_between(words: tuple[str, ...]) -> Iterator[tuple[Hashable, str]]:
    """Each word that is long enough, behind what stands around it."""
    for place, word in enumerate(words):
        if len(word) >= LEAST_LETTERS:
            yield (words[:place], words[place + 1 :]), word


def _forms(word: str) -> set[str]:
    return {word, *(word[:place] + word[place + 1 :] for place in range(len(word)))}


def _one_letter_apart(a: str, b: str) -> bool:
    """Whether one letter, added, missing or another, makes one word of the other."""
    if len(a) == len(b):
        return sum(one != other for one, other in zip(a, b, strict=True)) == 1
    short, long = sorted((a, b), key=len)
    return short in _forms(long) and len(long) == len(short) + 1
