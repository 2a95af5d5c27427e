"""HPSv2 and HPSv2.1: how well a picture fits its prompt and how much people like it.

The scorer is a CLIP ViT-H/14 that was tuned on people's choices (https://arxiv.org/abs/2306.09341).
It runs on upstream open_clip. What differs from the authors' package, hpsv2 1.2.0
(https://github.com/tgxs002/HPSv2):

* scores are float32 outside autocast; half precision has steps of 0.00024 near 0.28, hence ties;
* pictures are scored in batches, and the features of a prompt are kept;
* pictures are scored as the floats they are, not after rounding to 8 bits;
* an oblong picture whose longer side already fits is padded as well;
* the ViT-H/14 of LAION is not downloaded first, only to be overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.pixels import normalise
from cotgen_pl.rewards.base import Kept, ModelReward
from cotgen_pl.rewards.open_clip_models import OPEN_CLIP_FILE, OpenClip, read_open_clip
from cotgen_pl.weights import download_weights, find_weights

ORIGINAL_FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


def fit_pictures(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale pictures until the longer side is `size`, pad them to a square and normalise them.

    Resizing is bicubic with antialias, without clamping, as torchvision (0.17 and later) does it on
    a float tensor; the aspect ratio is kept and nothing is cut off. Padding is black, centred and
    added before normalising, so its pixels become (0 - mean) / std. Pictures whose longer side fits
    are not resampled. Source: `ResizeMaxSize` in hpsv2/src/open_clip/transform.py of
    https://github.com/tgxs002/HPSv2/tree/866735e.

    Args:
        images: [B, 3, H, W] in [0, 1].
        size: Pixels along each side of the result.
        mean: Per colour channel, of the unit of the pictures.
        std: The same.

    Returns:
        [B, 3, size, size] float32.
    """
    images = images.float()
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    fitted = (round(height * scale), round(width * scale))
    if fitted != (height, width):
        images = F.interpolate(images, fitted, mode="bicubic", antialias=True)
    rows, columns = size - fitted[0], size - fitted[1]
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    images = F.pad(images, padding)  # [B, 3, size, size]
    return normalise(images, mean, std)


class HPSReward(ModelReward):
    """Human preference score: the cosine of picture and prompt, 0.2 to 0.35 with published weights.

    Scores of v2 and v2.1 are not comparable, nor are those of different prompts. Architecture and
    normalisation come from an `open_clip_config.json` beside the weights (its `resize_mode` is not
    used), else they are those of ViT-H-14.

    Args:
        path: A weights file (.pt or .safetensors), a folder that holds one, or a hub repository,
            "owner/name".
        version: Which of the original's two files to take from a repository or a folder; a file
            speaks for itself.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload.
    """

    def __init__(
        self,
        path: str = "xswu/HPSv2",
        version: Literal["v2", "v2.1"] = "v2.1",
        name: str = "hps",
        **residence: Any,
    ) -> None:
        super().__init__(name, **residence)
        if version not in ORIGINAL_FILES:
            raise ValueError(
                f"HPS version: expected one of {list(ORIGINAL_FILES)}, got {version!r}; set one"
            )
        self.path, self.version = path, version
        self._kept: Kept[Tensor] = Kept()  # text to [1, D]
        find_weights(path, self._files, "HPS")

    @property
    def _files(self) -> tuple[str, str]:
        return ORIGINAL_FILES[self.version], OPEN_CLIP_FILE

    def read(self) -> nn.Module:
        """Read weights, architecture and tokenizer."""
        file = find_weights(self.path, self._files, "HPS")
        file = file or download_weights(self.path, ORIGINAL_FILES[self.version], "HPS")
        self._clip: OpenClip = read_open_clip(file, "ViT-H-14")
        return self._clip.model

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Cosines of the pictures' features and the prompts'."""
        clip = self._clip
        texts = clip.text_features([prompt.text for prompt in prompts], self._kept)
        pixels = fit_pictures(images, clip.picture_size, clip.mean, clip.std)
        return Scores.single(self.name, (clip.picture_features(pixels) * texts).sum(dim=-1))
