"""Verdicts over facts: which clauses of a prompt hold in a picture that was read.

Two sets of rules, after T2I-CompBench (in domain) and GenEval (out of domain). A picture's `graded`
score is the share of true clauses, its `strict` score 1 when all are true. Attributes count only on
an object that is there, relations only between objects that are right: an empty picture scores 0,
the picture of another prompt of the same world 0.19 on average (0.28 among the training prompts,
which share most of their words).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, permutations, product
from typing import Any

from cotgen_pl.rules.geneval import relative_positions
from cotgen_pl.shapes.recognise import Recognition
from cotgen_pl.shapes.render import CELL, GRID, Placed

NEAR = 150 / 479 * GRID * CELL  # T2I-CompBench's 150 pixels, at this picture's size: 10 pixels
RELATIONS = ("left", "right", "above", "below", "next to")  # in domain
POSITIONS = ("left of", "right of", "above", "below")  # out of domain

Facts = dict[str, Any]
Clauses = dict[str, bool]


def judge(facts: Facts, recognition: Recognition) -> Clauses:
    """The verdict by the rules that the prompt's facts are written for."""
    if "objects" in facts:
        return judge_compbench(facts, recognition)
    return judge_geneval(facts, recognition)


def check_compbench_facts(facts: Facts) -> None:
    """Raise a ValueError unless `judge_compbench` can read a prompt's facts."""
    objects = facts.get("objects") or None  # an empty list asks for nothing
    form = (
        '{"shape": text, "color": text or null, "texture": text or null, "count": 1 or more, '
        '"numbered": true or false}'
    )
    _check_items("objects", objects, form, lambda place, item: _is_asked(item))
    form = f"[number of an object, one out of {RELATIONS}, number of an object]"
    number = len(facts["objects"])
    _check_items(
        "relations", facts.get("relations"), form, lambda place, item: _is_relation(item, number)
    )


def check_geneval_facts(facts: Facts) -> None:
    """Raise a ValueError unless `judge_geneval` can read a prompt's facts."""
    form = (
        '{"class": text, "count": 1 or more} with optional "color": text, "texture": text and '
        f'"position": [one out of {POSITIONS}, number of an earlier clause of include]'
    )
    _check_items("include", facts.get("include") or None, form, _is_clause)
    _check_items("exclude", facts.get("exclude", []), form, _is_clause)


def graded(clauses: Clauses) -> float:
    """The share of true clauses."""
    return sum(clauses.values()) / len(clauses)


def strict(clauses: Clauses) -> float:
    """1 when all clauses hold, else 0."""
    return float(all(clauses.values()))


def judge_compbench(facts: Facts, recognition: Recognition) -> Clauses:
    """The clauses of an in-domain prompt.

    Each asked object is matched with the found one that fits it best; none is used twice. From the
    match are read: `color` and `texture` (on that object), `binding` (all on it, where both are
    asked), or `object` (its shape is there) where no attribute is asked: attributes imply it, and a
    clause that most wrong pictures satisfy would only lift every score. `count` is exact, where the
    prompt says a number; `relation` holds when any two objects that fit completely stand so; `no
    extra object` when there are no more objects than asked (an unreadable cell is one) and at least
    one of them is right.

    Args:
        facts: `objects`, each with shape, color, texture (None where not asked), count and
            numbered (whether the prompt says its number); `relations`, each [i, relation, j]. No
            object may fit two asked ones.
        recognition: What stands in the picture.
    """
    asked: list[Facts] = facts["objects"]
    found = recognition.objects
    matches = _match(asked, found)
    fitting = [[o for o in found if _fits(item, o)] for item in asked]
    clauses: Clauses = {}
    for i, item in enumerate(asked):
        clauses |= _object_clauses(i, item, matches[i])
        if item["numbered"]:
            clauses[f"count {i}: {item['count']}"] = len(fitting[i]) == item["count"]
    for i, relation, j in facts["relations"]:
        clauses[f"relation: {i} {relation} {j}"] = any(
            relation_holds(relation, a, b) for a, b in product(fitting[i], fitting[j])
        )
    num_found = len(found) + len(recognition.unreadable)
    no_extra = num_found <= sum(item["count"] for item in asked)
    clauses["no extra object"] = no_extra and any(fitting)
    return clauses if recognition.is_picture else dict.fromkeys(clauses, False)


def relation_holds(relation: str, a: Placed, b: Placed) -> bool:
    """Whether `a` stands in a relation to `b` by T2I-CompBench's 2D rule on centres.

    Objects never overlap here, so the rule's overlap term is always satisfied. "next to" is true
    where the original gives 1: within `NEAR` along one axis, whatever the other.
    """
    x, y = (b.column - a.column) * CELL, (b.row - a.row) * CELL
    if relation == "next to":
        return abs(x) < NEAR or abs(y) < NEAR
    along = {"left": x, "right": -x, "above": y, "below": -y}[relation]
    across = y if relation in ("left", "right") else x
    return along > abs(across)


