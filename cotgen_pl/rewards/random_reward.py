"""A reward that knows nothing, the control of every comparison of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cotgen_pl.interfaces import Prompt, Reward, Scores


class RandomReward(Reward):
    """Even in [0, 1) over pictures, drawn from torch's random state, which checkpoints hold."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Draw a number for each picture, on the CPU."""
        return Scores.single("random", torch.rand(len(images)))
