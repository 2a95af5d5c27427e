"""T2I-CompBench's rules over words and boxes, but for the position rule (position.py).

What its evaluation code reads out of a prompt and how it scores what a detector found, at
github.com/Karine-Huang/T2I-CompBench, revision 1b70949: UniDet_eval/2D_spatial_eval.py,
3D_spatial_eval.py and numeracy_eval.py. Pure functions; the detectors stand elsewhere. Its prompts
are templates but for parts of color, shape, texture and complex: what a template does not cover is
told as None, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cotgen_pl.rules.position import Box, overlap, score_position

PEOPLE = {"girl": "person", "boy": "person", "man": "person", "woman": "person"}
# In the order in which they are looked for.
RELATIONS_2D = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
RELATIONS_3D = ("in front of", "behind", "hidden by")
RULELESS = "on top of"  # always 0 there
# Nouns of the spatial prompts that are none of UniDet's labels, so that its score is 0.
UNKNOWN_TO_UNIDET = frozenset(
    ("mouse", "sofa", "table", "wallet", "bag", "painting", "cow", "phone", "computer")
)
# Of the 3D prompts, whose nouns may be a part of a label.
UNKNOWN_IN_DEPTH = frozenset(("wallet", "painting"))
OBJECT_SHARE, RELATION_SHARE = 0.25, 0.5
LEAST_SPATIAL_SCORE = 0.5  # below it, a 2D score is 0
MOST_DEPTH_OVERLAP = 0.5
DUPLICATE_OVERLAP = 0.9
NUMBER_WORDS = {
    word: number
    for number, words in enumerate(
        ("a an one", "two", "three", "four", "five", "six", "seven", "eight"), start=1
    )
    for word in words.split()
}
# Names in numeracy prompts, and the detector's.
NUMERACY_ALIASES = PEOPLE | {"ship": "boat", "goldfish": "fish", "painting": "picture"}

# Noun chunks that are no things, and how many others are asked about.
BARE_PHRASES = frozenset(("top", "the side", "the left", "the right"))
MOST_PHRASES = 8
# What complex prompts are searched for, in this order, and the relation that it means.
COMPLEX_RELATIONS = {
    "on top of": "on top of",
    "on bottom of": "on the bottom of",
    "on the left": "on the left of",
    "on the right": "on the right of",
    "next to": "next to",
    "on side of": "on side of",
    "near": "near",
}
DETECTOR_SHORT_SIDE, DETECTOR_LONG_SIDE = 479, 480  # pixels of the picture that boxes lie on

_PHRASE = r"(?:an? )?[^\s,.]+ [^\s,.]+(?: [^\s,.]+)?"
_TWO_PHRASES = re.compile(f"({_PHRASE}) and ({_PHRASE})")
_RELATION = re.compile(rf"an? (\S+) (?:is )?({'|'.join(RELATIONS_2D + RELATIONS_3D)}) an? (\S+)")


Word = tuple[str, str]
"""A token and its part of speech in spaCy's terms, like ("cup", "NOUN")."""


@dataclass(frozen=True)
class Relation:
    """Two things and how the first stands to the second."""

    first: str
    relation: str
    second: str


def template_phrases(text: str) -> list[str] | None:
    """The two noun phrases of "[a] two or three words and [a] two or three words", else None.

    An article may be the first of the two or three.

    >>> template_phrases("a green bench and a blue bowl")
    ['a green bench', 'a blue bowl']
    >>> template_phrases("The red car is fast.") is None
    True
    """
    match = _TWO_PHRASES.fullmatch(text)
    return list(match.groups()) if match else None


def parse_relation(text: str) -> Relation | None:
    """What "a NOUN RELATION a NOUN" says; people are persons. None for any other text.

    >>> parse_relation("a boy on the right of a lamp")
    Relation(first='person', relation='on the right of', second='lamp')
    """
    match = _RELATION.fullmatch(text.rstrip(". ").lower())
    if match is None:
        return None
    first, relation, second = match.groups()
    return Relation(PEOPLE.get(first, first), relation, PEOPLE.get(second, second))


def select_phrases(chunks: Sequence[str]) -> list[str]:
    """The noun chunks that are asked about: eight at most, but for those that only say where.

    >>> select_phrases(["a cup", "top", "a table"])
    ['a cup', 'a table']
    """
    return [chunk for chunk in chunks if chunk not in BARE_PHRASES][:MOST_PHRASES]


