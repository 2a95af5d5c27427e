"""GRPO: draw groups of images, score them, learn from how each compares with its group."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from cotgen_pl.interfaces import (
    Policy,
    Prompt,
    Reward,
    Rollout,
    Scores,
    check_choice,
    check_positive,
    check_scores,
    check_share,
)
from cotgen_pl.losses import (
    AdvantageScale,
    KLEstimator,
    PolicyVariant,
    RatioLevel,
    RewardCombination,
    combined_advantages,
    dead_groups,
    grpo_loss,
    k1_penalty,
    signal_weights,
    token_statistics,
)
from cotgen_pl.metrics import merge_metrics, parity_metrics, peak_memory_gb, reward_metrics
from cotgen_pl.modules.grpo_settings import (
    check_losses,
    check_overlap,
    check_sizes,
    check_weights,
)
from cotgen_pl.modules.micro_batches import MicroBatchModule, MicroBatchSize
from cotgen_pl.planning.footprint import PlannedPolicy
from cotgen_pl.planning.work import PlannedWork, grpo_work
from cotgen_pl.sampling import LogprobMode, forced_logits
from cotgen_pl.scoring import Questions, questions

DeadGroups = Literal["keep", "mask", "resample"]
MAX_REDRAWS = 4  # of a group without signal under `resample`; DAPO's own bound is a setting


class GRPOModule(MicroBatchModule):
    """Group relative policy optimisation (arXiv 2402.03300) on image tokens.

    One training step: roll out, score, compare within groups, then `updates_per_rollout` optimizer
    steps, each on the whole rollout in micro-batches.

    Args:
        policy: What is trained.
        reward: Scores pictures; frozen.
        optimizer: Makes the optimizer from the parameters that train.
        lr_scheduler: Makes the learning-rate schedule, stepped once per optimizer step.
        guidance: Weight of classifier-free guidance in sampling; 5 in Janus's
            generation_inference.py.
        temperature: Of sampling, applied after guidance.
        seed: Of all noise. On the command line it is `seed_everything`.
        images_budget: Images to sample in the whole run; training stops at the rollout that
            reaches it.
        images_per_update: Images in a rollout, over all processes.
        group_size: Images per prompt. The study (arXiv 2505.17017) has 4 by secondary accounts,
            T2I-R1 has 8.
        drawn_at_once: Images of a process that are drawn together, whole groups; their key-value
            cache is memory. Absent means its whole rollout.
        scores_while_drawing: Have each part of `drawn_at_once` images scored while the next one is
            drawn: for rewards behind a server or on another device. Scores of the others may round
            otherwise. `perf/reward_s` is then what is waited for them.
        micro_batch_size: Images per forward and backward pass in updates; absent means a process's
            whole rollout, `auto` as many as the device's memory is planned to hold.
        updates_per_rollout: Optimizer steps on each rollout; above 1, old log-probs are replayed
            before the first.
        logprobs: Which distribution's log-probs are trained; see
            `cotgen_pl.sampling.forced_logits`. With guidance other than 1, `conditional` (as T2I-R1
            and GCPO) trains another distribution than it samples from.
        kl_coef: Weight of the KL divergence to the start policy; at 0 there is no reference.
            T2I-R1: 0.01.
        kl_estimator: How that divergence is estimated; see `cotgen_pl.losses.kl_estimate`.
        kl_penalty: Weight of the divergence as a part of the reward, estimated by k1, in place of
            or beside the term in the loss.
        clip_low: Lower clip range of the ratio.
        clip_high: Upper clip range of the ratio; for `cispo` the cap itself.
        delta: Upper bound of the ratio where the advantage is negative.
        ratio_level: One ratio per token, or per image (GSPO).
        variant: Clipped ratio, or CISPO.
        advantage_scale: What advantages are divided by: the deviation of the group, of the batch,
            or nothing.
        combine_rewards: Order of summing several rewards and normalising them.
        dead_groups: What to do with groups whose images all score the same: `keep` them (only the
            KL term and the entropy bonus act), `mask` them (nothing acts), or `resample` them up to
            4 times; redrawn images count as sampled.
        most_missing: Largest share of a rollout's images that may lack a verdict; above it, the run
            stops.
        entropy_coef: Weight of an entropy bonus.
        gradient_clip: Largest gradient norm; absent means no clipping. T2I-R1: 1.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        guidance: float = 5.0,
        temperature: float = 1.0,
        seed: int = 0,
        images_budget: int = 16_384,
        images_per_update: int = 128,
        group_size: int = 4,
        drawn_at_once: int | None = None,
        scores_while_drawing: bool = False,
        micro_batch_size: MicroBatchSize = None,
        updates_per_rollout: int = 1,
        logprobs: LogprobMode = "guided",
        kl_coef: float = 0.01,
        kl_estimator: KLEstimator = "k3",
        kl_penalty: float = 0.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        delta: float | None = None,
        ratio_level: RatioLevel = "token",
        variant: PolicyVariant = "clip",
        advantage_scale: AdvantageScale = "group",
        combine_rewards: RewardCombination = "sum_then_normalise",
        dead_groups: DeadGroups = "keep",
        most_missing: float = 0.5,
        entropy_coef: float = 0.0,
        gradient_clip: float | None = 1.0,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler, guidance, temperature, seed)
        self.automatic_optimization = False
        check_sizes(images_budget, images_per_update, group_size, drawn_at_once)
        check_overlap(scores_while_drawing, drawn_at_once)
        check_positive(updates_per_rollout=updates_per_rollout)
        self.take_micro_batch_size(micro_batch_size)
        check_choice("dead_groups", dead_groups, DeadGroups)
        check_choice("logprobs", logprobs, LogprobMode)
        check_weights(kl_penalty, gradient_clip)
        check_share(most_missing=most_missing)
        self.reward = reward
        self.images_budget, self.images_per_update = images_budget, images_per_update
        self.group_size, self.drawn_at_once = group_size, drawn_at_once
        self.scores_while_drawing = scores_while_drawing
        self.logprobs = logprobs
        self.updates_per_rollout = updates_per_rollout
        self.kl_coef, self.kl_penalty = kl_coef, kl_penalty
        self.entropy_coef, self.gradient_clip = entropy_coef, gradient_clip
        self.advantage_scale, self.combine_rewards = advantage_scale, combine_rewards
        self.dead_groups, self.most_missing = dead_groups, most_missing
        self.loss_settings: dict[str, Any] = {
            "clip_low": clip_low,
            "clip_high": clip_high,
            "delta": delta,
            "kl_coef": kl_coef,
            "kl_estimator": kl_estimator,
            "level": ratio_level,
            "variant": variant,
            "entropy_coef": entropy_coef,
        }
        check_losses(self.loss_settings, advantage_scale, combine_rewards)
        self._images_drawn = 0  # in this step, on this process

    # Preparation --------------------------------------------------------------------------------

    @property
    def prompts_per_batch(self) -> int:
        """Prompts in a rollout, over all processes."""
        return self.images_per_update // self.group_size

    @property
    def num_rollouts(self) -> int:
        """Rollouts until the budget is reached, if none is redrawn."""
        return -(-self.images_budget // self.images_per_update)

    def planned_work(self, policy: PlannedPolicy, processes: int, **around: Any) -> PlannedWork:
        """What a step asks of each process; see `grpo_work`."""
        return grpo_work(policy, self, processes, **around)

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL term."""
        return bool(self.kl_coef or self.kl_penalty)

    # One step -----------------------------------------------------------------------------------

    def training_step(self, prompts: list[Prompt], batch_idx: int) -> None:
        """Roll out, then learn from it."""
        started = time.perf_counter()
        self.seconds.clear()
        self._images_drawn = 0
        rollout = self.collect(prompts)
        for _ in range(self.updates_per_rollout):
            with self.phase("update"), self.skipping():
                self.update(rollout)
        self.optimizers().zero_grad()  # type: ignore[union-attr]  # or they wait out a rollout
        self._log_performance(time.perf_counter() - started)
        self.rollouts += 1
        if self.images_sampled >= self.images_budget:
            self.trainer.should_stop = True

    def collect(self, prompts: list[Prompt]) -> Rollout:
        """All that updates need: tokens, rewards, advantages, old and reference log-probs."""
        unequal = self.dead_groups == "resample"  # processes draw again as often as each has to
        with self.gathered() if unequal else nullcontext():
            tokens, logprobs, scores = self.draw_groups(prompts)
        self.images_sampled += int(self.sum_over_processes(torch.tensor(self._images_drawn)))
        rollout = Rollout(
            prompts=[prompt for prompt in prompts for _ in range(self.group_size)],
            tokens=tokens,
            logprobs=logprobs,
            rewards=scores.parts,
            advantages=torch.zeros_like(scores.total),
            weights=torch.ones_like(scores.total),
        )
        if self.updates_per_rollout > 1 or self.kl_penalty:
            with self.phase("replay"):
                rollout.old_logprobs = self.replay(self.policy, rollout)
        if self.reference is not None:
            with self.phase("reference"):
                rollout.reference_logprobs = self.replay(self.reference, rollout)
        if self.kl_penalty:
            scores = self._with_penalty(scores, rollout)
            penalty = scores.parts["kl_penalty"]
            self.log_all(
                "train/rewards/kl_penalty/", {"mean": penalty.mean(), "std": penalty.std()}
            )
        rollout.advantages = self.advantages(scores)
        if self.dead_groups == "mask":
            rollout.weights = signal_weights(rollout.advantages, self.group_size)
        return rollout

    def draw_groups(self, prompts: list[Prompt]) -> tuple[Tensor, Tensor, Scores]:
        """Draw and score a group per prompt; groups without signal again, if `resample` is on."""
        size = self.group_size
        tokens, logprobs, scores = self._draw_and_score(prompts, first_copy=0)
        self.log_all("train/", reward_metrics(scores, size))  # of each group's first drawing
        self.log("reward", scores.total.nanmean(), prog_bar=True, logger=False)
        if self.dead_groups != "resample":
            return tokens, logprobs, scores
        for attempt in range(1, MAX_REDRAWS + 1):
            dead = dead_groups(scores.total, size).nonzero()[:, 0].tolist()
            if not dead:
                break
            again = self._draw_and_score([prompts[group] for group in dead], attempt * size)
            rows = torch.tensor([group * size + copy for group in dead for copy in range(size)])
            tokens[rows], logprobs[rows] = again[0], again[1]
            scores.replace(rows, again[2])
        return tokens, logprobs, scores

    def _draw_and_score(
        self, prompts: list[Prompt], first_copy: int
    ) -> tuple[Tensor, Tensor, Scores]:
        with questions(self.reward, while_drawing=self.scores_while_drawing) as asked:
            with self.phase("rollout"):
                tokens, logprobs = self._draw_pictures(prompts, first_copy, asked)
            with self.phase("reward"):
                scores = asked.scores()
        most_missing = None if first_copy else self.most_missing  # groups drawn again may be few
        check_scores(scores, len(tokens), self.reward.name, most_missing=most_missing)
        for name, seconds in scores.seconds.items():
            self.seconds[f"reward/{name}"] += seconds
        self._images_drawn += len(tokens)
        self.count_drawn(len(tokens))
        return tokens, logprobs, scores

    def _draw_pictures(
        self, prompts: list[Prompt], first_copy: int, asked: Questions
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs of a group per prompt, `drawn_at_once` at a time."""
        number = (self.drawn_at_once or self.images_per_update) // self.group_size
        drawn = []
        for start in range(0, len(prompts), number):
            part = prompts[start : start + number]
            tokens, logprobs = self.draw(part, self.group_size, "rollout", first_copy)
            drawn.append((tokens, logprobs))
            repeated = [prompt for prompt in part for _ in range(self.group_size)]
            asked.put(self.policy.decode(tokens), repeated)
        tokens, logprobs = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return tokens, logprobs

    def _with_penalty(self, scores: Scores, rollout: Rollout) -> Scores:
        """The verdict with the divergence from the start policy as one more, negative part."""
        assert rollout.old_logprobs is not None and rollout.reference_logprobs is not None
        penalty = -k1_penalty(rollout.old_logprobs, rollout.reference_logprobs)
        return Scores(
            scores.total + self.kl_penalty * penalty,
            scores.parts | {"kl_penalty": penalty},
            scores.weights | {"kl_penalty": self.kl_penalty},
        )

    def advantages(self, scores: Scores) -> Tensor:
        """[B], comparing within groups; a deviation over the batch is that over all processes."""
        rank, number = self.trainer.global_rank, len(scores.total)
        parts, weights = scores.parts, scores.weights
        if self.combine_rewards == "sum_then_normalise":  # the reward has summed them
            parts, weights = {"total": scores.total}, {"total": 1.0}
        parts = {name: self.gather(values) for name, values in parts.items()}
        advantages = combined_advantages(
            parts, weights, self.group_size, self.advantage_scale, self.combine_rewards
        )
        return advantages[rank * number : (rank + 1) * number].float()

    @torch.no_grad()
    def replay(self, policy: Policy, rollout: Rollout) -> Tensor:
        """Log-probs [B, T] of a rollout by teacher forcing, in micro-batches as updates have."""
        parts = self._micro_batches(rollout)
        return torch.cat([self._statistics(policy, part)[0] for part in parts])

    def _statistics(self, policy: Policy, part: Rollout) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of a part of a rollout, [b, T] each."""
        logits = forced_logits(
            policy,
            [prompt.drawn_text for prompt in part.prompts],
            part.tokens,
            guidance=self.guidance,
            mode=self.logprobs,
        )
        return token_statistics(
            logits, part.tokens, self.temperature, entropy_gradient=self.entropy_coef != 0
        )

    def _micro_batches(self, rollout: Rollout) -> Iterator[Rollout]:
        return rollout.split(self.micro_batch_size or len(rollout))

    def update(self, rollout: Rollout) -> None:
        """One optimizer step on the whole rollout, or a NotFiniteError in its place."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        metrics: dict[str, Tensor] = {}
        parts = list(self._micro_batches(rollout))
        for number, part in enumerate(parts):
            logprobs, entropy = self._statistics(self.policy, part)
            old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
            loss, terms = grpo_loss(
                logprobs,
                old,
                part.reference_logprobs,
                part.advantages,
                entropy=entropy,
                weights=part.weights,
                **self.loss_settings,
            )
            self.check_finite(loss, "loss")
            share = len(part) / len(rollout)
            self.backward_part(loss * share, last=number == len(parts) - 1)
            merge_metrics(metrics, terms | self._sampling_gap(part, old), share)
        metrics["grad_norm"] = self.clip_gradients_to(self.gradient_clip)
        metrics["learning_rate"] = torch.tensor(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers = self.lr_schedulers()
        if schedulers is not None:
            schedulers.step()  # type: ignore[union-attr]  # one optimizer, so not a list
        self._log_update(metrics)

    def _sampling_gap(self, part: Rollout, old: Tensor) -> dict[str, Tensor]:
        """How far the sampler's log-probs lie from those of teacher forcing before any update."""
        if self._logs_proxy:
            return {"guidance_logp_gap": (part.logprobs - old).mean()}
        return parity_metrics(part.logprobs, old)

    @property
    def _logs_proxy(self) -> bool:
        """Whether the log-probs that train are of another distribution than the sampled one."""
        return self.logprobs == "conditional" and self.guidance != 1

    # Metrics ------------------------------------------------------------------------------------

    def _log_update(self, metrics: dict[str, Tensor]) -> None:
        if "kl" in metrics:
            kl = metrics.pop("kl")
            metrics["kl_proxy" if self._logs_proxy else "kl"] = kl
            self.log("kl", kl, prog_bar=True, logger=False)
        self.log_all("train/", metrics)

    def _log_performance(self, seconds: float) -> None:
        metrics = {f"{name}_s": spent for name, spent in self.seconds.items()}
        speed = self._images_drawn * self.trainer.world_size / seconds
        metrics |= {"images_per_s": speed, **self.image_counts()}
        sequences = self.updates_per_rollout * self.images_per_update // self.trainer.world_size
        metrics |= self.count_work(sequences, self.global_step)
        metrics["peak_memory_gb"] = peak_memory_gb(self.device)
        self.log_all("perf/", metrics)
        self.log("images/s", speed, prog_bar=True, logger=False)
