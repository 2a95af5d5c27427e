"""CLIPScore: how well a picture fits its prompt, in the eyes of OpenAI's CLIP.

Raw cosines, as in T2I-CompBench (https://github.com/Karine-Huang/T2I-CompBench/tree/1b70949,
CLIPScore_eval): without the factor 2.5 and the clamp of https://arxiv.org/abs/2104.08718, without
torchmetrics' factor 100. What differs from the reference: float32 on a GPU too, where OpenAI's
package computes in half precision (the 4th decimal differs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.rewards.base import Kept, ModelReward
from cotgen_pl.rewards.open_clip_models import (
    OPEN_CLIP_FILES,
    OpenClip,
    find_open_clip,
    read_open_clip,
)
from cotgen_pl.weights import find_weights


class CLIPScore(ModelReward):
    """The cosine of picture and prompt under OpenAI's ViT-B/32, about 0.2 to 0.35.

    Args:
        path: OpenAI's weights in open_clip's format: a file, a folder that holds one, or a hub
            repository, "owner/name". Without an `open_clip_config.json` beside them they must be
            those of ViT-B/32.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload.
    """

    def __init__(
        self,
        path: str = "timm/vit_base_patch32_clip_224.openai",
        name: str = "clip_score",
        **residence: Any,
    ) -> None:
        super().__init__(name, **residence)
        self.path = path
        self._kept: Kept[Tensor] = Kept()  # text to [1, D]
        find_weights(path, OPEN_CLIP_FILES, "CLIPScore")

    def read(self) -> nn.Module:
        """Read weights, architecture and tokenizer."""
        file = find_open_clip(self.path, "CLIPScore")
        self._clip: OpenClip = read_open_clip(file, "ViT-B-32-quickgelu", quick_gelu=True)
        return self._clip.model

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Cosines of the pictures' features and the prompts'."""
        texts = self._clip.text_features([prompt.text for prompt in prompts], self._kept)
        pictures = self._clip.picture_features(self._clip.crop_pictures(images))  # [B, D]
        return Scores.single(self.name, (pictures * texts).sum(dim=-1))
