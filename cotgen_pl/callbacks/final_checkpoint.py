"""The start of training in the last checkpoint, and its end in every kind of checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.callbacks.base import save_last, training_ends
from cotgen_pl.modules.base import PolicyModule


class StartCheckpoint(Callback):
    """Writes `last.ckpt` at the start of training, where a `ModelCheckpoint` keeps one.

    By itself, Lightning's first one comes after `every_n_train_steps`: a run that is killed before
    could not be gone on with. Name it before all callbacks that work at the start.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the start of a run, or of one that goes on in another folder."""
        assert isinstance(pl_module, PolicyModule)
        if pl_module.rollouts == 0 or not _holds_last(trainer):
            save_last(trainer)


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


def _holds_last(trainer: Trainer) -> bool:
    """Whether there is a last checkpoint already, as the first process sees it."""
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    found = any((Path(folder) / "last.ckpt").exists() for folder in folders if folder)
    return bool(trainer.strategy.broadcast(found))


def _save_now(checkpoint: ModelCheckpoint, trainer: Trainer) -> None:
    """Do what the callback does in its own time; Lightning has no public way to ask for it."""
    if not checkpoint._should_skip_saving_checkpoint(trainer):
        scores = checkpoint._monitor_candidates(trainer)
        checkpoint._save_topk_checkpoint(trainer, scores)
        checkpoint._save_last_checkpoint(trainer, scores)
