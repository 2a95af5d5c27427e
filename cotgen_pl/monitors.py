"""What tells, beside the reward itself, how a run is going: hacking, variety, agreement, uplift.

Apart from `metrics.py`, whose numbers are of one rollout of training: these compare evaluations,
pictures or rewards with each other. Tensors in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cotgen_pl.losses import EQUAL_REWARDS

LEAST_FALL = 0.02  # in the score's own unit, as the rule of `watch_hacking` has it
NUM_ERRORS = 2.0  # standard errors that are no chance: 1 in 40 lies further on one side


# Reward hacking ---------------------------------------------------------------------------------


@dataclass
class Verdicts:
    """Scores of the same pictures' prompts and seeds, evaluation after evaluation."""

    values: Tensor
    """[P, G], NaN for no verdict."""
    weights: Tensor
    """[P], of each prompt in the mean."""


@dataclass
class Course:
    """What `watch_hacking` remembers of the evaluations so far."""

    start: Tensor
    """[P, G], scores of the trained reward at the first evaluation."""
    best: dict[str, Tensor]
    """[P, G] each, scores of what is watched at its best evaluation."""
    suspects: list[str] = field(default_factory=list)
    """What lay below its best at the last evaluation, while the trained reward had risen."""


def watch_hacking(
    course: Course | None, trained: Verdicts, watched: Mapping[str, Verdicts]
) -> tuple[Course, list[str]]:
    """Whether the trained reward goes up while something that is only watched goes down.

    A watched score is a suspect at an evaluation where the trained reward lies more than two
    standard errors above its start and that score lies below its best so far by the larger of 0.02
    and two standard errors. It is named if it is a suspect at two evaluations in a row. Differences
    are paired: each picture with the one of the same prompt and seed.

    Args:
        course: From the evaluation before; None at the first one.
        trained: Of the reward that is trained on.
        watched: By name. One that `course` does not know begins now.

    Returns:
        The course for the next evaluation, and the names, none of them if all is well.

    >>> evenly = torch.full((2,), 0.5)
    >>> course = None
    >>> for up, down in ((0.1, 0.5), (0.3, 0.4), (0.4, 0.4)):
    ...     trained = Verdicts(torch.full((2, 1), up), evenly)
    ...     watched = {"judge": Verdicts(torch.full((2, 1), down), evenly)}
    ...     course, alarms = watch_hacking(course, trained, watched)
    ...     print(alarms)
    []
    []
    ['judge']
    """
    if course is None:
        course = Course(trained.values, {})
    rise, error = paired_change(course.start, trained)
    best: dict[str, Tensor] = {}
    suspects = []
    for name, now in watched.items():
        before = course.best.get(name, now.values)
        change, own_error = paired_change(before, now)
        best[name] = now.values if change > 0 else before
        fell = -change >= max(LEAST_FALL, NUM_ERRORS * own_error)
        if rise > NUM_ERRORS * error and fell:
            suspects.append(name)
    named = [name for name in suspects if name in course.suspects]
    return Course(course.start, best, suspects), named


def paired_change(before: Tensor, now: Verdicts) -> tuple[float, float]:
    """The weighted mean over prompts of the change, and its standard error.

    A prompt's change d is the mean over its pictures that have a verdict both times; prompts
    without any are left out. With weights w that sum to 1 over the n prompts left, the mean is
    m = sum(w d) and the error sqrt(n / (n - 1) sum(w² (d - m)²)), which for equal weights is the
    sample deviation over sqrt(n). Prompts and not pictures are counted, since pictures of one
    prompt are alike.

    Args:
        before: [P, G], the same prompts and seeds at an earlier time.
        now: The scores of now.

    Returns:
        Mean and error; the error is infinite for fewer than two prompts.

    >>> now = Verdicts(torch.tensor([[0.75], [0.5]]), torch.tensor([0.5, 0.5]))
    >>> paired_change(torch.tensor([[0.25], [0.5]]), now)
    (0.25, 0.25)
    """
    if before.shape != now.values.shape:
        raise ValueError(
            f"expected scores of the same prompts and seeds, {list(before.shape)} as before, got "
            f"{list(now.values.shape)}; resume with the suites and images_per_prompt that the run "
            "began with"
        )
    changes = (now.values.double() - before.double()).nanmean(1)  # [P]
    kept = ~changes.isnan()
    changes, weights = changes[kept], now.weights.double()[kept]
    weights = weights / weights.sum()
    mean, number = (weights * changes).sum(), len(changes)
    if number < 2:
        return mean.item(), math.inf
    squares = (weights * (changes - mean)).square().sum()
    return mean.item(), (squares * number / (number - 1)).sqrt().item()


