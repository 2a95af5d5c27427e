"""The aesthetic score of LAION's improved predictor: how good a picture looks, whatever it shows.

A linear probe on the picture features of OpenAI's CLIP ViT-L/14
(https://github.com/christophschuhmann/improved-aesthetic-predictor). It does not see the prompt: a
policy that is trained on it alone forgets what was asked for, so give it a partner.

What differs from the original:

* CLIP runs in float32 on a GPU too, where OpenAI's package computes in half precision;
* the head's layers, which have no activations between them, are multiplied out in float64 once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.rewards.base import ModelReward
from cotgen_pl.rewards.open_clip_models import (
    OPEN_CLIP_FILES,
    OpenClip,
    find_open_clip,
    read_open_clip,
)
from cotgen_pl.weights import find_weights, load_strictly, read_tensors

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"


def build_head(num_features: int) -> nn.ModuleDict:
    """The published head, features [B, D] to scores [B, 1], with its own names and random weights.

    Source: class MLP in simple_inference.py of the original.
    """
    layers = nn.Sequential(
        nn.Linear(num_features, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    return nn.ModuleDict({"layers": layers})


@torch.no_grad()
def read_head(file: Path, num_features: int) -> tuple[Tensor, Tensor]:
    """The head's file as one linear map: weight [D] and bias [], float32, on the CPU."""
    head = build_head(num_features)
    refusal = (
        f"{file}: expected the weights of an aesthetic head on {num_features} features, got "
        f"{{misfits}}; name {HEAD_FILE} for ViT-L/14"
    )
    load_strictly(head, read_tensors(file), refusal)
    layers = head.double().eval()["layers"]
    bias = layers(torch.zeros(1, num_features, dtype=torch.float64))
    weight = layers(torch.eye(num_features, dtype=torch.float64)) - bias
    return weight.flatten().float(), bias.squeeze().float()


class AestheticScore(ModelReward):
    """How good a picture looks, about 1 to 10; prompts are not read.

    Args:
        head: The linear probe: the original's .pth file, or a folder that holds it.
        path: OpenAI's ViT-L/14 in open_clip's format: a file, a folder that holds one, or a hub
            repository, "owner/name". An `open_clip_config.json` beside it gives the sizes.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload.
    """

    def __init__(
        self,
        head: str,
        path: str = "timm/vit_large_patch14_clip_224.openai",
        name: str = "aesthetic",
        **residence: Any,
    ) -> None:
        super().__init__(name, **residence)
        self.path = path
        self.head_file = find_head(head)
        find_weights(path, OPEN_CLIP_FILES, "aesthetic CLIP")

    def read(self) -> nn.Module:
        """Read CLIP and the head."""
        file = find_open_clip(self.path, "aesthetic CLIP")
        self._clip: OpenClip = read_open_clip(file, "ViT-L-14-quickgelu", quick_gelu=True)
        num_features = self._clip.model.visual.output_dim
        self._weight, self._bias = read_head(self.head_file, num_features)
        return self._clip.model

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """The head's verdict on the pictures' features."""
        features = self._clip.picture_features(self._clip.crop_pictures(images))  # [B, D]
        weight, bias = self._weight.to(images.device), self._bias.to(images.device)
        return Scores.single(self.name, features @ weight + bias)


def find_head(path: str) -> Path:
    """The head's local file; the hub has none of its own."""
    file = find_weights(path, (HEAD_FILE,), "aesthetic head")
    if file is None:
        raise ValueError(
            f"aesthetic head: expected the file {HEAD_FILE} or its folder, got {path}, which is "
            "neither; download it from the original's repository, "
            "https://github.com/christophschuhmann/improved-aesthetic-predictor"
        )
    return file
