"""Object detectors of transformers', with the published pre- and post-processing of their users.

Apart from the rewards because several of them look for objects in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotgen_pl.pixels import STEPS, normalise, round_to_bytes
from cotgen_pl.rewards.sanity import check_answers, two_pictures
from cotgen_pl.rules.geneval import Found

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation

SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels that a picture is scaled to fit into
PAD_TO = 32  # sides are padded to multiples of it
PAD_VALUE = 128 / STEPS
MEAN = tuple(value / STEPS for value in (123.675, 116.28, 103.53))
STD = tuple(value / STEPS for value in (58.395, 57.12, 57.375))
MOST_INSTANCES = 100  # (query, class) pairs that are kept


@dataclass
class Instance(Found):
    """An object that a detector found, with the pixels that it covers."""

    mask: Tensor
    """[H, W] bool, on the picture."""


@dataclass(frozen=True)
class Fitted:
    """Sizes of a picture on its way through the detector, as (height, width)."""

    original: tuple[int, int]
    scaled: tuple[int, int]
    padded: tuple[int, int]


def plan_size(height: int, width: int) -> Fitted:
    """How mmdet scales and pads a picture: into 800 x 1333, keeping its shape, to multiples of 32.

    >>> plan_size(384, 384).padded
    (800, 800)
    >>> plan_size(480, 640)
    Fitted(original=(480, 640), scaled=(800, 1067), padded=(800, 1088))
    """
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    scaled = int(height * scale + 0.5), int(width * scale + 0.5)
    padded = tuple(-(-side // PAD_TO) * PAD_TO for side in scaled)
    return Fitted((height, width), scaled, (padded[0], padded[1]))


def fit_pictures(images: Tensor, sizes: Fitted) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] as the detector reads them, [B, 3, padded height and width].

    Bilinear without antialias, as cv2 resizes 8-bit pictures, to within one step of 256; padding of
    value 128 on the right and below, before normalising.
    """
    images = round_to_bytes(images)
    images = round_to_bytes(F.interpolate(images, sizes.scaled, mode="bilinear"))
    rows, columns = (a - b for a, b in zip(sizes.padded, sizes.scaled, strict=True))
    return normalise(F.pad(images, (0, columns, 0, rows), value=PAD_VALUE), MEAN, STD)


def find_instances(
    class_logits: Tensor, mask_logits: Tensor, sizes: Fitted, names: Sequence[str], least: float
) -> list[Instance]:
    """The objects of one picture, surest first, as mmdet reads them off the network.

    The 100 likeliest pairs of query and class are kept; a pair's score is the class's probability
    times the mean probability of the pixels inside its mask (github.com/open-mmlab/mmdetection
    2.28.2, mmdet/models/seg_heads/panoptic_fusion_heads/maskformer_fusion_head.py,
    `instance_postprocess`).

    Args:
        class_logits: [Q, C + 1]; the last class is "nothing".
        mask_logits: [Q, h, w], of the padded picture.
        sizes: Of the picture.
        names: C labels.
        least: Score above which an object is told.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1].flatten()  # [Q * C]
    top = probabilities.topk(min(MOST_INSTANCES, len(probabilities)))
    # A score is at most the class's probability, so that others need no mask.
    chosen = [
        i for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True) if p > least
    ]
    found = []
    for index in chosen:
        query, label = divmod(index, len(names))
        logits = _original_size(mask_logits[query].float(), sizes)  # [H, W]
        mask = logits > 0
        inside = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        score = (probabilities[index] * inside).item()
        if score > least:
            found.append(Instance(names[label], score, tight_box(mask), mask))
    return sorted(found, key=lambda item: -item.score)


def _original_size(logits: Tensor, sizes: Fitted) -> Tensor:
    padded = F.interpolate(logits[None, None], sizes.padded, mode="bilinear")
    cut = padded[..., : sizes.scaled[0], : sizes.scaled[1]]
    return F.interpolate(cut, sizes.original, mode="bilinear")[0, 0]


def tight_box(mask: Tensor) -> tuple[float, float, float, float]:
    """The smallest box around a mask [H, W], its last pixels within; all 0 for an empty one."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] + 1),
        float(rows[-1] + 1),
    )


class InstanceDetector(nn.Module):
    """Mask2Former with an instance head (https://arxiv.org/abs/2112.01527), as GenEval runs it.

    Args:
        model: Of transformers, converted from mmdet's weights.
        names: The label of each class, in the order of the network's.
    """

    def __init__(self, model: Mask2FormerForUniversalSegmentation, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)
        number = model.config.num_labels
        if number != len(self.names):
            raise ValueError(
                f"expected a detector of {len(self.names)} classes, one for each name, got one of "
                f"{number}; convert mmdet's weights for COCO's 80 classes"
            )

    @classmethod
    def read(cls, folder: Path, names: Sequence[str]) -> InstanceDetector:
        """Read a converted folder, in float32."""
        from transformers import Mask2FormerForUniversalSegmentation

        from cotgen_pl.checkpoints import read_weights

        model = read_weights(str(folder), Mask2FormerForUniversalSegmentation, dtype=torch.float32)
        return cls(model, names)

    @torch.no_grad()
    def check(self) -> None:
        """Raise a ValueError unless the network tells two pictures apart by finite numbers."""
        output: Any = self.model(pixel_values=fit_pictures(two_pictures(), plan_size(64, 64)))
        check_answers(output.class_queries_logits, output.masks_queries_logits)

    def forward(self, images: Tensor, least: float) -> list[list[Instance] | None]:
        """The objects in each picture [B, 3, H, W] in [0, 1] with a score above `least`.

        None for a picture of which the network gave no numbers.
        """
        height, width = images.shape[-2:]
        sizes = plan_size(height, width)
        pixels = fit_pictures(images, sizes).to(self.model.dtype)
        output: Any = self.model(pixel_values=pixels)
        pairs = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        return [
            None
            if classes.isnan().any() or masks.isnan().any()
            else find_instances(classes, masks, sizes, self.names, least)
            for classes, masks in pairs
        ]
