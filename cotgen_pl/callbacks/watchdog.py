"""The end of a run that hangs, with all stack traces: else its processes wait for each other."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cotgen_pl.modules.base import PolicyModule

LOOKS = 20  # at the others, within the time limit
EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h

_logger = logging.getLogger(__name__)


class Watchdog(Callback):
    """Ends a run in which no process has shown a sign of life for a while.

    Signs are the begin and end of a batch of training, and each batch of pictures that is drawn for
    training, pairs or evaluation. A process that waits for another one that draws is safe. When no
    sign comes, each process writes where its threads stand to `watchdog/<rank>.txt` in the run
    folder, which all processes share, and ends; go on with `--ckpt_path last`.

    Args:
        minutes: Without a sign. Less than the 30 after which torch's processes give up on each
            other without a word about the one that hangs.
    """

    def __init__(self, minutes: float = 20.0) -> None:
        if not minutes > 0:
            raise ValueError(
                f"expected minutes above 0, got {minutes}; leave Watchdog out for none"
            )
        self.limit_s = 60 * minutes
        self._signs = 0
        self._over = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where traces go."""
        self._folder = Path(trainer.default_root_dir) / "watchdog"
        self._own, self._processes = self._folder / f"{trainer.global_rank}.txt", trainer.world_size

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch from here on, once what an earlier hang left is gone."""
        assert isinstance(pl_module, PolicyModule)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._own.unlink(missing_ok=True)
        trainer.strategy.barrier("earlier traces are gone")
        pl_module.before_drawing.append(self._note)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def _note(self, stream: str = "") -> None:
        self._signs += 1

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Note a sign of life."""
        self._note()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Note a sign of life."""
        self._note()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch no more; leave nothing behind."""
        self._over.set()
        self._thread.join()
        trainer.strategy.barrier("no process watches")
        if trainer.is_global_zero:
            self._sign_path.unlink(missing_ok=True)
            if not any(self._folder.iterdir()):
                self._folder.rmdir()

    def on_exception(self, *arguments: Any) -> None:
        """Watch no more."""
        self._over.set()

    @property
    def _sign_path(self) -> Path:
        """A file that processes touch; only whether its time changes is read, not what it is."""
        return self._folder / "alive"

    def _watch(self) -> None:
        told, seen, since = -1, -1, time.monotonic()
        while not self._over.wait(self.limit_s / LOOKS):
            if self._signs != told:
                told = self._signs
                self._sign_path.touch()
            changed = self._sign_path.stat().st_mtime_ns
            if changed != seen:
                seen, since = changed, time.monotonic()
            if time.monotonic() - since > self.limit_s:
                self._end()

    def _end(self) -> None:
        """Write this process's traces, wait a little for the others' and end it at once."""
        with self._own.open("w") as file:
            file.write(f"no sign of life of any process for {self.limit_s:g} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        for _ in range(LOOKS // 4):
            if len(list(self._folder.glob("*.txt"))) < self._processes:
                time.sleep(self.limit_s / LOOKS)
        _logger.critical(
            "no process has shown a sign of life for %g s; %s says where all threads stand; "
            "go on with --ckpt_path last",
            self.limit_s,
            self._folder,
        )
        os._exit(EXIT_CODE)
