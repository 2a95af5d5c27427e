"""Prompts of the Shapes world: its words, its two wordings, and the suites that split them.

Out of domain is relative to reinforcement learning: the RL prompts know only the in-domain wording
(after T2I-CompBench), the words of set A and the seen pairs. The out-of-domain suite speaks
GenEval's wording and has a word of set B or a held-out pair in each prompt. T2I-CompBench's
non-spatial actions have no analogue here.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cotgen_pl.interfaces import Prompt
from cotgen_pl.shapes.render import COLORS, SHAPES, TEXTURES

A_SHAPES = ("circle", "square", "triangle")
A_COLORS = ("red", "green", "blue", "yellow")
HELD_OUT_SHARE = 0.25  # of the 66 pairs of A objects
MAX_OBJECTS = 8  # half of the cells, so that a relation can always be placed
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
IN_DOMAIN_CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy", "complex")
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATION_PHRASES = {
    "on the left of": "left",
    "on the right of": "right",
    "on the top of": "above",
    "on the bottom of": "below",
    "next to": "next to",
    "near": "next to",
}
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")

Kind = tuple[str, str]
"""The color and shape of an object."""
Wording = Literal["in_domain", "geneval", "both"]


class Words(NamedTuple):
    """The shapes and colors that a prompt may name; textures are shared by all."""

    shapes: tuple[str, ...]
    colors: tuple[str, ...]


A_WORDS = Words(A_SHAPES, A_COLORS)
ALL_WORDS = Words(SHAPES, COLORS)


@cache
def held_out_pairs() -> frozenset[frozenset[Kind]]:
    """The pairs of A objects that reinforcement learning never sees: 16 of 66.

    Ranked by a hash of their names, so the choice depends on neither the Python version nor set
    order. Of the choices 0, 1, ... this is the first that is even: each object is in 2 to 4 pairs,
    and 3 pairs share a shape and 2 a color (of all 66: 18 and 12).
    """
    kinds = [(color, shape) for color in A_COLORS for shape in A_SHAPES]
    pairs = sorted(
        combinations(kinds, 2), key=lambda pair: _rank(f"split 144: {pair[0]} {pair[1]}")
    )
    return frozenset(frozenset(pair) for pair in pairs[: int(HELD_OUT_SHARE * len(pairs))])


def has_held_out_pair(prompt: Prompt) -> bool:
    """Whether two objects of the prompt are a held-out pair."""
    named = [(item["color"], shape) for shape, item in _items(prompt) if item.get("color")]
    return any(frozenset(pair) in held_out_pairs() for pair in combinations(named, 2))


def has_b_word(prompt: Prompt) -> bool:
    """Whether the prompt names a shape or a color of set B."""
    return any(
        shape not in A_SHAPES or (item.get("color") or A_COLORS[0]) not in A_COLORS
        for shape, item in _items(prompt)
    )


def draw_prompt(
    rng: random.Random,
    *,
    wording: Wording,
    words: Literal["A", "all"],
    pairs: Literal["seen", "all"],
) -> Prompt:
    """A random prompt for training data, its category uniform over those of the wording.

    Args:
        rng: Source of randomness; advanced.
        wording: Whose phrases: T2I-CompBench's (`in_domain`), GenEval's, or one of them at random.
        words: Which shapes and colors may be named.
        pairs: `seen` leaves out prompts that hold a held-out pair.
    """
    if wording == "both":
        wording = rng.choice(("in_domain", "geneval"))
    categories = {"in_domain": IN_DOMAIN_CATEGORIES, "geneval": GENEVAL_TAGS}[wording]
    category = rng.choice(categories)
    while True:
        prompt = _draw(rng, category, {"A": A_WORDS, "all": ALL_WORDS}[words])
        if pairs == "all" or not has_held_out_pair(prompt):
            return prompt


def suites() -> dict[str, list[Prompt]]:
    """All shipped prompts by suite; the same at every call.

    `id_probe` repeats 16 training prompts per category. The tags single_object (of every suite in
    GenEval's wording) and counting (of `ood_geneval`) have too few distinct prompts and are
    repeated in turn.
    """
    rng = random.Random("cotgen shapes suites 1")
    splits = _in_domain_splits(rng)
    splits["ood_geneval"] = _suite(
        rng,
        "ood_geneval",
        GENEVAL_TAGS,
        32,
        ALL_WORDS,
        lambda p: has_b_word(p) or has_held_out_pair(p),
    )
    splits["shift_wording"] = _suite(rng, "shift_wording", GENEVAL_TAGS, 16, A_WORDS, _is_seen)
    splits["shift_pairs"] = _suite(
        rng, "shift_pairs", IN_DOMAIN_CATEGORIES, 16, A_WORDS, has_held_out_pair
    )
    splits["shift_words"] = _suite(
        rng,
        "shift_words",
        IN_DOMAIN_CATEGORIES,
        16,
        ALL_WORDS,
        lambda p: has_b_word(p) and _is_seen(p),
    )
    return splits


def write_suites(folder: Path) -> list[Path]:
    """Write each suite as `<suite>.jsonl`: prompt, category, and every fact as a column."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suite, prompts in suites().items():
        rows = [json.dumps({"prompt": p.text, "category": p.category, **p.facts}) for p in prompts]
        paths.append(folder / f"{suite}.jsonl")
        paths[-1].write_text("\n".join(rows) + "\n", encoding="utf-8")
    return paths


def _in_domain_splits(rng: random.Random) -> dict[str, list[Prompt]]:
    sizes = {"train": 256, "id_validation": 32, "id_development": 16}
    pool = _suite(rng, "", IN_DOMAIN_CATEGORIES, sum(sizes.values()), A_WORDS, _is_seen)
    splits: dict[str, list[Prompt]] = {suite: [] for suite in (*sizes, "id_probe")}
    for start in range(0, len(pool), sum(sizes.values())):
        rest = iter(pool[start : start + sum(sizes.values())])
        for suite, size in sizes.items():
            splits[suite] += [_renamed(next(rest), suite) for _ in range(size)]
        splits["id_probe"] += [_renamed(prompt, "id_probe") for prompt in pool[start : start + 16]]
    return splits


def _suite(
    rng: random.Random,
    suite: str,
    categories: tuple[str, ...],
    size: int,
    words: Words,
    keep: Callable[[Prompt], bool],
) -> list[Prompt]:
    """`size` prompts per category that satisfy `keep`; if there are fewer, repeated in turn."""
    prompts: list[Prompt] = []
    for category in categories:
        distinct: dict[str, Prompt] = {}
        for _ in range(100 * size):  # enough draws to meet every prompt of a small category
            prompt = _draw(rng, category, words)
            if keep(prompt):
                distinct.setdefault(prompt.text, _renamed(prompt, suite))
            if len(distinct) == size:
                break
        found = list(distinct.values())
        prompts += [found[i % len(found)] for i in range(size)]
    return prompts


def _is_seen(prompt: Prompt) -> bool:
    return not has_held_out_pair(prompt)


def _renamed(prompt: Prompt, suite: str) -> Prompt:
    return Prompt(prompt.text, suite, prompt.category, prompt.facts)


def _rank(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _items(prompt: Prompt) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each asked object's shape and facts, in either wording."""
    for item in prompt.facts.get("objects", ()):
        yield item["shape"], item
    for item in prompt.facts.get("include", ()):
        yield item["class"], item


def _draw(rng: random.Random, category: str, words: Words) -> Prompt:
    text, facts = _DRAWERS[category](rng, words)
    return Prompt(text, category=category, facts=facts)


def _draw_kinds(rng: random.Random, words: Words, count: int) -> list[Kind]:
    return rng.sample([(color, shape) for color in words.colors for shape in words.shapes], count)


def _asked(
    kind: Kind, texture: str | None = None, count: int = 1, *, numbered: bool = False
) -> dict[str, Any]:
    """Facts of an in-domain object; `numbered` when the prompt says its number and not just "a"."""
    color, shape = kind
    return {
        "shape": shape,
        "color": color,
        "texture": texture,
        "count": count,
        "numbered": numbered,
    }


def _facts(
    objects: list[dict[str, Any]], relations: list[list[Any]] | None = None
) -> dict[str, Any]:
    return {"objects": objects, "relations": relations or []}


def _a(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _number(count: int, phrase: str) -> str:
    ending = "" if count == 1 else "es" if phrase.endswith("s") else "s"
    return f"{NUMBER_WORDS[count]} {phrase}{ending}"


Drawn = tuple[str, dict[str, Any]]


def _draw_color(rng: random.Random, words: Words) -> Drawn:
    first, second = _draw_kinds(rng, words, 2)
    (color, shape), (other_color, other_shape) = first, second
    texts = [
        f"{_a(color)} {shape} and {_a(other_color)} {other_shape}",
        f"the {color} {shape} and the {other_color} {other_shape}",
        f"{_a(shape)} that is {color} and {_a(other_shape)} that is {other_color}",
        f"{_a(color)}-colored {shape} and {_a(other_color)}-colored {other_shape}",
    ]
    if shape != other_shape:
        texts.append(f"the {shape} is {color} and the {other_shape} is {other_color}")
    return rng.choice(texts), _facts([_asked(first), _asked(second)])


def _draw_shape(rng: random.Random, words: Words) -> Drawn:
    first, second = _draw_kinds(rng, words, 2)
    (color, shape), (other_color, other_shape) = first, second
    texts = [
        f"{_a(color)} object shaped like {_a(shape)} and "
        f"{_a(other_color)} object shaped like {_a(other_shape)}",
        f"{_a(shape)}-shaped {color} object and {_a(other_shape)}-shaped {other_color} object",
        f"{_a(color)} object in the shape of {_a(shape)} and "
        f"{_a(other_color)} object in the shape of {_a(other_shape)}",
        f"{_a(color)} thing that is {_a(shape)} and "
        f"{_a(other_color)} thing that is {_a(other_shape)}",
    ]
    if color != other_color:
        texts.append(
            f"the {color} object is {_a(shape)} and the {other_color} object is {_a(other_shape)}"
        )
    return rng.choice(texts), _facts([_asked(first), _asked(second)])


def _draw_texture(rng: random.Random, words: Words) -> Drawn:
    objects = [_asked(kind, rng.choice(TEXTURES)) for kind in _draw_kinds(rng, words, 2)]
    first, second = objects
    texts = [
        f"{_describe(first)} and {_describe(second)}",
        " and ".join(f"the {o['color']} {o['shape']} is {o['texture']}" for o in objects),
        " and ".join(f"{_a(o['color'])} {o['shape']} that is {o['texture']}" for o in objects),
    ]
    return rng.choice(texts), _facts(objects)


def _draw_spatial(rng: random.Random, words: Words) -> Drawn:
    objects = [_asked(kind) for kind in _draw_kinds(rng, words, 2)]
    phrase = rng.choice(tuple(RELATION_PHRASES))
    text = f"{_describe(objects[0])} {phrase} {_describe(objects[1])}"
    return text, _facts(objects, [[0, RELATION_PHRASES[phrase], 1]])


def _draw_numeracy(rng: random.Random, words: Words) -> Drawn:
    objects = [
        _asked(kind, count=rng.randint(1, MAX_OBJECTS // 2), numbered=True)
        for kind in _draw_kinds(rng, words, rng.choice((1, 2, 2, 2)))
    ]
    phrases = [_number(o["count"], f"{o['color']} {o['shape']}") for o in objects]
    return " and ".join(phrases), _facts(objects)


def _draw_complex(rng: random.Random, words: Words) -> Drawn:
    kinds = _draw_kinds(rng, words, rng.choice((2, 3)))
    objects = [_asked(kind, rng.choice(TEXTURES)) for kind in kinds[:2]]
    phrase = rng.choice(tuple(RELATION_PHRASES))
    text = f"{_describe(objects[0])} {phrase} {_describe(objects[1])}"
    for kind in kinds[2:]:
        objects.append(_asked(kind))
        text += f", and {_describe(objects[-1])}"
    return text, _facts(objects, [[0, RELATION_PHRASES[phrase], 1]])


def _describe(item: dict[str, Any]) -> str:
    words = (item.get("texture"), item.get("color"), item.get("shape") or item["class"])
    return _a(" ".join(word for word in words if word))


def _included(rng: random.Random, shape: str, **facts: Any) -> dict[str, Any]:
    """Facts of a GenEval object; every second one carries a texture."""
    texture = rng.choice((None, None, *TEXTURES))
    return {"class": shape, "count": 1, **({"texture": texture} if texture else {}), **facts}


def _photo(include: list[dict[str, Any]], text: str) -> Drawn:
    return f"a photo of {text}", {"include": include, "exclude": []}


def _draw_single_object(rng: random.Random, words: Words) -> Drawn:
    item = _included(rng, rng.choice(words.shapes))
    return _photo([item], _describe(item))


def _draw_two_object(rng: random.Random, words: Words) -> Drawn:
    items = [_included(rng, shape) for shape in rng.sample(words.shapes, 2)]
    return _photo(items, " and ".join(map(_describe, items)))


def _draw_counting(rng: random.Random, words: Words) -> Drawn:
    item = _included(rng, rng.choice(words.shapes), count=rng.randint(2, 4))
    phrase = " ".join(word for word in (item.get("texture"), item["class"]) if word)
    text, facts = _photo([item], _number(item["count"], phrase))
    facts["exclude"] = [{"class": item["class"], "count": item["count"] + 1}]
    return text, facts


def _draw_colors(rng: random.Random, words: Words) -> Drawn:
    item = _included(rng, rng.choice(words.shapes), color=rng.choice(words.colors))
    return _photo([item], _describe(item))


def _draw_position(rng: random.Random, words: Words) -> Drawn:
    relation = rng.choice(GENEVAL_RELATIONS)
    shape, moved_shape = rng.sample(words.shapes, 2)
    target, moved = _included(rng, shape), _included(rng, moved_shape, position=[relation, 0])
    return _photo([target, moved], f"{_describe(moved)} {relation} {_describe(target)}")


def _draw_color_attr(rng: random.Random, words: Words) -> Drawn:
    colors = rng.sample(words.colors, 2)
    shapes = rng.sample(words.shapes, 2)
    items = [_included(rng, s, color=c) for s, c in zip(shapes, colors, strict=True)]
    return _photo(items, " and ".join(map(_describe, items)))


_DRAWERS: dict[str, Callable[[random.Random, Words], Drawn]] = {
    "color": _draw_color,
    "shape": _draw_shape,
    "texture": _draw_texture,
    "spatial": _draw_spatial,
    "numeracy": _draw_numeracy,
    "complex": _draw_complex,
    "single_object": _draw_single_object,
    "two_object": _draw_two_object,
    "counting": _draw_counting,
    "colors": _draw_colors,
    "position": _draw_position,
    "color_attr": _draw_color_attr,
}
