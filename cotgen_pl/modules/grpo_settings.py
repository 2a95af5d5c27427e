"""What GRPO refuses of its settings, before any weights load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cotgen_pl.losses import AdvantageScale, RewardCombination, combined_advantages, grpo_loss


def check_losses(
    loss: Mapping[str, Any], scale: AdvantageScale, combination: RewardCombination
) -> None:
    """Let loss and advantages themselves refuse what they cannot do."""
    one = torch.zeros(1, 1)
    grpo_loss(one, one, one, one[0], entropy=one, **loss)
    combined_advantages({"reward": torch.zeros(2)}, {"reward": 1.0}, 2, scale, combination)


def check_sizes(budget: int, per_update: int, group_size: int, at_once: int | None) -> None:
    """Raise a ValueError unless rollouts are whole groups, drawn in whole groups."""
    if group_size < 2:
        raise ValueError(
            f"expected group_size of 2 or more, got {group_size}; one image has no group to beat"
        )
    if per_update % group_size:
        raise ValueError(
            f"images_per_update {per_update} does not split into groups of {group_size}; "
            f"set group_size to a divisor of {per_update}"
        )
    if budget < per_update:
        raise ValueError(
            f"expected images_budget of at least images_per_update ({per_update}), got {budget}; "
            "raise the budget"
        )
    if at_once is not None and (at_once < 1 or at_once % group_size):
        raise ValueError(
            f"expected drawn_at_once to be whole groups of {group_size}, got {at_once}; set it to "
            f"a multiple of {group_size}"
        )


def check_overlap(scores_while_drawing: bool, at_once: int | None) -> None:
    """Raise a ValueError where a rollout is drawn as one part, so that nothing overlaps."""
    if scores_while_drawing and at_once is None:
        raise ValueError(
            "expected drawn_at_once beside scores_while_drawing: true, got none; set it to the "
            "images that are drawn, and then scored, together"
        )


def check_weights(kl_penalty: float, gradient_clip: float | None) -> None:
    """Raise a ValueError for a weight or a limit below 0."""
    if not kl_penalty >= 0:
        raise ValueError(f"expected kl_penalty of 0 or more, got {kl_penalty}; 0 is none")
    if gradient_clip is not None and not gradient_clip > 0:
        raise ValueError(f"expected gradient_clip above 0, got {gradient_clip}; null is none")
