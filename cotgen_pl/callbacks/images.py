"""Pictures of `predict` as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torchvision.utils import save_image

from cotgen_pl.interfaces import Prompt
from cotgen_pl.modules.base import PolicyModule


class ImageWriter(BasePredictionWriter):
    """Writes each picture as `<index>.png`, and `manifest.jsonl` with the prompt of each.

    Args:
        folder: Where, inside the run folder.
        top_k: Draw from the k likeliest tokens alone; 1 is greedy.
        top_p: Draw from the likeliest tokens that together reach this probability.
    """

    def __init__(
        self, folder: str = "images", top_k: int | None = None, top_p: float | None = None
    ) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self.sampling = {"top_k": top_k, "top_p": top_p}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the module how to draw."""
        assert isinstance(pl_module, PolicyModule)
        pl_module.predict_sampling = self.sampling

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: list[Prompt],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch of pictures [B, 3, H, W] in [0, 1]."""
        folder = Path(trainer.default_root_dir) / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for picture, prompt in zip(prediction, batch, strict=True):
            name = f"{prompt.index:06d}.png"
            save_image(picture, folder / name)
            rows.append({"file": name, "prompt": prompt.text, "category": prompt.category})
        name = (
            "manifest.jsonl" if trainer.world_size == 1 else f"manifest_{trainer.global_rank}.jsonl"
        )
        with (folder / name).open("w" if batch_idx == 0 else "a") as manifest:
            manifest.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
