"""A detector that finds things by their names: OWLv2 of transformers'.

It stands in for UniDet (detectron2), whose labels are fixed. OWLv2 and not GroundingDINO, because
each noun is a question of its own, so that what is found of it depends on no other noun of the
prompt, and because all versions of transformers that this package takes compute it alike;
GroundingDINO's text features are wrong before 5.23. Scores and recall differ from UniDet's, so that
what rests on it has a name of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from cotgen_pl.pixels import normalise, round_to_bytes
from cotgen_pl.rewards.sanity import check_answers, two_pictures
from cotgen_pl.rules.geneval import Found

if TYPE_CHECKING:
    from transformers import Owlv2ForObjectDetection

ORIGINAL = "google/owlv2-base-patch16-ensemble"
QUESTION = "a photo of a {noun}"  # as in the model's documentation
DUPLICATE_OVERLAP = 0.5  # intersection over union above which two boxes of a noun are one thing

FoundByNoun = dict[str, list[Found]]


def scale_boxes(boxes: Tensor, original: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """OWLv2's boxes in the pixels of a resized picture, cut at its borders.

    OWLv2 sees a picture in the left upper corner of a square.

    >>> half = torch.tensor([[0.5, 0.25, 1.0, 0.5]])  # the upper half of a square
    >>> scale_boxes(half, (100, 200), (50, 100)).tolist()
    [[0.0, 0.0, 100.0, 50.0]]

    Args:
        boxes: [n, 4] centre x, centre y, width, height, as shares of the square.
        original: Height and width of the picture.
        size: Height and width of the resized one.

    Returns:
        [n, 4] left, top, right, bottom.
    """
    side = max(original)
    corners: Tensor = box_convert(boxes, "cxcywh", "xyxy") * side
    old = corners.new_tensor([original[1], original[0]] * 2)
    new = corners.new_tensor([size[1], size[0]] * 2)
    return (corners / old).clamp(0, 1) * new


def select_boxes(noun: str, scores: Tensor, boxes: Tensor, threshold: float) -> list[Found]:
    """What counts of a noun, surest first: above the threshold, one box per thing.

    Args:
        noun: Its name.
        scores: [n] in [0, 1].
        boxes: [n, 4] left, top, right, bottom.
        threshold: Score above which a box counts.
    """
    sure = scores > threshold
    scores, boxes = scores[sure], boxes[sure]
    kept = nms(boxes, scores, DUPLICATE_OVERLAP)  # by score, the highest first
    pairs = zip(scores[kept].tolist(), boxes[kept].tolist(), strict=True)
    return [Found(noun, score, (box[0], box[1], box[2], box[3])) for score, box in pairs]


class OpenVocabularyDetector(nn.Module):
    """OWLv2 (https://arxiv.org/abs/2306.09683).

    Args:
        model: Of transformers.
        tokenizer: Its own.
        settings: Its image processor, for mean and deviation.
    """

    def __init__(self, model: Owlv2ForObjectDetection, tokenizer: Any, settings: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer, self.settings = tokenizer, settings

    @classmethod
    def read(cls, path: str) -> OpenVocabularyDetector:
        """Read a folder or a hub id, in float32."""
        import transformers

        from cotgen_pl.checkpoints import expand_home, read_config, read_processor, read_weights

        path = expand_home(path)
        read_config(path, transformers.Owlv2Config, ORIGINAL)
        processor = read_processor(path, transformers.Owlv2Processor)
        model = read_weights(path, transformers.Owlv2ForObjectDetection, dtype=torch.float32)
        return cls(model, processor.tokenizer, processor.image_processor)

    @torch.no_grad()
    def check(self) -> None:
        """Raise a ValueError unless the network tells two pictures apart by finite numbers."""
        raw = self._answer(two_pictures(), [["person"], ["person"]])
        check_answers(raw.logits, raw.pred_boxes)

    def forward(
        self,
        images: Tensor,
        nouns: Sequence[Sequence[str]],
        size: tuple[int, int],
        threshold: float,
    ) -> list[FoundByNoun | None]:
        """What is found of each noun in its picture; None where the network gave no numbers.

        Args:
            images: [B, 3, H, W] in [0, 1].
            nouns: One or more for each picture.
            size: Height and width of the picture in whose pixels boxes are told.
            threshold: Score above which a box counts.
        """
        raw = self._answer(images, nouns)
        scores = raw.logits.float().sigmoid()  # [B, n, most nouns]
        boxes = raw.pred_boxes.float()  # [B, n, 4]
        original = (images.shape[-2], images.shape[-1])
        found: list[FoundByNoun | None] = []
        for asked, own_scores, own_boxes in zip(nouns, scores, boxes, strict=True):
            if own_scores.isnan().any() or own_boxes.isnan().any():
                found.append(None)
                continue
            scaled = scale_boxes(own_boxes, original, size)
            found.append(
                {
                    noun: select_boxes(noun, own_scores[:, place], scaled, threshold)
                    for place, noun in enumerate(asked)
                }
            )
        return found

    def _answer(self, images: Tensor, nouns: Sequence[Sequence[str]]) -> Any:
        """The network's own output."""
        pixels = self.fit_pictures(images).to(self.model.dtype)
        return self.model(pixel_values=pixels, **self._tokenize(nouns, images.device))

    def fit_pictures(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] as the network reads them, [B, 3, S, S].

        Black is added on the right or below to make a square, as transformers' processor does.
        It blurs before it shrinks; here the resize is antialiased.
        """
        vision: Any = self.model.config.vision_config
        height, width = images.shape[-2:]
        side, target = max(height, width), vision.image_size
        square = F.pad(round_to_bytes(images), (0, side - width, 0, side - height))
        fitted = F.interpolate(square, (target, target), mode="bilinear", antialias=side > target)
        return normalise(fitted, self.settings.image_mean, self.settings.image_std)

    def _tokenize(
        self, nouns: Sequence[Sequence[str]], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Tokens of each picture's questions, [B * most nouns, L]; the first one fills up."""
        text: Any = self.model.config.text_config
        most = max(map(len, nouns))
        asked = [noun for own in nouns for noun in [*own, *[own[0]] * (most - len(own))]]
        tokens = self.tokenizer(
            [QUESTION.format(noun=noun) for noun in asked],
            padding="max_length",
            truncation=True,
            max_length=text.max_position_embeddings,
            return_tensors="pt",
        )
        return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
