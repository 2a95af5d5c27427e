"""Which images of a prompt make a preference pair, from their scores alone.

Apart from the losses, because pairs are made once and trained on later, and from whatever draws and
stores them, so that every rule can be checked by enumeration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cotgen_pl.interfaces import check_choice
from cotgen_pl.losses import EQUAL_REWARDS, dead_groups
from cotgen_pl.sampling import uniform_noise

PairRule = Literal["best_worst", "best_random", "all_pairs"]


@dataclass(frozen=True)
class Selection:
    """Pairs of images as rows of the P * G that were scored, and what became of other groups."""

    chosen: list[int]
    """The better image of each pair; pairs of one prompt are adjacent."""
    rejected: list[int]
    """The worse image of each pair."""
    dropped: dict[str, int]
    """Groups without a pair: `missing` (fewer than two verdicts), `equal` (all verdicts equal up to
    rounding), `margin` (best minus worst below the margin)."""


def select_pairs(
    scores: Tensor,
    group_size: int,
    *,
    rule: PairRule = "best_worst",
    margin: float = 0.0,
    seeds: Sequence[int],
) -> Selection:
    """Choose pairs within each prompt's group of images.

    `best_worst`: the highest score against the lowest. `best_random`: the highest against any that
    is lower by the margin. `all_pairs`: each two whose scores differ by the margin. A difference
    that is float32 rounding, as in `dead_groups`, makes no pair, and costs none its margin.

    Args:
        scores: [P * G], finite or NaN (no verdict, never in a pair), the G images of a prompt
            adjacent.
        group_size: G, at least 2.
        rule: One of the three.
        margin: Least score difference of a pair, in the scores' unit, 0 or more.
        seeds: One per prompt. They decide between several highest and several lowest scores, and
            draw for `best_random`; what they decide does not depend on other groups.

    >>> scores = torch.tensor([0.2, 0.9, 0.5, 0.7, 0.7, 0.7])
    >>> select_pairs(scores, group_size=3, seeds=[1, 2])
    Selection(chosen=[1], rejected=[0], dropped={'missing': 0, 'equal': 1, 'margin': 0})
    """
    check_choice("rule", rule, PairRule)
    if not margin >= 0:
        raise ValueError(f"expected a margin of 0 or more, got {margin}; 0 keeps every difference")
    equal = dead_groups(scores, group_size)  # [P], fewer than two verdicts too
    if len(seeds) != len(equal):
        raise ValueError(f"expected {len(equal)} seeds, one per prompt, got {len(seeds)}")
    groups = scores.detach().cpu().reshape(-1, group_size)
    missing = (~groups.isnan()).sum(dim=1) < 2
    better = _is_better(groups, margin)
    chosen: list[int] = []
    rejected: list[int] = []
    dropped = {"missing": 0, "equal": 0, "margin": 0}
    for number, noise in enumerate(uniform_noise(seeds, 2).tolist()):
        if missing[number]:
            dropped["missing"] += 1
        elif equal[number]:
            dropped["equal"] += 1
        elif not better[number].any():
            dropped["margin"] += 1
        else:
            for winner, loser in _pairs_of(groups[number], better[number], rule, noise):
                chosen.append(number * group_size + winner)
                rejected.append(number * group_size + loser)
    return Selection(chosen, rejected, dropped)


def _is_better(groups: Tensor, margin: float) -> Tensor:
    """Whether image i of a group makes a pair over image j, [P, G, G]; false beside NaN."""
    higher, lower = groups.unsqueeze(2), groups.unsqueeze(1)
    difference = higher - lower
    is_preference = difference > EQUAL_REWARDS * lower.abs()  # as in `dead_groups`
    # In float32, 0.9 - 0.8 is 0.09999996 and still a margin of 0.1.
    rounding = EQUAL_REWARDS * torch.maximum(higher.abs(), lower.abs())
    return is_preference & (difference + rounding >= margin)


def _pairs_of(
    group: Tensor, better: Tensor, rule: PairRule, noise: Sequence[float]
) -> list[tuple[int, int]]:
    """Pairs (winner, loser) of a group that has one, from scores [G] and `_is_better` [G, G]."""
    if rule == "all_pairs":
        return [(winner, loser) for winner, loser in better.nonzero().tolist()]
    verdicts = group[~group.isnan()]
    winner = _draw(group == verdicts.max(), noise[0])
    losers = group == verdicts.min() if rule == "best_worst" else better[winner]
    return [(winner, _draw(losers, noise[1]))]


def _draw(candidates: Tensor, noise: float) -> int:
    """One of the places [G] that are true, by a number in [0, 1)."""
    places: list[int] = candidates.nonzero()[:, 0].tolist()
    return places[int(noise * len(places))]
