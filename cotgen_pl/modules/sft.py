"""Supervised fine-tuning: raise the likelihood of given pictures, or of pairs' better ones."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from cotgen_pl.interfaces import Policy, PreferencePair, Prompt, Reward
from cotgen_pl.losses import token_logprobs
from cotgen_pl.modules.offline import OfflineModule
from cotgen_pl.sampling import noise_seed


class SFTModule(OfflineModule):
    """Next-token training on pictures, some without their prompt: guidance needs such a branch.

    Given prompts with pictures, it learns those; given pairs, the chosen ones of them, which is
    best-of-N fine-tuning: what preference learning adds shows beside it.

    Args:
        policy: What is trained.
        reward: Scores the pictures that pairs are made of; absent where pairs or pictures come
            finished.
        optimizer: Makes the optimizer from the parameters that train.
        lr_scheduler: Makes the learning-rate schedule, stepped once per optimizer step.
        guidance: Weight of classifier-free guidance where the policy is evaluated.
        temperature: Of sampling where the policy is evaluated.
        seed: Of all noise. On the command line it is `seed_everything`.
        images_budget: Images to sample in the whole run, all rounds together.
        group_size: Images per prompt, of which pairs are chosen.
        condition_dropout: Share of the pictures that are learnt without their prompt; 0.1 in
            LlamaGen and others.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        guidance: float = 5.0,
        temperature: float = 1.0,
        seed: int = 0,
        images_budget: int = 16_384,
        group_size: int = 4,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__(
            policy,
            reward,
            optimizer,
            lr_scheduler,
            guidance,
            temperature,
            seed,
            images_budget,
            group_size,
        )
        if not 0 <= condition_dropout <= 1:
            raise ValueError(
                f"expected condition_dropout in [0, 1], got {condition_dropout}; it is a share"
            )
        self.condition_dropout = condition_dropout

    def training_step(
        self, batch: tuple[list[Prompt], Tensor] | PreferencePair, batch_idx: int
    ) -> Tensor:
        """Mean negative log-likelihood per token, in nats."""
        prompts, tokens = self._examples(batch)
        texts = [prompt.drawn_text for prompt in prompts]
        logits = self.policy.logits(texts, tokens, self._dropped(len(prompts)))
        loss = -token_logprobs(logits, tokens).mean()
        self.log_update({"loss": loss}, sequences=len(tokens))
        return loss

    def _examples(
        self, batch: tuple[list[Prompt], Tensor] | PreferencePair
    ) -> tuple[list[Prompt], Tensor]:
        if isinstance(batch, PreferencePair):
            return batch.prompts, batch.chosen
        prompts, pictures = batch
        return prompts, self.policy.encode(pictures)

    def _dropped(self, number: int) -> Tensor:
        """Which pictures lose their prompt in this step, [B] bool."""
        generator = torch.Generator().manual_seed(
            noise_seed(self.seed, "condition", self.rollouts, self.global_rank)
        )
        return torch.rand(number, generator=generator) < self.condition_dropout
