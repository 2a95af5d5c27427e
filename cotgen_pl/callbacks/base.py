"""When callbacks act: what those that look at the policy now and then share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.interfaces import check_positive
from cotgen_pl.modules.base import PolicyModule


def training_ends(trainer: Trainer) -> bool:
    """Whether the batch that ends now is the run's last: by its budget, data, steps or time."""
    limit = trainer.max_epochs or -1  # absent and -1 are none
    last_epoch = 0 < limit <= trainer.current_epoch + 1
    last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    out_of_steps = 0 <= trainer.max_steps <= trainer.global_step  # -1 is none
    return trainer.should_stop or out_of_steps or (last_epoch and last_batch)


def save_last(trainer: Trainer) -> None:
    """Write the checkpoint that `--ckpt_path last` reads, where one is kept."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_last and callback.dirpath:
            path = str(Path(callback.dirpath) / "last.ckpt")
            callback.last_model_path = path  # a part of what is saved: it is written again
            trainer.save_checkpoint(path)


class Observer(Callback, ABC):
    """Observes the policy at the start of training, every so often, and at the end.

    Args:
        every_n_updates: Rollouts between two observations.
    """

    def __init__(self, every_n_updates: int) -> None:
        check_positive(every_n_updates=every_n_updates)
        self.every_n_updates = every_n_updates
        self.last_observed = -1
        """Rollouts before the last observation."""

    @abstractmethod
    def observe(self, trainer: Trainer, module: PolicyModule, *, thoroughly: bool) -> None:
        """Look at the policy: thoroughly at the start and at the end."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the start; a resumed run was observed where it stopped, if that was due."""
        assert isinstance(pl_module, PolicyModule)
        if pl_module.rollouts == 0:
            self._observe(trainer, pl_module, thoroughly=True)
        self.last_observed = pl_module.rollouts

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Observe every so often, and the end, in time for `ModelCheckpoint` to see it."""
        assert isinstance(pl_module, PolicyModule)
        ends = training_ends(trainer)
        if ends or pl_module.rollouts % self.every_n_updates == 0:
            self._observe(trainer, pl_module, thoroughly=ends)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe an end that only the end of an epoch brought, as early stopping does."""
        assert isinstance(pl_module, PolicyModule)
        if self.last_observed != pl_module.rollouts:
            self._observe(trainer, pl_module, thoroughly=True)

    def _observe(self, trainer: Trainer, module: PolicyModule, *, thoroughly: bool) -> None:
        with module.stopwatch.paused():
            self.observe(trainer, module, thoroughly=thoroughly)
        self.last_observed = module.rollouts
