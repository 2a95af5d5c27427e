"""Advantages: how much better each image's reward is than those of its group."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cotgen_pl.interfaces import check_choice
from cotgen_pl.losses.inputs import at_least_float32

AdvantageScale = Literal["group", "batch", "none"]
RewardCombination = Literal["sum_then_normalise", "normalise_then_sum"]

STD_EPSILON = 1e-4  # TRL's, added to a std before dividing; shrinks a group of std 0.01 by 1 %
EQUAL_REWARDS = 1e-6  # relative spread that is float32 rounding (eight steps) and no preference


def group_advantages(rewards: Tensor, group_size: int, scale: AdvantageScale = "group") -> Tensor:
    """How much better each image is than its group: (r - mean of the group) / (std + 1e-4), as TRL.

    The std is the sample one (G - 1). Missing verdicts (NaN) are left out of mean and std.
    Deviation from TRL: rewards that differ by rounding only give exactly 0.

    Args:
        rewards: [B], the G images of a prompt adjacent.
        group_size: G, at least 2.
        scale: Whose std divides: the group's (2402.03300, section 4.1.2), the whole batch's (on one
            process, or of rewards gathered from all), or none (2503.20783).

    Returns:
        [B] float32 or float64; 0 for missing verdicts and in `dead_groups`.

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, float("nan")]), group_size=4, scale="none")
    tensor([-2.,  0.,  2.,  0.])
    """
    check_choice("scale", scale, AdvantageScale)
    groups = _split_groups(rewards, group_size)
    mean, std = _mean_and_std(groups)
    if scale == "batch":
        std = _mean_and_std(groups.flatten())[1]
    advantages = groups - mean if scale == "none" else (groups - mean) / (std + STD_EPSILON)
    silent = groups.isnan() | dead_groups(rewards, group_size).unsqueeze(1)
    return advantages.masked_fill(silent, 0.0).flatten()


def combined_advantages(
    parts: dict[str, Tensor],
    weights: dict[str, float],
    group_size: int,
    scale: AdvantageScale = "group",
    combine: RewardCombination = "sum_then_normalise",
) -> Tensor:
    """Advantages [B] from several rewards.

    `sum_then_normalise`: `group_advantages` of the weighted sum. `normalise_then_sum`: GDPO
    (2601.05242), the weighted sum of each part's advantages by its group's std, divided by the std
    of that sum in the batch (its mean is 0 in every group); blind to each reward's unit. An image
    that misses one weighted part is missing (in TRL, that part counts as 0).

    Args:
        parts: [B] each; those of weight 0 or without a weight are ignored.
        weights: Weight of each part in the sum.
        group_size: G, at least 2.
        scale: As in `group_advantages`; `normalise_then_sum` has its own and takes "group" only.
        combine: What comes first.

    >>> parts = {"style": torch.tensor([0.0, 100.0]), "count": torch.tensor([2.0, 1.0])}
    >>> combined_advantages(parts, {"style": 0.01, "count": 2.0}, group_size=2, scale="none")
    tensor([ 0.5000, -0.5000])
    """
    check_choice("combine", combine, RewardCombination)
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used or used.keys() - parts.keys():
        raise ValueError(f"expected weights of some of the parts {sorted(parts)}, got {weights}")
    scores = at_least_float32(torch.stack([parts[name] for name in used]))  # [K, B]
    factors = scores.new_tensor(list(used.values())).unsqueeze(1)
    if combine == "sum_then_normalise":
        return group_advantages((factors * scores).sum(dim=0), group_size, scale)
    if scale != "group":
        raise ValueError(f"normalise_then_sum expects scale 'group', got {scale!r}; leave it out")
    missing = scores.isnan().any(dim=0)
    scores = scores.masked_fill(missing, torch.nan)
    normalised = torch.stack([group_advantages(part, group_size) for part in scores])
    total = (factors * normalised).sum(dim=0).masked_fill(missing, torch.nan)
    return group_advantages(total, group_size, "batch")


def dead_groups(totals: Tensor, group_size: int) -> Tensor:
    """Groups [P] bool without signal: all totals [B] equal, or fewer than two that are not NaN.

    >>> dead_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, float("nan"), 1.0]), group_size=2)
    tensor([ True, False,  True])
    """
    groups = _split_groups(totals, group_size)
    missing = groups.isnan()
    highest = groups.masked_fill(missing, -torch.inf).amax(dim=1)
    lowest = groups.masked_fill(missing, torch.inf).amin(dim=1)
    equal = torch.isclose(highest, lowest, rtol=EQUAL_REWARDS, atol=0.0)
    return equal | ((~missing).sum(dim=1) < 2)


def signal_weights(advantages: Tensor, group_size: int) -> Tensor:
    """1 for the images of groups in which any advantage differs from 0, else 0; [B] from [B].

    >>> signal_weights(torch.tensor([0.7, -0.7, 0.0, 0.0]), group_size=2)
    tensor([1., 1., 0., 0.])
    """
    alive = (_split_groups(advantages, group_size) != 0).any(dim=1)
    return alive.repeat_interleave(group_size).to(advantages.dtype)


def _split_groups(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards of shape {list(rewards.shape)} do not split into groups of {group_size}; set "
            f"group_size to a divisor of {rewards.numel()} that is at least 2"
        )
    return at_least_float32(rewards).reshape(-1, group_size)


def _mean_and_std(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample deviation of the verdicts along the last axis, which is kept."""
    count = (~rewards.isnan()).sum(dim=-1, keepdim=True)
    mean = rewards.nansum(dim=-1, keepdim=True) / count.clamp(min=1)
    squares = (rewards - mean).square().nansum(dim=-1, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()
