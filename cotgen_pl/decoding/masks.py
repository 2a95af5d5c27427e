"""Which positions of left-padded rows see which others, and where each of them stands."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def read_from_the_start(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a pass over whole rows: what each position sees, [R, 1, L, L] bool, and its place, [R, L].

    Args:
        mask: False on left padding, [R, L] bool.
    """
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    # A padded position may see itself: a row that sees nothing would be NaN.
    seen = causal & mask[:, None, :] | torch.eye(length, dtype=torch.bool, device=mask.device)
    return seen[:, None], (mask.long().cumsum(-1) - 1).clamp(min=0)


def read_behind(prefix: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of a pass over what follows rows that are kept: [R, 1, length, L + length], [R, length].

    Args:
        prefix: False on left padding of what is kept, [R, L] bool.
        length: Positions that follow.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=prefix.device).tril()
    whole = nn.functional.pad(causal, (prefix.shape[1], 0), value=True)
    seen = whole & nn.functional.pad(prefix, (0, length), value=True)[:, None, :]
    places = prefix.long().sum(-1, keepdim=True) + torch.arange(length, device=prefix.device)
    return seen[:, None], places
