"""Checks and casts of tensors that the losses share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(name: str, values: Tensor, shape: Sequence[int]) -> None:
    """Refuse what would broadcast without a word."""
    if values.shape != torch.Size(shape):
        raise ValueError(f"expected {name} of shape {list(shape)}, got {list(values.shape)}")


def at_least_float32(values: Tensor) -> Tensor:
    """The same numbers, in float32 if they were shorter."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
