"""A run that is told to stop saves itself first; under SLURM it asks to be started again.

Lightning's own handlers save, or let processes meet, wherever the signal finds them, in the middle
of an update too; its next checkpoint is then of half an update, or processes wait for each other.
"""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cotgen_pl.callbacks.base import save_last, training_ends
from cotgen_pl.modules.base import PolicyModule

WARNING = signal.SIGUSR1  # that a job's time is nearly up: `#SBATCH --signal=USR1@600`


class StopSignals(Callback):
    """Notes that the run is told to stop: by SIGTERM, and under SLURM by SIGUSR1.

    Every process may get the signal, or one of them. Name it before callbacks that work at the
    start of training: until then, Lightning's own handlers are there.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the signal that came."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it takes away itself when the run ends."""
        numbers = [signal.SIGTERM, *([WARNING] if "SLURM_JOB_ID" in os.environ else [])]
        for number in numbers:
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.received = number


class Preemption(Callback):
    """Ends a run that is told to stop at the update's end, with `last.ckpt` of that update.

    After SIGUSR1 under SLURM, the job is put back into the queue. While pairs are drawn, or the
    start is scored, all is on the disk already: the run ends with the batch of pictures that is
    being drawn. The last update ends the run anyway. Name it behind all callbacks that save.

    Args:
        signals: Notes them.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self._in_update = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at what came before pictures are drawn."""
        assert isinstance(pl_module, PolicyModule)
        pl_module.before_drawing.append(self._stop_between_updates)

    def _stop_between_updates(self, stream: str) -> None:
        if self.signals.received and not self._in_update and stream != "rollout":
            raise SIGTERMException

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Finish from here on what is begun."""
        self._in_update = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save, if any process was told to stop, and have Lightning end all once it has logged."""
        self._in_update = False
        told = trainer.strategy.reduce_boolean_decision(
            self.signals.received is not None, all=False
        )
        if told and not training_ends(trainer):
            save_last(trainer)
            trainer._signal_connector.received_sigterm = True  # it has no public way to ask for it

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put a SLURM job whose time is up back into the queue."""
        asked = isinstance(exception, SIGTERMException) and self.signals.received == WARNING
        if asked and trainer.is_global_zero:
            _requeue()


def _requeue() -> None:
    """Ask SLURM to start this job again, with SLURM_RESTART_COUNT one higher."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", None) or error
        rank_zero_warn(f"the job was saved, and not put back into the queue ({told}); submit it")