def judge_geneval(facts: Facts, recognition: Recognition) -> Clauses:
    """The clauses of a prompt in GenEval's wording, by GenEval's rules on the cells' boxes.

    All found objects are equally sure here, so the "top" ones are the first in reading order.
    Deviations: texture is judged like color; `exclude` fails without any object of its class (an
    empty picture scores 0); several clauses stand where GenEval reports only all or nothing.

    Args:
        facts: `include` and `exclude`, as in GenEval's metadata, with an optional `texture`.
        recognition: What stands in the picture.
    """
    clauses: Clauses = {}
    groups: list[list[Placed]] = []  # the objects that satisfy each include; empty when unmatched
    for i, item in enumerate(facts["include"]):
        top = [o for o in recognition.objects if o.shape == item["class"]][: item["count"]]
        own = _include_clauses(i, item, top)
        matched = all(own.values())
        if "position" in item:
            relation, target = item["position"]
            own[f"position {i}: {relation} {target}"] = matched = matched and _all_stand(
                relation, top, groups[target]
            )
        groups.append(top if matched else [])
        clauses |= own
    for item in facts.get("exclude", ()):
        number = sum(o.shape == item["class"] for o in recognition.objects)
        clauses[f"exclude: {item['count']} {item['class']}"] = 0 < number < item["count"]
    return clauses if recognition.is_picture else dict.fromkeys(clauses, False)


def _check_items(name: str, items: Any, form: str, fits: Callable[[int, Any], bool]) -> None:
    """Raise a ValueError for the first item of a fact that is not as it must be."""
    if isinstance(items, list):
        wrong = [item for place, item in enumerate(items) if not fits(place, item)]
    else:
        wrong = [items]
    if wrong:
        raise ValueError(
            f"expected a list under {name!r}, each of the form {form}, got {wrong[0]!r}; correct "
            "this prompt's facts, or score it by another reward"
        )


def _is_asked(item: Any) -> bool:
    match item:
        case {
            "shape": str(),
            "color": str() | None,
            "texture": str() | None,
            "count": int(count),
            "numbered": bool(),
        }:
            return count >= 1
    return False


def _is_relation(item: Any, num_objects: int) -> bool:
    match item:
        case [int(i), relation, int(j)]:
            return relation in RELATIONS and 0 <= i < num_objects and 0 <= j < num_objects
    return False


def _is_clause(place: int, item: Any) -> bool:
    match item:
        case {"class": str(), "count": int(count), **rest} if count >= 1:
            words = [rest[name] for name in ("color", "texture") if name in rest]
            return all(isinstance(word, str) for word in words) and (
                "position" not in rest or _is_position(rest["position"], place)
            )
    return False


def _is_position(position: Any, place: int) -> bool:
    match position:
        case [relation, int(target)]:
            return relation in POSITIONS and 0 <= target < place
    return False


def _fits(item: Facts, found: Placed) -> bool:
    return all(item[name] in (None, getattr(found, name)) for name in ("shape", "color", "texture"))


def _quality(item: Facts, found: Placed | None) -> int:
    """How many of the asked attributes an object has, and one more when it has all."""
    if found is None:
        return -1
    has = (item["color"] == found.color) + (item["texture"] == found.texture)
    return has + _fits(item, found)


def _match(asked: Sequence[Facts], found: Sequence[Placed]) -> list[Placed | None]:
    """The found object that stands for each asked one, best in total; None where none is left."""
    matches: list[Placed | None] = [None] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: asked[i]["shape"])
    for shape, same in groupby(order, key=lambda i: asked[i]["shape"]):
        group = list(same)
        here: list[Placed | None] = [o for o in found if o.shape == shape]
        here += [None] * (len(group) - len(here))
        best = max(
            permutations(here, len(group)),
            key=lambda chosen: sum(
                _quality(asked[i], o) for i, o in zip(group, chosen, strict=True)
            ),
        )
        for i, choice in zip(group, best, strict=True):
            matches[i] = choice
    return matches


def _object_clauses(i: int, item: Facts, match: Placed | None) -> Clauses:
    named = [name for name in ("color", "texture") if item[name] is not None]
    clauses = {} if named else {f"object {i}: {item['shape']}": match is not None}
    for name in named:
        clauses[f"{name} {i}: {item[name]}"] = (
            match is not None and getattr(match, name) == item[name]
        )
    if len(named) == 2:
        clauses[f"binding {i}"] = match is not None and _fits(item, match)
    return clauses


def _include_clauses(i: int, item: Facts, top: Sequence[Placed]) -> Clauses:
    enough = len(top) == item["count"]
    named = [name for name in ("color", "texture") if name in item]
    bare = not named or item["count"] > 1
    clauses = {f"include {i}: {item['count']} {item['class']}": enough} if bare else {}
    for name in named:
        clauses[f"{name} {i}: {item[name]}"] = enough and all(
            getattr(o, name) == item[name] for o in top
        )
    return clauses


def _all_stand(relation: str, objects: Sequence[Placed], targets: Sequence[Placed]) -> bool:
    return bool(targets) and all(
        relation in relative_positions(o.box, t.box) for o, t in product(objects, targets)
    )
