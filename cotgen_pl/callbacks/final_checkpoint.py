"""The end of training in every kind of checkpoint."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.callbacks.base import training_ends


class FinalCheckpoint(Callback):
    """Lets each `ModelCheckpoint` save after the last update, whatever its interval.

    By itself, Lightning's saves after multiples of `every_n_train_steps` alone: `last` would lack
    the updates behind the last multiple, and `best` would never see the last evaluation. The last
    batch is the time, and not `on_train_end`: there the epoch counts as finished, so that a run
    that goes on with more steps would stop at once. Name it behind the callbacks that score.
    """

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save the end of training, unless it was saved as a multiple."""
        if training_ends(trainer):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    _save_now(callback, trainer)


def _save_now(checkpoint: ModelCheckpoint, trainer: Trainer) -> None:
    """Do what the callback does in its own time; Lightning has no public way to ask for it."""
    if not checkpoint._should_skip_saving_checkpoint(trainer):
        scores = checkpoint._monitor_candidates(trainer)
        checkpoint._save_topk_checkpoint(trainer, scores)
        checkpoint._save_last_checkpoint(trainer, scores)
