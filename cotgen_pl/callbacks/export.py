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
        merge_adapters: Merge LoRA adapters into the weights, or write them alone, for peft; absent
            means merge unless the weights are quantised, which take no merging.
    """

    def __init__(self, folder: str = "exported", merge_adapters: bool | None = None) -> None:
        self.folder, self.merge_adapters = folder, merge_adapters

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before any weights load what the policy could not write at the end."""
        assert isinstance(pl_module, PolicyModule)
        check = getattr(pl_module.policy, "check_export", None)
        if stage == "fit" and check is not None:
            check(merge_adapters=self._merges(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, from the first process."""
        assert isinstance(pl_module, PolicyModule)
        policy = pl_module.whole_policy()
        if policy is not None:
            folder = Path(trainer.default_root_dir) / self.folder
            policy.export(folder, merge_adapters=self._merges(pl_module))
            rank_zero_info(f"exported the policy to {folder}")
        trainer.strategy.barrier("export")

    def _merges(self, module: PolicyModule) -> bool:
        if self.merge_adapters is None:
            return module.policy.merges_exactly
        return self.merge_adapters