def without_adjectives(words: Sequence[Word]) -> str:
    """What CLIP reads of a complex prompt.

    >>> without_adjectives([("a", "DET"), ("red", "ADJ"), ("cup", "NOUN"), (".", "PUNCT")])
    'a cup .'
    """
    return " ".join(text for text, kind in words if kind != "ADJ")


def parse_complex_relation(words: Sequence[Word]) -> Relation | None:
    """What a complex prompt says about positions: a noun, a preposition of the list, a noun.

    Before the preposition it is the nearest noun or name; behind it the first noun, or without any
    the last word of the first name. None unless there are both; the score is 0 then.

    >>> words = [("A", "DET"), ("cat", "NOUN"), ("is", "AUX"), ("near", "ADP"), ("men", "NOUN")]
    >>> parse_complex_relation(words)
    Relation(first='cat', relation='near', second='men')
    """
    lower = [text.lower() for text, _ in words]
    for preposition, relation in COMPLEX_RELATIONS.items():
        parts = preposition.split()
        for start in range(len(lower) - len(parts) + 1):
            if lower[start : start + len(parts)] == parts:
                first = _last_noun(words[:start])
                second = _first_noun(words[start + len(parts) :])
                if first is None or second is None:
                    return None
                return Relation(PEOPLE.get(first, first), relation, PEOPLE.get(second, second))
    return None


def _last_noun(words: Sequence[Word]) -> str | None:
    nouns = [text.lower() for text, kind in words if kind in ("NOUN", "PROPN")]
    return nouns[-1] if nouns else None


def _first_noun(words: Sequence[Word]) -> str | None:
    for text, kind in words:
        if kind == "NOUN":
            return text.lower()
    name = None
    for text, kind in words:
        if kind == "PROPN":
            name = text.lower()
        elif name is not None:
            break
    return name


