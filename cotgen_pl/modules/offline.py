"""What modules share that learn from pictures which are there, by automatic optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from cotgen_pl.interfaces import Policy, Reward, freeze
from cotgen_pl.metrics import peak_memory_gb
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.pairs.sets import PairSet
from cotgen_pl.sharding import whole


class OfflineModule(PolicyModule):
    """A policy that learns from pictures which are there: given ones, or pairs of its own.

    Args:
        policy: What is trained.
        reward: Scores the pictures that pairs are made of; absent where none are drawn.
        optimizer: For `PolicyModule`, as all down to `seed`.
        lr_scheduler: Likewise.
        guidance: Likewise.
        temperature: Likewise.
        seed: Likewise.
        images_budget: Images to sample in the whole run, all rounds together.
        group_size: Images per prompt, of which pairs are chosen.
    """

    learns_from_pairs = True

    def __init__(
        self,
        policy: Policy,
        reward: Reward | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        guidance: float,
        temperature: float,
        seed: int,
        images_budget: int,
        group_size: int,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler, guidance, temperature, seed)
        if group_size < 2:
            raise ValueError(f"expected group_size of 2 or more, got {group_size}; a pair has two")
        if images_budget < group_size:
            raise ValueError(
                f"expected images_budget of at least group_size ({group_size}), got "
                f"{images_budget}; raise the budget"
            )
        self.reward = reward
        self.images_budget, self.group_size = images_budget, group_size

    def configure_model(self) -> None:
        """Read the weights of reward and policy."""
        if self.reward is not None:
            freeze(self.reward.load())
        super().configure_model()

    def setup(self, stage: str) -> None:
        """Let data refuse, before weights load, what only callbacks could have given it."""
        super().setup(stage)
        check_ready = getattr(getattr(self.trainer, "datamodule", None), "check_ready", None)
        if stage == "fit" and check_ready is not None:
            check_ready()

    def take_up(self, pair_set: PairSet, batch_size: int) -> None:
        """Prepare for a pair set, before its first batch."""

    def needed_reward(self, who: str) -> Reward:
        """The reward, or a ValueError that names the callback which cannot do without."""
        if self.reward is None:
            raise ValueError(
                f"expected a reward beside {who}, which scores pictures and pairs them, got none; "
                "name one by model.init_args.reward, or leave the callback out"
            )
        return self.reward

    def log_update(self, metrics: Mapping[str, Any], sequences: int) -> None:
        """Log a step with the time spent since the one before, and count it.

        Args:
            metrics: Of training.
            sequences: Images that this process back-propagates.
        """
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_all("train/", {**metrics, "learning_rate": rate})
        performance = {f"{name}_s": spent for name, spent in self.seconds.items()}
        performance["peak_memory_gb"] = peak_memory_gb(self.device)
        work = self.count_work(sequences, self.global_step + 1)  # the step comes after its loss
        self.log_all("perf/", performance | self.image_counts() | work)
        for name in self.seconds:  # not cleared: Lightning repeats what is not logged
            self.seconds[name] = 0.0
        self.rollouts += 1

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, or leave it out: what it raises comes before any weight changes.

        Then let gradients go: else their memory waits out what is drawn until the next. Arguments
        are Lightning's.
        """
        with self.skipping():
            super().optimizer_step(*args, **kwargs)
        self.trainer.optimizers[0].zero_grad()

    def on_before_backward(self, loss: Tensor) -> None:
        """Keep the loss: Lightning expects a backward pass of a bad one, too."""
        self._loss = loss.detach()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a non-finite gradient is clipped or reaches the weights."""
        self.check_finite(self._loss, "loss", update=self.rollouts)  # counted with its loss
        gradients = [p.grad for p in self._trained().values() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        self.check_finite(norm, "gradient norm", update=self.rollouts)
        self.log("train/grad_norm", norm)
