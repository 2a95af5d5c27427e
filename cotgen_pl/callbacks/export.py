"""The trained policy as a checkpoint of its own library."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from cotgen_pl.modules.base import PolicyModule


class HuggingFaceExport(Callback):
    """Writes the policy at the end of training, so that transformers loads it without this package.

    Args:
        folder: Where, inside the run folder.
        merge_adapters: Merge LoRA adapters into the weights; otherwise they are written alone, for
            peft.
    """

    def __init__(self, folder: str = "exported", merge_adapters: bool = True) -> None:
        self.folder, self.merge_adapters = folder, merge_adapters

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, from the first process."""
        assert isinstance(pl_module, PolicyModule)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / self.folder
            pl_module.policy.export(folder, merge_adapters=self.merge_adapters)
            rank_zero_info(f"exported the policy to {folder}")
        trainer.strategy.barrier("export")