def mean_error(values: Tensor) -> float:
    """The standard error of the mean over all pictures with a verdict, where prompts are drawn.

    Prompts and not pictures are counted, since pictures of one prompt are alike. With s the sum and
    n the number of a prompt's verdicts, and m = sum(s) / sum(n) the mean over pictures, it is
    sqrt(P / (P - 1) sum((s - m n)²)) / sum(n), the linearised error of a ratio (Cochran 1977,
    Sampling Techniques, chapter 6). Where all prompts have as many verdicts, it is the sample
    deviation of their means over sqrt(P).

    Args:
        values: [P, G], NaN for no verdict; prompts without any do not count.

    Returns:
        The error in the unit of the values; NaN for fewer than two prompts.

    >>> round(mean_error(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])), 4)  # 0.5 / sqrt(3)
    0.2887
    """
    known = ~values.isnan()
    kept = known.any(1)
    sums, numbers = values.double().nansum(1)[kept], known.double().sum(1)[kept]
    number = len(numbers)
    if number < 2:
        return math.nan
    squares = (sums - numbers * sums.sum() / numbers.sum()).square().sum()
    return ((squares * number / (number - 1)).sqrt() / numbers.sum()).item()


# Variety ----------------------------------------------------------------------------------------


def diversity(images: Tensor, group_size: int) -> Tensor:
    """How far the pictures of a prompt lie apart: mean distance over the pairs of a group, [P].

    The distance of two pictures is the root of the mean squared difference over pixels and colour
    channels: 0 for equal pictures, 1 for a black and a white one. It needs no network and so has
    the same meaning in every run, and it is 0 just where a policy has come down to one picture per
    prompt; it does not tell whether pictures differ in what they show or only in where.

    Args:
        images: [P * G, 3, H, W] in [0, 1], the G pictures of a prompt adjacent.
        group_size: G, at least 2.

    >>> black, white = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    >>> diversity(torch.cat([black, white, white, white]), group_size=2)
    tensor([1., 0.])
    """
    pictures = _groups(images.float().flatten(1), group_size)  # [P, G, 3 * H * W]
    # The faster way by a product of matrices is inexact where pictures are almost equal.
    distances = torch.cdist(pictures, pictures, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = group_size * (group_size - 1)
    return distances.sum((1, 2)) / pairs / math.sqrt(pictures.shape[-1])


# Two rewards ------------------------------------------------------------------------------------


def rank_agreement(one: Tensor, other: Tensor, group_size: int) -> float:
    """How alike two rewards order the pictures of a prompt: Kendall's tau-b, mean over groups.

    tau-b (Kendall 1945, The treatment of ties in ranking problems) is the number of pairs that both
    order alike less those that they order differently, over the geometric mean of the numbers that
    each orders at all: 1 for the same order, -1 for the opposite one, about 0 for unrelated ones.
    Scores that differ by rounding are ties, as in `dead_groups`. Pictures without both verdicts are
    left out, and so are groups that either reward does not order at all; NaN if none is left.

    Args:
        one: [B], the G images of a prompt adjacent.
        other: [B].
        group_size: G, at least 2.

    >>> rank_agreement(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 9.0, 7.0]), group_size=3)
    0.3333333333333333
    """
    first, second = _order(one, group_size), _order(other, group_size)  # [P, G, G]
    known = ~(first.isnan() | second.isnan())
    first, second = (order.masked_fill(~known, 0.0) for order in (first, second))
    numbers = first.abs().sum((1, 2)) * second.abs().sum((1, 2))
    agreement = (first * second).sum((1, 2)) / numbers.sqrt()  # 0 / 0 where nothing is ordered
    return agreement.nanmean().item()


def _order(scores: Tensor, group_size: int) -> Tensor:
    """1 where image i of a group scores above image j, -1 below, 0 for a tie; [P, G, G]."""
    groups = _groups(scores.double(), group_size)
    one, other = groups.unsqueeze(2), groups.unsqueeze(1)
    difference = one - other
    tied = difference.abs() <= EQUAL_REWARDS * torch.maximum(one.abs(), other.abs())
    order = difference.sign().masked_fill(tied, 0.0)
    return order.masked_fill(difference.isnan(), torch.nan)


def best_of_uplift(judge: Tensor, chosen_by: Tensor, group_size: int) -> float:
    """What a judge gains when each group's best picture is chosen by a reward, mean over groups.

    The judge's score of the chosen picture less its mean over the group; of several best ones (up
    to rounding), the mean. Pictures without both verdicts are left out, groups without any are too;
    NaN if none is left.

    Args:
        judge: [B], the G images of a prompt adjacent.
        chosen_by: [B]; with the judge itself, this is the most that a choice can gain.
        group_size: G, at least 2.

    >>> judge = torch.tensor([0.0, 1.0, 0.5, 0.5])
    >>> best_of_uplift(judge, judge, group_size=2)
    0.25
    >>> best_of_uplift(judge, -judge, group_size=2)
    -0.25
    """
    scores, ranks = _groups(judge.double(), group_size), _groups(chosen_by.double(), group_size)
    missing = scores.isnan() | ranks.isnan()
    highest = ranks.masked_fill(missing, -torch.inf).amax(1, keepdim=True)
    chosen = torch.isclose(ranks, highest, rtol=EQUAL_REWARDS, atol=0.0) & ~missing
    gains = _mean_where(scores, chosen) - _mean_where(scores, ~missing)
    return gains.nanmean().item()


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean along the last axis of those that are chosen; NaN for none."""
    return values.masked_fill(~chosen, torch.nan).nanmean(-1)


def _groups(values: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or len(values) % group_size:
        raise ValueError(
            f"{len(values)} images do not split into groups of {group_size}; set the group size to "
            f"a divisor of {len(values)} that is at least 2"
        )
    return values.unflatten(0, (-1, group_size))
