"""Pictures for prompts, right ones and ones that are wrong on purpose: training data has both."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cotgen_pl.interfaces import Prompt
from cotgen_pl.shapes.grammar import draw_prompt
from cotgen_pl.shapes.judge import judge, relation_holds, strict
from cotgen_pl.shapes.recognise import Recognition
from cotgen_pl.shapes.render import COLORS, GRID, SHAPES, TEXTURES, Placed

CELLS = tuple((row, column) for row in range(GRID) for column in range(GRID))
NUM_MISTAKES = (1, 1, 1, 2, 2, 3)  # one of these, at random; the last fact may need more
_WORDS = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES}


def compose(prompt: Prompt, rng: random.Random) -> list[Placed]:
    """A random picture in which every fact of the prompt holds and nothing else stands.

    Attributes that the prompt leaves open are drawn from all words. Directions hold by
    T2I-CompBench's rule in both wordings (it is the stricter one: the named axis must win); "next
    to" and "near" put the two in neighbouring cells, diagonals included.

    Args:
        prompt: Of either wording.
        rng: Source of randomness; advanced.
    """
    asked, relations = _wanted(prompt.facts)
    items = [item for item in asked for _ in range(item["count"])]
    first = [sum(other["count"] for other in asked[:i]) for i in range(len(asked))]
    kinds = [
        {name: item.get(name) or rng.choice(_WORDS[name]) for name in _WORDS} for item in items
    ]
    while True:
        objects = [
            Placed(**kind, row=row, column=column)
            for kind, (row, column) in zip(kinds, rng.sample(CELLS, len(kinds)), strict=True)
        ]
        if all(
            _clear(relation, objects[first[i]], objects[first[j]]) for i, relation, j in relations
        ):
            return _in_reading_order(objects)


def spoil(prompt: Prompt, objects: list[Placed], rng: random.Random) -> list[Placed]:
    """The picture with mistakes, small or large, so that at least one clause of the prompt fails.

    Args:
        prompt: What the picture was asked to show.
        objects: The picture; left as it is.
        rng: Source of randomness; advanced.
    """
    mistakes = rng.choice(NUM_MISTAKES)
    while mistakes > 0 or strict(judge(prompt.facts, Recognition(objects))):
        objects = _in_reading_order(rng.choice(_MISTAKES)(objects, rng))
        mistakes -= 1
    return objects


def _in_reading_order(objects: list[Placed]) -> list[Placed]:
    return sorted(objects, key=lambda o: (o.row, o.column))


def _wanted(facts: dict[str, Any]) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Objects and relations of either wording, in the in-domain form."""
    if "objects" in facts:
        return facts["objects"], facts["relations"]
    items = [{"shape": item["class"], **item} for item in facts["include"]]
    relations = [
        [i, item["position"][0].removesuffix(" of"), item["position"][1]]
        for i, item in enumerate(items)
        if "position" in item
    ]
    return items, relations


def _clear(relation: str, a: Placed, b: Placed) -> bool:
    if relation == "next to":
        return max(abs(a.row - b.row), abs(a.column - b.column)) == 1
    return relation_holds(relation, a, b)


Picture = list[Placed]


def _change(objects: Picture, rng: random.Random) -> Picture:
    """Give one object another shape, color or texture."""
    if not objects:
        return objects
    name = rng.choice(tuple(_WORDS))
    i = rng.randrange(len(objects))
    others = [word for word in _WORDS[name] if word != getattr(objects[i], name)]
    new: dict[str, Any] = {name: rng.choice(others)}
    changed = replace(objects[i], **new)
    return [*objects[:i], changed, *objects[i + 1 :]]


def _swap(objects: Picture, rng: random.Random) -> Picture:
    """Exchange the shape, color, texture or place of two objects."""
    if len(objects) < 2:
        return objects
    i, j = rng.sample(range(len(objects)), 2)
    names = rng.choice((*((name,) for name in _WORDS), ("row", "column")))
    swapped = list(objects)
    for here, there in ((i, j), (j, i)):
        taken: dict[str, Any] = {name: getattr(objects[there], name) for name in names}
        swapped[here] = replace(objects[here], **taken)
    return swapped


def _drop(objects: Picture, rng: random.Random) -> Picture:
    gone = rng.randrange(len(objects)) if objects else 0
    return objects[:gone] + objects[gone + 1 :]


def _add(objects: Picture, rng: random.Random) -> Picture:
    free = [cell for cell in CELLS if cell not in {(o.row, o.column) for o in objects}]
    if not free:
        return objects
    row, column = rng.choice(free)
    words = {name: rng.choice(choices) for name, choices in _WORDS.items()}
    return [*objects, Placed(**words, row=row, column=column)]


def _move(objects: Picture, rng: random.Random) -> Picture:
    """Put every object into a random cell."""
    cells = rng.sample(CELLS, len(objects))
    return [replace(o, row=r, column=c) for o, (r, c) in zip(objects, cells, strict=True)]


def _other(objects: Picture, rng: random.Random) -> Picture:
    """The picture of another prompt."""
    return compose(draw_prompt(rng, wording="both", words="all", pairs="all"), rng)


_MISTAKES: tuple[Callable[[Picture, random.Random], Picture], ...] = (
    _change,
    _change,
    _swap,
    _swap,
    _drop,
    _add,
    _move,
    _other,
)
