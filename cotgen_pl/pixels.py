"""Pictures on their way into a scorer: channels, 8-bit rounding, resizing, cropping, normalising.

Pictures are tensors [B, C, H, W] in [0, 1]. Scorers were trained on 8-bit files that Pillow had
resized; `resize` repeats that on tensors of any device, to within one step of 1/255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

STEPS = 255  # of an 8-bit channel


def as_rgb(images: Tensor) -> Tensor:
    """Grey pictures [B, 1, H, W] with three equal channels; RGBA [B, 4, H, W] without its last one.

    As Pillow's `convert("RGB")`, which does not blend with a background.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"expected pictures [B, 1, 3 or 4, H, W], got {list(images.shape)}; give grey, RGB or "
            "RGBA pictures"
        )
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def round_to_bytes(images: Tensor) -> Tensor:
    """The pictures as an 8-bit file would hold them, in [0, 1]; halves go up, as in Pillow."""
    return (images.float() * STEPS + 0.5).floor().clamp(0, STEPS) / STEPS


def resize(
    images: Tensor, height: int, width: int, mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """Resize as Pillow does on 8-bit pictures: antialiased, first the rows and then the columns.

    Between the two Pillow rounds and clamps to 8 bits; without that, bicubic's overshoot at sharp
    edges would differ by up to 29 steps of 1/255. Source: `ImagingResampleInner` in
    src/libImaging/Resample.c of https://github.com/python-pillow/Pillow.
    """
    images = round_to_bytes(images)
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            images = round_to_bytes(F.interpolate(images, size, mode=mode, antialias=True))
    return images


def resize_shorter(images: Tensor, size: int) -> Tensor:
    """Bicubic, until the shorter side is `size`; the longer one is cut to whole pixels."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    return resize(images, int(size * height / shorter), int(size * width / shorter))


def crop_centre(images: Tensor, size: int, *, floor: bool = False) -> Tensor:
    """The square in the middle of pictures that are at least as large.

    Args:
        images: [B, C, H, W].
        size: Pixels along each side.
        floor: Where the middle is half a pixel off, go up and left, as transformers' processors do;
            torchvision's CenterCrop goes to the even one.
    """
    rows, columns = images.shape[-2] - size, images.shape[-1] - size
    top, left = (rows // 2, columns // 2) if floor else (round(rows / 2), round(columns / 2))
    return images[..., top : top + size, left : left + size]


def pad_to_square(images: Tensor, colour: float) -> Tensor:
    """Centred on a square of one grey level in [0, 1]; odd remainders go right and below."""
    height, width = images.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padding = (left, side - width - left, top, side - height - top)
    return F.pad(images, padding, value=colour)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per colour channel."""
    return (images - images.new_tensor(mean).view(-1, 1, 1)) / images.new_tensor(std).view(-1, 1, 1)


def to_pillow(images: Tensor) -> list[Image.Image]:
    """RGB pictures [B, 3, H, W] in [0, 1] as B Pillow images, for processors that want such."""
    numbers = (round_to_bytes(images) * STEPS).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in numbers]
