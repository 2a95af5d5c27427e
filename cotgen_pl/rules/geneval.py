"""GenEval's rules: which clauses of a prompt hold, given the objects that a detector found.

The verdict of evaluation/evaluate_images.py in github.com/djghosh13/geneval at af4902f, and the
graded reward that flow_grpo's server (github.com/yifan123/reward-server at 92ac29f) makes of the
same facts. Pure functions over boxes and names; detector and color classifier stand elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

POSITION_MARGIN = 0.1  # of both objects' sizes
POSITION_SHARE = 0.5  # of the distance that must lie along the named direction
ATTRIBUTES = ("color", "texture")  # GenEval asks for color alone, the Shapes world for both
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9  # the tag `counting` wants surer detections
MOST_PER_CLASS = 16

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Clauses = dict[str, bool]


@dataclass
class Found:
    """An object that a detector found."""

    label: str
    score: float
    """Confidence in [0, 1]."""
    box: Box


AttributeReader = Callable[[Found, str], str]
"""Gives an object's word for an attribute, "color" or "texture"."""


@dataclass
class Group:
    """The objects of one include clause."""

    top: list[Found]
    """The surest ones, as many as asked for; fewer where there are fewer."""
    clauses: Clauses = field(default_factory=dict)

    @property
    def matched(self) -> bool:
        """Whether all that was asked of them holds."""
        return all(self.clauses.values())


def keep_sure(found: Sequence[Found], tag: str) -> list[Found]:
    """The detections that count, surest first: above the tag's threshold, at most 16 of a class.

    Args:
        found: In any order.
        tag: GenEval's category of the prompt; `counting` has a threshold of its own.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    number: dict[str, int] = {}
    kept = []
    for item in sorted(found, key=lambda item: -item.score):
        number[item.label] = number.get(item.label, 0) + 1
        if item.score > threshold and number[item.label] <= MOST_PER_CLASS:
            kept.append(item)
    return kept


def relative_positions(a: Box, b: Box) -> set[str]:
    """The relations of box `a` to box `b`: left of, right of, above, below; two may hold.

    >>> relative_positions((0, 100, 100, 200), (200, 100, 300, 200))
    {'left of'}
    """
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sizes = [a[k + 2] - a[k] + b[k + 2] - b[k] for k in (0, 1)]
    revised = [
        math.copysign(max(abs(off) - POSITION_MARGIN * size, 0.0), off)
        for off, size in zip(offset, sizes, strict=True)
    ]
    if max(map(abs, revised)) < 1e-3:
        return set()
    dx, dy = (value / math.hypot(*offset) for value in revised)
    relations = {
        "left of": dx < -POSITION_SHARE,
        "right of": dx > POSITION_SHARE,
        "above": dy < -POSITION_SHARE,
        "below": dy > POSITION_SHARE,
    }
    return {name for name, holds in relations.items() if holds}


def judge(facts: dict[str, Any], found: Sequence[Found], read: AttributeReader) -> Clauses:
    """The clauses of a prompt; the picture is right when all hold.

    An include clause wants at least `count` objects and then looks at the `count` surest alone. An
    exclude clause fails at `count` objects or more. A position holds of every such object to every
    one of the target clause, which must be matched itself.

    Args:
        facts: `include` and, optionally, `exclude`, as in GenEval's metadata.
        found: As `keep_sure` gives them.
        read: Asked only for objects whose attribute matters.
    """
    groups: list[Group] = []
    for i, item in enumerate(facts["include"]):
        groups.append(_judge_include(i, item, found, read, groups))
    clauses = {name: holds for group in groups for name, holds in group.clauses.items()}
    for item in facts.get("exclude") or ():
        number = sum(other.label == item["class"] for other in found)
        clauses[f"exclude: {item['count']} {item['class']}"] = number < item["count"]
    return clauses


def _judge_include(
    i: int, item: dict[str, Any], found: Sequence[Found], read: AttributeReader, before: list[Group]
) -> Group:
    top = [other for other in found if other.label == item["class"]][: item["count"]]
    group = Group(top)
    group.clauses[f"include {i}: {item['count']} {item['class']}"] = len(top) == item["count"]
    for name in ATTRIBUTES:
        if name in item:
            holds = group.matched and all(read(other, name) == item[name] for other in top)
            group.clauses[f"{name} {i}: {item[name]}"] = holds
    if "position" in item:
        relation, target = item["position"]
        holds = group.matched and before[target].matched
        holds = holds and _all_stand(relation, top, before[target].top)
        group.clauses[f"position {i}: {relation} {target}"] = holds
    return group


def _all_stand(relation: str, objects: Sequence[Found], targets: Sequence[Found]) -> bool:
    return all(relation in relative_positions(a.box, b.box) for a, b in product(objects, targets))


def graded_reward(
    facts: dict[str, Any],
    found: Sequence[Found],
    read: AttributeReader,
    *,
    reference_faults: bool = False,
) -> tuple[float, bool]:
    """flow_grpo's reward: the mean of several terms, and whether the picture is right in all.

    Every include clause gives 1 - |n - f| / n for n objects asked and f found, which is negative
    above 2n. Where f is n, an attribute gives the same of the objects that have it, and a position
    1 or 0; where it is not, each of these gives 0. Exclude clauses are not used.

    Args:
        facts: `include`, as in GenEval's metadata.
        found: As `keep_sure` gives them.
        read: Asked only for objects whose attribute matters.
        reference_faults: Give a wrong position a second term, of 1, as the server does.

    Returns:
        The mean, and whether counts are equal, attributes and positions right.
    """
    terms: list[float] = []
    matched: list[bool] = []
    groups: list[list[Found]] = []
    for item in facts["include"]:
        own, n = [other for other in found if other.label == item["class"]], item["count"]
        terms.append(1 - abs(n - len(own)) / n)
        right = len(own) == n
        for name in ATTRIBUTES:
            if name in item:
                fitting = sum(read(other, name) == item[name] for other in own) if right else 0
                terms.append(1 - abs(n - fitting) / n)
                right = right and fitting == n
        if "position" in item:
            relation, target = item["position"]
            holds = right and matched[target] and _all_stand(relation, own, groups[target])
            terms.append(float(holds))
            if reference_faults and right and matched[target] and not holds:
                terms.append(1.0)
            right = holds
        matched.append(right)
        groups.append(own)
    return sum(terms) / len(terms), all(matched)
