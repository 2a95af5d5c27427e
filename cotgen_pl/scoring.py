"""Asking a reward: ready and frozen, in full precision, with the time that it took."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from cotgen_pl.interfaces import Prompt, Reward, Scores, freeze


@torch.no_grad()
def ask(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """A reward's verdict outside of autocast, with `seconds` until its last kernel.

    Args:
        reward: Loaded and moved to the pictures where that is still to be done.
        images: [B, 3, H, W] in [0, 1].
        prompts: B, each image's own.
    """
    freeze(reward.load()).to(images.device)
    started = time.perf_counter()
    with torch.autocast(images.device.type, enabled=False):
        scores: Scores = reward.score(images, prompts)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    if isinstance(scores, Scores) and not scores.seconds:  # an ensemble has told its members'
        scores.seconds = {reward.name: time.perf_counter() - started}
    return scores
