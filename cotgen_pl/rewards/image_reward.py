"""ImageReward: how well a picture fits its prompt and how much people like it.

The scorer is a BLIP that was tuned on people's rankings (https://arxiv.org/abs/2304.05977). It runs
on transformers' BLIP. What differs from the authors' package, image-reward 1.5
(https://github.com/THUDM/ImageReward/tree/c1392c6, ImageReward/ImageReward.py):

* pictures are scored in batches, and the tokens of a prompt are kept;
* transparency is dropped before resizing, not after;
* pictures are resized as tensors, to within one step of 256 of Pillow's result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.pixels import crop_centre, normalise, resize_shorter
from cotgen_pl.rewards.base import Kept, ModelReward
from cotgen_pl.rewards.perception import find_converted, read_bert_tokenizer
from cotgen_pl.weights import load_strictly, read_tensors

TEXT_LENGTH = 35  # tokens; a prompt of more than 33 word pieces is cut
# Of the raw scores, so that rewards have mean 0 and deviation 1 on the authors' data.
MEAN, STD = 0.16717362830052426, 1.0333394966054072


class ImageRewardNetwork(nn.Module):
    """A vision tower, a text tower that looks at its output, and a linear head of several layers.

    Args:
        config: As the converter writes it: `vision_config`, `text_config`, `head_widths`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision_model = BlipVisionModel(BlipVisionConfig(**config["vision_config"]))
        text_config = BlipTextConfig(**config["text_config"])
        self.text_encoder = BlipTextModel(text_config, add_pooling_layer=False)
        # Without activations; the original's dropouts do nothing outside training.
        self.head = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(config["head_widths"])))

    def forward(self, pixels: Tensor, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scores, [B] float32.

        Args:
            pixels: [B, 3, S, S], normalised.
            token_ids: [B, L] int64; the first is [CLS].
            attention_mask: [B, L] int64, 0 where a text is padded.
        """
        seen = self.vision_model(pixel_values=pixels).last_hidden_state  # [B, N, D]
        # Its forward is bidirectional although its config says decoder, as it must be here.
        read = self.text_encoder(
            input_ids=token_ids, attention_mask=attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        scores: Tensor = self.head(read[:, 0]).squeeze(-1).float()
        return scores


class ImageReward(ModelReward):
    """Standardised preference score, mostly -2 to 2 with the published weights.

    Args:
        path: The folder that `tools/convert.py image_reward` wrote.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload.
    """

    def __init__(self, path: str, name: str = "image_reward", **residence: Any) -> None:
        super().__init__(name, **residence)
        self.folder = find_converted(path, "image_reward", "image_reward")
        self._kept: Kept[Tensor] = Kept()  # text to [2, TEXT_LENGTH]: token ids, attention mask

    def read(self) -> nn.Module:
        """Read weights, architecture and tokenizer."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        self._picture_size: int = config["vision_config"]["image_size"]
        self._tokenizer = read_bert_tokenizer(self.folder, config["text_config"]["vocab_size"])
        return _read_network(config, self.folder / "model.safetensors")

    def prepare_pictures(self, images: Tensor) -> Tensor:
        """The middle square of pictures [B, 3, H, W] whose shorter side fits, normalised."""
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        size = self._picture_size
        cropped = crop_centre(resize_shorter(images, size), size)
        return normalise(cropped, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """(raw score - mean) / deviation, for the raw prompts."""
        tokens = [self._kept.get_or_compute(prompt.text, self._tokenize) for prompt in prompts]
        token_ids, mask = torch.stack(tokens, dim=1).to(images.device)  # [B, TEXT_LENGTH] each
        raw = self.network(self.prepare_pictures(images), token_ids, mask)
        return Scores.single(self.name, (raw - MEAN) / STD)

    def _tokenize(self, text: str) -> Tensor:
        tokens = self._tokenizer(
            text, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        return torch.cat([tokens["input_ids"], tokens["attention_mask"]])


def _read_network(config: dict[str, Any], file: Path) -> ImageRewardNetwork:
    network = ImageRewardNetwork(config)
    refusal = (
        f"{file}: expected the weights that its config.json describes, got {{misfits}}; "
        "convert the checkpoint again"
    )
    load_strictly(network, read_tensors(file), refusal)
    return network
