"""Supervised fine-tuning: raise the likelihood of given pictures."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from cotgen_pl.interfaces import Policy, Prompt
from cotgen_pl.losses import token_logprobs
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.sampling import noise_seed


class SFTModule(PolicyModule):
    """Next-token training on pictures, some without their prompt: guidance needs such a branch.

    Args:
        policy: What is trained.
        optimizer: Makes the optimizer from the parameters that train.
        lr_scheduler: Makes the learning-rate schedule, stepped once per optimizer step.
        guidance: Weight of classifier-free guidance where the policy is evaluated.
        temperature: Of sampling where the policy is evaluated.
        seed: Of all noise. On the command line it is `seed_everything`.
        condition_dropout: Share of the pictures that are learnt without their prompt; 0.1 in
            LlamaGen and others.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        guidance: float = 5.0,
        temperature: float = 1.0,
        seed: int = 0,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler, guidance, temperature, seed)
        if not 0 <= condition_dropout <= 1:
            raise ValueError(
                f"expected condition_dropout in [0, 1], got {condition_dropout}; it is a share"
            )
        self.condition_dropout = condition_dropout

    def training_step(self, batch: tuple[list[Prompt], Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood per token, in nats."""
        prompts, pictures = batch
        tokens = self.policy.encode(pictures)
        logits = self.policy.logits(
            [p.drawn_text for p in prompts], tokens, self._dropped(len(prompts))
        )
        loss = -token_logprobs(logits, tokens).mean()
        self.check_finite(loss, "loss")
        self.rollouts += 1
        self.log_dict({"train/loss": loss, "step": float(self.rollouts)}, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a non-finite gradient is clipped or reaches the weights."""
        gradients = [p.grad for p in self._trained().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.check_finite(norm, "gradient norm", update=self.rollouts)  # counted with its loss

    def _dropped(self, number: int) -> Tensor:
        """Which pictures lose their prompt in this step, [B] bool."""
        generator = torch.Generator().manual_seed(
            noise_seed(self.seed, "condition", self.rollouts, self.global_rank)
        )
        return torch.rand(number, generator=generator) < self.condition_dropout
