"""Steps whose loss or gradient is no number: never taken, left out where that is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


class NotFiniteError(ValueError):
    """A loss or a gradient norm is infinite or NaN; on all processes, if it is on one."""


class FiniteSteps(LightningModule):
    """A module that takes no step on what is not finite."""

    rollouts: int
    skipped_steps = 0
    """Optimizer steps that were left out so far."""
    max_skipped_steps = 0
    """Of the whole run; one more ends it. `Guards` sets it."""

    def check_finite(self, value: Tensor, name: str, update: int | None = None) -> None:
        """Raise a NotFiniteError that names the step unless a loss or norm is a number.

        All processes must call this, and all raise if one does: none waits for the others.

        Args:
            value: A scalar.
            name: What it is, for the message.
            update: Number of the update, from 1; absent means the one after `rollouts`.
        """
        own = finite = bool(torch.isfinite(value))
        if self._trainer is not None:
            finite = self.trainer.strategy.reduce_boolean_decision(own)
        if not finite:
            got = "none on another process" if own else value.item()
            raise NotFiniteError(
                f"expected a finite {name} in update {update or self.rollouts + 1} (optimizer step "
                f"{self.global_step + 1}), got {got}; this step was not taken and no "
                "checkpoint was written: resume from the last one with a smaller learning rate, or "
                "clip gradients"
            )

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Leave out what raises a NotFiniteError, as long as the run may leave out one more."""
        try:
            yield
        except NotFiniteError:
            if self.skipped_steps >= self.max_skipped_steps:
                raise
            self.skipped_steps += 1
