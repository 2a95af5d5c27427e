"""How near each pixel is: transformers' DPT-hybrid MiDaS, as T2I-CompBench's 3D score uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotgen_pl.pixels import normalise, resize, round_to_bytes
from cotgen_pl.rules.position import Box

if TYPE_CHECKING:
    from transformers import DPTForDepthEstimation

ORIGINAL = "Intel/dpt-hybrid-midas"
SIDE = 480  # pixels that a picture is squashed to; UniDet_eval/experts/depth of T2I-CompBench
MEAN = STD = (0.5, 0.5, 0.5)
# The first fusion layer has nothing to fuse with, so that the published file leaves this out.
UNUSED = "neck.fusion_stage.layers.0.residual_layer1."


def mean_depth(depth: Tensor, box: Box, *, swap_axes: bool = False) -> float:
    """The mean of a map [H, W] inside a box, of one pixel at least.

    >>> depth = torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # the lower row is near
    >>> mean_depth(depth, (0, 1, 2, 2)), mean_depth(depth, (0, 1, 2, 2), swap_axes=True)
    (1.0, 0.5)

    Args:
        depth: Larger is nearer.
        box: Left, top, right, bottom in its pixels.
        swap_axes: Take columns for rows, as T2I-CompBench's own code does.
    """
    spans = [_whole_span(box[k], box[k + 2], depth.shape[1 - k]) for k in (0, 1)]
    columns, rows = reversed(spans) if swap_axes else spans
    if swap_axes:  # the box may leave a picture that is no square
        rows = _whole_span(rows.start, rows.stop, depth.shape[0])
        columns = _whole_span(columns.start, columns.stop, depth.shape[1])
    return depth[rows, columns].mean().item()


def _whole_span(start: float, end: float, size: int) -> slice:
    first = min(max(int(start), 0), size - 1)
    return slice(first, min(max(int(end), first + 1), size))


class DepthEstimator(nn.Module):
    """DPT (https://arxiv.org/abs/2103.13413).

    Args:
        model: Of transformers.
    """

    def __init__(self, model: DPTForDepthEstimation) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def read(cls, path: str) -> DepthEstimator:
        """Read a folder or a hub id, in float32."""
        import transformers

        from cotgen_pl.checkpoints import expand_home, read_config

        path = expand_home(path)
        read_config(path, transformers.DPTConfig, ORIGINAL)
        model = _read_model(path)
        if model.config.is_hybrid:  # else it refuses pictures larger than its training's
            model.dpt.embeddings.image_size = (SIDE, SIDE)
        return cls(model)

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Inverse depth in 256 steps, 0 the farthest and 1 the nearest of each picture.

        As published: squashed to 480 x 480, brought to [0, 1], resized to the picture, stored in 8
        bits, and resized like the detector's picture.

        Args:
            images: [B, 3, H, W] in [0, 1].
            size: Height and width of the map.

        Returns:
            [B, *size] float32; NaN where the network gave no numbers.
        """
        pixels = normalise(resize(images, SIDE, SIDE), MEAN, STD).to(self.model.dtype)
        output: Any = self.model(pixel_values=pixels)
        depth = output.predicted_depth.float()  # [B, h, w]
        low, high = depth.amin((-2, -1), keepdim=True), depth.amax((-2, -1), keepdim=True)
        depth = ((depth - low) / (high - low).clamp(min=1e-12))[:, None]
        depth = F.interpolate(depth, images.shape[-2:], mode="bilinear", align_corners=True)
        return resize(round_to_bytes(depth), *size, mode="bilinear")[:, 0]


def _read_model(path: str) -> DPTForDepthEstimation:
    """All weights that are computed with; `checkpoints.read_weights` wants the unused ones too."""
    from transformers import DPTForDepthEstimation

    try:
        loaded: Any = DPTForDepthEstimation.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    except OSError as error:
        raise ValueError(
            f"expected weights in {path}, got: {str(error).splitlines()[0]}; download the "
            "checkpoint again"
        ) from error
    model: DPTForDepthEstimation = loaded[0]
    wrong = [name for name in loaded[1]["missing_keys"] if not name.startswith(UNUSED)]
    wrong += [name for name, *_ in loaded[1]["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"expected all weights of a DPTForDepthEstimation in {path}, got {len(wrong)} missing "
            f"or of another shape (first: {min(wrong)}); download the checkpoint again"
        )
    return model
