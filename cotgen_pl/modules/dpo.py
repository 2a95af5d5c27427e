"""DPO: learn from pairs of images which of two the reward prefers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cotgen_pl.checkpoints import hash_weights
from cotgen_pl.interfaces import (
    Policy,
    PreferencePair,
    Reward,
    check_choice,
)
from cotgen_pl.losses import (
    PreferenceVariant,
    dpo_loss,
    sum_logprobs,
    token_logprobs,
    token_statistics,
)
from cotgen_pl.metrics import merge_metrics
from cotgen_pl.modules.micro_batches import MicroBatchModule, MicroBatchSize
from cotgen_pl.modules.offline import OfflineModule
from cotgen_pl.pairs.sets import PairSet, load_reference, save_reference, tokens_hash
from cotgen_pl.planning.footprint import PlannedPolicy
from cotgen_pl.planning.work import PlannedWork, dpo_work
from cotgen_pl.sampling import LogprobMode, forced_logits

ReferenceLogps = Literal["stored", "live"]


class DPOModule(MicroBatchModule, OfflineModule):
    """Direct preference optimisation (arXiv 2305.18290) on image tokens.

    Pairs come from `PairData`: of a finished pair set, or of those that `IterativeRounds` draws
    with this module's own sampler and reward.

    Args:
        policy: What is trained.
        reward: Scores the pictures that pairs are made of; absent where pairs come finished.
        optimizer: Makes the optimizer from the parameters that train.
        lr_scheduler: Makes the learning-rate schedule, stepped once per optimizer step.
        guidance: Weight of classifier-free guidance in sampling; 5 in Janus's
            generation_inference.py.
        temperature: Of sampling, applied after guidance.
        seed: Of all noise. On the command line it is `seed_everything`.
        images_budget: Images to sample in the whole run, all rounds together.
        group_size: Images per prompt, of which pairs are chosen.
        beta: How strongly the policy is held to the reference. 0.1 in ICoT's second round.
        variant: See `cotgen_pl.losses.dpo_loss`.
        label_smoothing: Share of the verdicts taken to be wrong, for variants that know one.
        likelihood_coef: Weight of the chosen images' negative log-likelihood per token.
        logprobs: Which distribution's log-probs are trained; see
            `cotgen_pl.sampling.forced_logits`.
        reference_logps: Read the reference once and keep what it says beside the pairs, or keep a
            frozen copy of it and read that in every step.
        micro_batch_size: Pairs of an update whose activations are kept at a time, on each process;
            absent keeps all, `auto` as many as the device's memory is planned to hold. Same
            gradient and less memory, for one more forward pass of all pairs but the last
            micro-batch's.
    """

    images_each = 2

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
        beta: float = 0.1,
        variant: PreferenceVariant = "sigmoid",
        label_smoothing: float = 0.0,
        likelihood_coef: float = 0.0,
        logprobs: LogprobMode = "guided",
        reference_logps: ReferenceLogps = "stored",
        micro_batch_size: MicroBatchSize = None,
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
        check_choice("logprobs", logprobs, LogprobMode)
        check_choice("reference_logps", reference_logps, ReferenceLogps)
        self.take_micro_batch_size(micro_batch_size)
        self.logprobs, self.reference_logps = logprobs, reference_logps
        self.loss_settings: dict[str, Any] = {
            "beta": beta,
            "variant": variant,
            "label_smoothing": label_smoothing,
            "likelihood_coef": likelihood_coef,
        }
        one = torch.zeros(1, 1)
        dpo_loss(one, one, one[0], one[0], **self.loss_settings)  # refuses before weights load
        self._stored: Tensor | None = None  # the reference's sums for the set in use, [N, 2]
        self.refreshes = 0
        """Of the reference: while this stays, so does all that was read from it."""

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen twin is read in every step."""
        return self.reference_logps == "live"

    @property
    def compares(self) -> bool:
        """Always: stored log-probs are a reference's, too."""
        return True

    def planned_work(
        self, policy: PlannedPolicy, processes: int, **around: Any
    ) -> PlannedWork | None:
        """What an update asks of each process, see `dpo_work`; None without pairs."""
        data: Any = getattr(self.trainer, "datamodule", None)
        pairs = getattr(data, "pairs_per_update", None)
        return dpo_work(policy, self, pairs, processes, **around) if pairs else None

    # One step -----------------------------------------------------------------------------------

    def training_step(self, pairs: PreferencePair, batch_idx: int) -> Tensor:
        """The loss of a batch of pairs."""
        with self.phase("reference"):
            reference = self._reference_of(pairs)
        loss, metrics = self._loss_in_parts(pairs, reference)
        self.log_update(metrics, sequences=2 * len(pairs))
        return loss

    def _loss_in_parts(
        self, pairs: PreferencePair, reference: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` in micro-batches, each of which the backward pass computes again.

        The last one's activations stay: it is where the backward pass begins.
        """
        parts = list(self._parts(pairs))
        again = partial(checkpoint, self.loss, use_reentrant=False)
        ways: list[Callable[..., Any]] = [again] * (len(parts) - 1) + [self.loss]
        total, metrics = torch.zeros((), device=self.device), dict[str, Tensor]()
        for compute, part, sums in zip(ways, parts, reference.split(len(parts[0])), strict=True):
            loss, terms = compute(part, sums)
            share = len(part) / len(pairs)
            total = total + share * loss
            merge_metrics(metrics, terms, share)
        return total, metrics

    def _parts(self, pairs: PreferencePair) -> Iterator[PreferencePair]:
        size = self.micro_batch_size or len(pairs)
        for start in range(0, len(pairs), size):
            part = slice(start, start + size)
            yield PreferencePair(*(getattr(pairs, entry.name)[part] for entry in fields(pairs)))

    def loss(self, pairs: PreferencePair, reference: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of B pairs, given the reference's sums [B, 2]."""
        logits, tokens = self._logits(self.policy, pairs)
        logprobs, entropy = token_statistics(logits, tokens, self.temperature)
        chosen, rejected = logprobs.chunk(2)
        loss, metrics = dpo_loss(chosen, rejected, *reference.unbind(1), **self.loss_settings)
        return loss, metrics | {"entropy": entropy.mean()}

    def _logits(self, policy: Policy, pairs: PreferencePair) -> tuple[Tensor, Tensor]:
        """One forward pass of the chosen images, then the rejected ones: [2B, T, V], [2B, T]."""
        tokens = torch.cat([pairs.chosen, pairs.rejected])
        texts = [prompt.drawn_text for prompt in pairs.prompts] * 2
        mode, guidance = self.logprobs, self.guidance
        return forced_logits(policy, texts, tokens, guidance=guidance, mode=mode), tokens

    # The reference ------------------------------------------------------------------------------

    def refresh_reference(self) -> None:
        """From now on, the reference has the weights of now."""
        super().refresh_reference()
        self.refreshes += 1

    def _reference_of(self, pairs: PreferencePair) -> Tensor:
        if self._stored is not None:
            return self._stored.to(self.device)[pairs.rows]
        assert self.reference is not None
        return torch.cat([self._sums(self.reference, part) for part in self._parts(pairs)])

    @torch.no_grad()
    def _sums(self, policy: Policy, pairs: PreferencePair) -> Tensor:
        """Log-probs of chosen and rejected images, summed over tokens, [B, 2]."""
        logits, tokens = self._logits(policy, pairs)
        logprobs = token_logprobs(logits, tokens, self.temperature)
        return torch.stack(sum_logprobs(logprobs).chunk(2), 1)

    def reference_sums(self, pair_set: PairSet, batch_size: int) -> Tensor:
        """The reference's sums for a whole set, [N, 2], each process reading its share of it.

        In float64, which holds them as they are: rounded, an equal policy would differ from them.
        """
        sums = torch.zeros(len(pair_set), 2, dtype=torch.float64, device=self.device)
        rank, number = self.trainer.global_rank, self.trainer.world_size
        with self.reference_weights() as policy, self.precision(), self.gathered():
            for rows in torch.arange(len(pair_set))[rank::number].split(batch_size):
                pairs = self.transfer_batch_to_device(pair_set.batch(rows.tolist()), self.device, 0)
                sums[rows] = self._sums(policy, pairs).to(sums)
        return self.sum_over_processes(sums)

    def take_up(self, pair_set: PairSet, batch_size: int) -> None:
        """Read what the reference says of a set, or have it say so now and keep that."""
        if self.reference_logps == "live":
            return
        with self.phase("reference"):
            key = self._reference_key(pair_set)
            self._stored = load_reference(pair_set.folder, key)
            if self._stored is None:
                size = self.micro_batch_size or batch_size
                self._stored = self.reference_sums(pair_set, size).float()  # as read back
                if self.trainer.is_global_zero:
                    save_reference(pair_set.folder, self._stored.cpu(), key)

    def _reference_key(self, pair_set: PairSet) -> dict[str, str | float]:
        """All that the reference's log-probs depend on."""
        with self.reference_weights() as policy:
            reference = hash_weights(policy)
        return {
            "reference": reference,
            "tokens": tokens_hash(pair_set),
            "template": str(self.policy.describe().get("template", "")),
            "logprobs": self.logprobs,
            "guidance": self.guidance,
            "temperature": self.temperature,
            "precision": str(self.trainer.precision),
        }
