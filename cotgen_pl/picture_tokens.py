"""Pictures as a Janus's VQ model makes them of tokens, and reads them as tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIXELS_PER_DECODE = 4_000_000  # about 27 pictures of 384 px at a time: bounds the decoder's memory


def decode_tokens(vq: Any, tokens: Tensor) -> Tensor:
    """Draw tokens [B, T] as pictures [B, 3, H, W], float32 in [0, 1]; never under autocast."""
    halvings = len(vq.config.channel_multiplier) - 1
    side = vq.config.num_patches * 2**halvings
    with torch.autocast(tokens.device.type, enabled=False):
        parts = [vq.decode(part) for part in tokens.split(max(1, PIXELS_PER_DECODE // side**2))]
    return ((torch.cat(parts).float() + 1) / 2).clamp(0, 1)


def encode_pictures(vq: Any, images: Tensor) -> Tensor:
    """Read pictures [B, 3, H, W] in [0, 1] as tokens [B, T]; never under autocast."""
    pixels = (images * 2 - 1).to(vq.quant_conv.weight.dtype)
    with torch.autocast(images.device.type, enabled=False):
        tokens: Tensor = vq.encode(pixels).image_tokens
    return tokens.view(len(images), vq.config.num_patches**2)
