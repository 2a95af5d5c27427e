"""PickScore: which of two pictures people would pick for a prompt.

The scorer is a CLIP ViT-H/14 that was tuned on people's choices (https://arxiv.org/abs/2305.01569).
It runs on transformers. What differs from the authors' code (https://github.com/yuvalkirstain/
PickScore/tree/f79607f): scores are not turned into probabilities among the pictures given, and the
features of a prompt are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.pixels import crop_centre, normalise, resize_shorter
from cotgen_pl.rewards.base import Kept, ModelReward

if TYPE_CHECKING:
    from transformers import CLIPModel

PUBLISHED = "yuvalkirstain/PickScore_v1"
PUBLISHED_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER_FILE = "tokenizer_config.json"


def prepare_pictures(
    images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """What transformers' CLIPImageProcessor does to pictures: shorter side, middle, normalised.

    Args:
        images: [B, 3, H, W] in [0, 1].
        size: Pixels along each side of the result.
        mean: Per colour channel, of the unit of the pictures.
        std: The same.

    Returns:
        [B, 3, size, size] float32.
    """
    return normalise(crop_centre(resize_shorter(images, size), size, floor=True), mean, std)


class PickScore(ModelReward):
    """exp(logit scale) * cosine of picture and prompt, 17 to 24 with the published weights.

    Only scores of one prompt are comparable. A division by 26 (flow_grpo) or by 100 (GCPO) is left
    to the ensemble's weights.

    Args:
        path: A folder or a hub repository, "owner/name", with a CLIPModel in transformers' format.
        tokenizer: The same, for its tokenizer; a local folder of weights that has one itself uses
            its own. The published weights come without one.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload.
    """

    def __init__(
        self,
        path: str = PUBLISHED,
        tokenizer: str = PUBLISHED_TOKENIZER,
        name: str = "pick_score",
        **residence: Any,
    ) -> None:
        super().__init__(name, **residence)
        self.path, self.tokenizer = path, tokenizer
        self._kept: Kept[Tensor] = Kept()  # text to [1, D]

    def read(self) -> nn.Module:
        """Read weights and tokenizer."""
        from transformers import CLIPConfig, CLIPModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        from cotgen_pl.checkpoints import expand_home, read_config, read_weights

        path = expand_home(self.path)
        config = read_config(path, CLIPConfig, example=PUBLISHED)
        model: CLIPModel = read_weights(path, CLIPModel, config=config, dtype=torch.float32)
        self._size: int = config.vision_config.image_size
        self._text_length: int = config.text_config.max_position_embeddings
        self._scale = model.logit_scale.exp().item()  # now: in bfloat16 it would be 1 % off
        self._mean, self._std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        has_own = (Path(path) / TOKENIZER_FILE).is_file()
        self._tokenize = read_tokenizer(path if has_own else expand_home(self.tokenizer))
        return model

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scaled cosines of the pictures' features and the prompts'."""
        model = cast("CLIPModel", self.network)
        pixels = prepare_pictures(images, self._size, self._mean, self._std)
        seen = model.vision_model(pixel_values=pixels.to(self.torch_dtype)).pooler_output
        pictures = F.normalize(model.visual_projection(seen).float(), dim=-1)  # [B, D]
        texts = torch.cat(
            [
                self._kept.get_or_compute(prompt.text, self._encode_text).to(images.device)
                for prompt in prompts
            ]
        )
        return Scores.single(self.name, self._scale * (pictures * texts).sum(dim=-1))

    def _encode_text(self, text: str) -> Tensor:
        """[1, D] float32 of unit length. One by one, so that no text depends on its neighbours."""
        model = cast("CLIPModel", self.network)
        tokens = self._tokenize(
            [text],
            padding="max_length",
            truncation=True,
            max_length=self._text_length,
            return_tensors="pt",
        ).to(model.device)
        read = model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return F.normalize(model.text_projection(read.pooler_output).float(), dim=-1)


def read_tokenizer(path: str) -> Any:
    """A checkpoint's tokenizer, from a folder or a hub repository."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=Path(path).is_dir(), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"PickScore tokenizer: expected one in transformers' format at {path}, got none "
            f"({type(error).__name__}); put its files beside the weights, or set tokenizer to a "
            f"folder that holds them; the published one is that of {PUBLISHED_TOKENIZER}"
        ) from error