def detector_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of a picture on its way into UniDet, in whose pixels distances are judged.

    torchvision's `Resize(size=479, max_size=480)`.

    >>> detector_size(384, 384), detector_size(480, 640)
    ((479, 479), (360, 480))
    """
    shorter, longer = min(height, width), max(height, width)
    new_short, new_long = DETECTOR_SHORT_SIDE, int(DETECTOR_SHORT_SIDE * longer / shorter)
    if new_long > DETECTOR_LONG_SIDE:
        new_short = int(DETECTOR_LONG_SIDE * new_short / new_long)
        new_long = DETECTOR_LONG_SIDE
    return (new_short, new_long) if height <= width else (new_long, new_short)


def score_relation_2d(
    relation: str, first: Box, second: Box, *, reference_faults: bool = False
) -> float:
    """How well "first `relation` second" holds in the plane, 0 to 1.

    Args:
        relation: One out of `RELATIONS_2D`.
        first: Box of the subject, in the pixels of `detector_size`.
        second: Box of what it stands to.
        reference_faults: Give "on top of" 0, for which the published code has no rule.
    """
    if reference_faults and relation == RULELESS:
        return 0.0
    return score_position(relation, first, second)


def spatial_score(
    first: float | None, second: float | None, relation: float, *, least: float
) -> float:
    """A quarter of each thing's confidence, and half of how well the relation holds.

    >>> spatial_score(0.8, 0.6, 1.0, least=LEAST_SPATIAL_SCORE)
    0.85
    >>> spatial_score(0.8, None, 1.0, least=LEAST_SPATIAL_SCORE)
    0.0

    Args:
        first: Confidence of the first thing in [0, 1]; None where it was not found.
        second: Likewise.
        relation: 0 to 1; counts only where both were found.
        least: What lies below it is 0; `LEAST_SPATIAL_SCORE` in 2D, 0 in 3D.
    """
    score = OBJECT_SHARE * ((first or 0.0) + (second or 0.0))
    if first is not None and second is not None:
        score += RELATION_SHARE * relation
    return score if score >= least else 0.0


def score_depth_relation(
    relation: str, first: Box, second: Box, first_depth: float, second_depth: float
) -> float:
    """How well "first `relation` second" holds in depth, 0 to 1.

    0 where the depths say the opposite. Else, of the boxes' intersection over union: 1 above 0.5, 0
    at exactly 0.5 (as published), and twice itself below.

    >>> round(score_depth_relation("behind", (0, 0, 100, 100), (50, 0, 150, 100), 0.2, 0.7), 3)
    0.667

    Args:
        relation: One out of `RELATIONS_3D`.
        first: Box of the subject.
        second: Box of what it stands to.
        first_depth: Mean inverse depth in the box; larger is nearer.
        second_depth: Likewise.
    """
    if relation not in RELATIONS_3D:
        raise ValueError(
            f"expected a relation out of {list(RELATIONS_3D)}, got {relation!r}; write it as one "
            "of them"
        )
    nearer = first_depth > second_depth if relation == "in front of" else first_depth < second_depth
    shared = overlap(first, second)
    if not nearer or shared == MOST_DEPTH_OVERLAP:
        return 0.0
    return min(1.0, shared / MOST_DEPTH_OVERLAP)


# Numeracy -----------------------------------------------------------------------------------------


def read_nouns(lines: Sequence[str]) -> dict[str, str]:
    """Plural and singular to singular, out of the lines "singular - plural" of new_objects.txt.

    >>> read_nouns(["knife - knives"])
    {'knife': 'knife', 'knives': 'knife'}
    """
    nouns: dict[str, str] = {}
    for number, line in enumerate(filter(str.strip, lines), 1):
        parts = [part.strip() for part in line.split(" - ")]
        if len(parts) != 2 or not all(parts):
            raise ValueError(
                f"line {number}: expected 'singular - plural', got {line!r}; name T2I-CompBench's "
                "examples/dataset/new_objects.txt"
            )
        singular, plural = parts
        nouns |= {singular: singular, plural: singular}
    return nouns


def parse_counts(text: str, nouns: Mapping[str, str]) -> list[tuple[str, int]]:
    """How many of which things a prompt asks for: a number word, then a known noun.

    Words between the two are passed over; names of two words are tried before those of one. Men and
    women are persons, and stay two entries.

    >>> parse_counts("two red knives and a girl", {"knives": "knife", "girl": "girl"})
    [('knife', 2), ('person', 1)]
    """
    words = re.findall(r"[\w-]+", text.lower())
    asked: list[tuple[str, int]] = []
    number = None
    place = 0
    while place < len(words):
        pair = " ".join(words[place : place + 2])
        name = nouns.get(pair) or nouns.get(words[place])
        if name is not None and number is not None:
            asked.append((NUMERACY_ALIASES.get(name, name), number))
            number = None
        elif words[place] in NUMBER_WORDS:
            number = NUMBER_WORDS[words[place]]
        place += 2 if name is not None and pair in nouns else 1
    return asked


def drop_duplicates(boxes: Sequence[Box]) -> list[int]:
    """Places of the boxes that stay, surest first: none overlaps an earlier one by more than 0.9.

    By intersection over union, or over either box alone, on areas with one pixel added to each
    side.

    Args:
        boxes: Of one label, surest first.
    """
    kept: list[int] = []
    for place, box in enumerate(boxes):
        if not any(_is_duplicate(box, boxes[other]) for other in kept):
            kept.append(place)
    return kept


def _is_duplicate(one: Box, other: Box) -> bool:
    a, b = _closed(one), _closed(other)
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    smallest = min(_area(a), _area(b))  # over it is the larger of both containments, above the IoU
    return shared > DUPLICATE_OVERLAP * smallest


def _closed(box: Box) -> tuple[float, float, float, float]:
    """A box whose last pixels belong to it."""
    return box[0], box[1], box[2] + 1, box[3] + 1


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def numeracy_score(asked: Sequence[tuple[str, int]], found: Mapping[str, int]) -> float:
    """Half for each thing that is there, half for its exact number, mean over the things.

    >>> numeracy_score([("cup", 2), ("dog", 1)], {"cup": 3, "dog": 1})
    0.75

    Args:
        asked: Things with their numbers.
        found: Number of each thing that is there.
    """
    halves = [(found.get(name, 0) > 0) + (found.get(name, 0) == number) for name, number in asked]
    return sum(halves) / 2 / len(asked)


# 3-in-1 -------------------------------------------------------------------------------------------

Term = Literal["blip", "spatial", "clip"]
# What is averaged for a complex prompt, by the file of T2I-CompBench that holds it.
THREE_IN_ONE: dict[str, tuple[Term, ...]] = {
    "spatial": ("spatial", "blip"),
    "action": ("clip", "blip"),
    "spatialaction": ("blip", "spatial", "clip"),
}
