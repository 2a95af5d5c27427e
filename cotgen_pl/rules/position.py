"""Where one box lies relative to another: the rule by which T2I-CompBench judges 2D positions.

Apart from its users because several scorers judge positions, each by its own detector. Source:
`determine_position` in UniDet_eval/2D_spatial_eval.py of
https://github.com/Karine-Huang/T2I-CompBench/tree/1b70949. It deviates in one point: `above` and
`on top of`, which score 0 there in every picture, mean what `on the top of` means.

A box is (left, top, right, bottom) in pixels, and y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Box = Sequence[float]
Direction = Literal["beside", "left", "right", "above", "below"]

RELATIONS: dict[str, Direction] = {
    "next to": "beside",
    "near": "beside",
    "on side of": "beside",
    "on the left of": "left",
    "left of": "left",
    "on the right of": "right",
    "right of": "right",
    "on the top of": "above",
    "top of": "above",
    "on top of": "above",
    "above": "above",
    "on the bottom of": "below",
    "below": "below",
}


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, 0 to 1; 0 for boxes without area.

    >>> overlap((0, 0, 100, 100), (50, 0, 150, 100))  # 50 of 150 columns
    0.3333333333333333
    >>> overlap((0, 0, 100, 100), (100, 0, 200, 100))
    0.0
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def score_position(
    relation: str, first: Box, second: Box, near: float = 150.0, most_overlap: float = 0.1
) -> float:
    """How well "first `relation` second" holds for two boxes, 0 to 1.

    With (x, y) from the centre of the first box to that of the second:

    * beside: 1 where |x| or |y| is below `near`, else `near` / max(|x|, |y|);
    * left: 0 unless x > |y|; right: unless -x > |y|; above: unless y > |x|; below: unless -y > |x|.
      Then 1 where the boxes overlap by less than `most_overlap`, else `most_overlap` / overlap.

    >>> score_position("on the left of", (0, 0, 100, 100), (150, 0, 250, 100))
    1.0
    >>> score_position("on the left of", (0, 0, 100, 100), (50, 0, 150, 100))  # overlap 1/3
    0.30000000000000004
    >>> score_position("next to", (0, 0, 100, 100), (300, 300, 400, 400))  # 150 of 300 pixels
    0.5

    Args:
        relation: A key of `RELATIONS`.
        first: The box of the subject.
        second: The box that it is placed by.
        near: In the unit of the boxes, pixels; 150 as published.
        most_overlap: Intersection over union up to which boxes count as apart; 0.1 as published.

    Raises:
        ValueError: The relation is unknown.
    """
    if relation not in RELATIONS:
        raise ValueError(
            f"expected a relation out of {list(RELATIONS)}, got {relation!r}; write it as one of "
            "them"
        )
    x = (second[0] + second[2] - first[0] - first[2]) / 2
    y = (second[1] + second[3] - first[1] - first[3]) / 2
    direction = RELATIONS[relation]
    if direction == "beside":
        return 1.0 if min(abs(x), abs(y)) < near else near / max(abs(x), abs(y))
    ahead, aside = {"left": (x, y), "right": (-x, y), "above": (y, x), "below": (-y, x)}[direction]
    if ahead <= abs(aside):
        return 0.0
    shared = overlap(first, second)
    return 1.0 if shared < most_overlap else most_overlap / shared
