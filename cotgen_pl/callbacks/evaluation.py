"""Scores on held-out prompts, in domain and out of domain, before, during and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cotgen_pl.callbacks.base import Observer
from cotgen_pl.callbacks.suites import (
    OWN,
    JudgedSuite,
    Metrics,
    Suite,
    domain_mean,
    domain_means,
    domain_verdicts,
    domains_of,
    judge_suite,
    read_suite,
)
from cotgen_pl.data.prompts import check_scorable
from cotgen_pl.interfaces import Policy, Prompt, Reward, check_positive
from cotgen_pl.modules.base import PolicyModule, scorer_of
from cotgen_pl.monitors import Course, watch_hacking
from cotgen_pl.sampling import forced_logits

__all__ = ["Suite", "SuiteEvaluation", "format_table"]

ALARM = "val/alarm/reward_hacking"


class SuiteEvaluation(Observer):
    """Draws the same prompts with the same noise each time, and logs how they score.

    Logged: `val/<domain>/<suite>/<category>` (mean over images), `val/<domain>/<suite>/mean` (over
    categories), `val/<domain>/<suite>/parts/<part>` for each watched part of the scorer (mean over
    categories), `val/<domain>/<suite>/diversity` (of a prompt's images, see
    `cotgen_pl.monitors.diversity`; mean over categories), `val/id/mean` and `val/ood/mean` (over
    suites), `val/gap` (in domain less out of domain), and `val/kl_to_base`: the KL divergence of
    the sampled distribution to that of the start weights, exact over the codebook, along the images
    drawn, mean per token, in nats.

    With `watched`: `val/watched/<domain>/<reward>` (mean over suites of the mean over categories)
    in domain and out of domain. Where the module trains on a reward and a suite is in domain, the
    reward scores that suite's images too, and `val/alarm/reward_hacking` is 1 where it goes up
    while a watched score or `val/ood/mean` goes down, else 0; the rule is that of
    `cotgen_pl.monitors.watch_hacking`, on as many images of each prompt as every evaluation has. A
    warning names what fell. An ensemble that standardises its parts has the same mean at all times
    and so never gives an alarm.

    Args:
        suites: What is scored.
        every_n_updates: Rollouts between two evaluations in training.
        images_per_prompt: Images of each prompt in the middle of a run.
        final_images_per_prompt: Images of each prompt at its start and end, and in `validate`.
        batch_size: Images drawn at a time, on each process.
        kl_images: Images of each in-domain and out-of-domain suite along which the divergence is
            taken; 0 leaves it out.
        watched: Rewards, by names of your own, that are looked at and not trained on; absent means
            no alarm, none at all ({}) that `val/ood/mean` alone is watched.
    """

    def __init__(
        self,
        suites: list[Suite],
        every_n_updates: int = 100,
        images_per_prompt: int = 2,
        final_images_per_prompt: int = 8,
        batch_size: int = 256,
        kl_images: int = 64,
        watched: dict[str, Reward] | None = None,
    ) -> None:
        names = [suite.name for suite in suites]
        if not suites or len(set(names)) < len(names):
            raise ValueError(
                f"expected suites with names of their own, got {names}; name each once"
            )
        _check_watched(watched or {})
        super().__init__(every_n_updates)
        check_positive(
            images_per_prompt=images_per_prompt,
            final_images_per_prompt=final_images_per_prompt,
            batch_size=batch_size,
        )
        self.suites = suites
        self.images_per_prompt = images_per_prompt
        self.final_images_per_prompt = final_images_per_prompt
        self.batch_size, self.kl_images = batch_size, kl_images
        self.prompts = {suite.name: read_suite(suite) for suite in suites}
        self.first: Metrics = {}
        self.last: Metrics = {}
        self.last_scored = -1
        """Rollouts before the last scores."""
        self.watched = watched
        self.course: Course | None = None
        """What the alarm remembers."""

    # When ---------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before weights load, prompts that cannot be drawn or lack a scorer's facts."""
        assert isinstance(pl_module, PolicyModule)
        for suite in self.suites:
            prompts = self.prompts[suite.name]
            _check_shares(suite, len(prompts), trainer.world_size)
            for reward in self._rewards(pl_module, suite).values():
                check_scorable(prompts, reward)
            pl_module.policy.check_prompts([prompt.drawn_text for prompt in prompts])

    def observe(self, trainer: Trainer, module: PolicyModule, *, thoroughly: bool) -> None:
        """Score, and keep the scores of the start for the table."""
        images = self.final_images_per_prompt if thoroughly else self.images_per_prompt
        metrics = self.evaluate(module, images)
        if module.rollouts == 0:
            self.first = metrics

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show new scores to `ModelCheckpoint`, and the last divergence on the bar."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert isinstance(pl_module, PolicyModule)
        if self.last_observed == pl_module.rollouts:
            pl_module.log_dict(self.last, logger=False, batch_size=1)
        if "val/kl_to_base" in self.last:  # the bar shows what is logged in a step, so in each
            divergence = self.last["val/kl_to_base"]
            pl_module.log("kl to base", divergence, prog_bar=True, logger=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what changed."""
        super().on_train_end(trainer, pl_module)
        pl_module.print(format_table(self.first, self.last))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score a checkpoint or a folder under `validate`."""
        assert isinstance(pl_module, PolicyModule)
        if trainer.state.fn == "validate":
            self.evaluate(pl_module, self.final_images_per_prompt)
            pl_module.print(format_table({}, self.last))

    @property
    def state_key(self) -> str:
        """Tells two of these apart in a checkpoint, by their suites."""
        return self._generate_state_key(suites=[suite.name for suite in self.suites])

    def state_dict(self) -> dict[str, Any]:
        """The scores of the start and the last ones, and the alarm's memory, for a resumed run."""
        return {
            "first": self.first,
            "last": self.last,
            "last_scored": self.last_scored,
            "course": vars(self.course) if self.course else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the scores."""
        self.first, self.last = state_dict["first"], state_dict["last"]
        self.last_scored = state_dict["last_scored"]
        self.course = Course(**state_dict["course"]) if state_dict["course"] else None

    # What ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, module: PolicyModule, images_per_prompt: int) -> Metrics:
        """Score all suites, log the metrics and return them."""
        with module.own_random_state("evaluation"):  # of rewards that use it
            judged = [self._judge(module, suite, images_per_prompt) for suite in self.suites]
        metrics: Metrics = {}
        for suite in judged:
            metrics |= suite.metrics()
        metrics |= domain_means(judged) | self._watched_means(judged)
        if self.kl_images:
            metrics |= self._divergences(module)
        if any("trained" in suite.verdicts for suite in judged):
            metrics[ALARM] = float(self._watch(module, judged))
        self.last, self.last_scored = metrics, module.rollouts
        for logger in module.trainer.loggers:
            logger.log_metrics(metrics, step=module.rollouts)
        return metrics

    def _judge(self, module: PolicyModule, suite: Suite, images_per_prompt: int) -> JudgedSuite:
        rewards, prompts = self._rewards(module, suite), self.prompts[suite.name]
        return judge_suite(module, suite, prompts, rewards, images_per_prompt, self.batch_size)

    def _rewards(self, module: PolicyModule, suite: Suite) -> dict[str, Reward]:
        """All that judge a suite: its own, those that are watched, and the one trained on."""
        rewards = {OWN: scorer_of(module, suite.reward, f"suite {suite.name}")}
        if self.watched is None or suite.domain == "shift":
            return rewards
        rewards |= {f"watched/{name}": reward for name, reward in self.watched.items()}
        trained = getattr(module, "reward", None)
        if suite.domain == "id" and isinstance(trained, Reward) and not _validates(module):
            rewards["trained"] = trained
        return rewards

    def _watched_means(self, judged: Sequence[JudgedSuite]) -> Metrics:
        return {
            f"val/watched/{domain}/{name}": domain_mean(judged, domain, f"watched/{name}")
            for domain in domains_of(self.suites)
            for name in self.watched or {}
        }

    def _watch(self, module: PolicyModule, judged: Sequence[JudgedSuite]) -> bool:
        """Whether the alarm is on, with a warning that names what fell."""
        if module.rollouts == 0:
            self.course = None  # a run that was interrupted before its first update starts over
        copies = min(self.images_per_prompt, self.final_images_per_prompt)  # those that all have
        domains = domains_of(self.suites)
        watched = {
            f"val/watched/{place}/{name}": domain_verdicts(judged, place, copies, f"watched/{name}")
            for place in domains
            for name in self.watched or {}
        }
        if "ood" in domains:
            watched["val/ood/mean"] = domain_verdicts(judged, "ood", copies)
        trained = domain_verdicts(judged, "id", copies, "trained")
        self.course, names = watch_hacking(self.course, trained, watched)
        if names:
            rank_zero_warn(
                f"reward hacking at update {module.rollouts}? The trained reward has risen on the "
                f"in-domain suites, while {', '.join(names)} fell; look at the pictures, and go "
                "back to an earlier checkpoint, train for less long, or raise kl_coef"
            )
        return bool(names)

    def _divergences(self, module: PolicyModule) -> Metrics:
        suites = [suite for suite in self.suites if suite.domain != "shift"]
        values = [self._divergence(module, self.prompts[suite.name]) for suite in suites]
        return {"val/kl_to_base": sum(values) / len(values)} if values else {}

    def _divergence(self, module: PolicyModule, prompts: list[Prompt]) -> float:
        """KL(policy || start) of the sampled distribution, mean per token, along some images."""
        spread = prompts[:: max(1, len(prompts) // self.kl_images)][: self.kl_images]
        total = 0.0
        for start in range(0, len(spread), self.batch_size):
            part = spread[start : start + self.batch_size]
            tokens, _ = module.draw(part, 1, "evaluation")
            now = _sampled_distribution(module, module.policy, part, tokens)
            with module.start_weights() as base:
                then = _sampled_distribution(module, base, part, tokens)
            total += (now.exp() * (now - then)).sum(-1).mean(1).sum().item()
        return total / len(spread)


def format_table(first: Metrics, last: Metrics) -> str:
    """Scores at the start and at the end, one line per category.

    A part that is the suite's mean under another name, at both times, has no line.
    """
    lines = (
        [f"{'':44s}{'start':>8s}{'end':>8s}{'change':>9s}"] if first else [f"{'':44s}{'score':>8s}"]
    )
    for name, value in last.items():
        suite, is_part, _ = name.rpartition("/parts/")
        if is_part and all(m.get(name) == m.get(f"{suite}/mean") for m in (first, last)):
            continue
        label = name.removeprefix("val/")
        if first:
            start = first.get(name, float("nan"))
            lines.append(f"{label:44s}{start:8.3f}{value:8.3f}{value - start:+9.3f}")
        else:
            lines.append(f"{label:44s}{value:8.3f}")
    return "\n".join(lines)


def _sampled_distribution(
    module: PolicyModule, policy: Policy, prompts: Sequence[Prompt], tokens: Tensor
) -> Tensor:
    """Log-probabilities of the whole codebook, [B, T, V], as they were sampled from."""
    with module.precision():
        logits = forced_logits(
            policy, [p.drawn_text for p in prompts], tokens, guidance=module.guidance, mode="guided"
        )
    return (logits.float() / module.temperature).log_softmax(-1)


def _check_watched(watched: Mapping[str, Reward]) -> None:
    unusable = [name for name in watched if not name or "/" in name]
    if unusable:
        raise ValueError(
            f"expected names of watched rewards without '/', which parts the names of metrics, got "
            f"{unusable}; rename them"
        )


def _check_shares(suite: Suite, num_prompts: int, num_processes: int) -> None:
    if num_prompts < num_processes:
        raise ValueError(
            f"suite {suite.name}: expected a prompt or more for each of {num_processes} processes, "
            f"got {num_prompts}; add prompts, or train on fewer devices"
        )


def _validates(module: PolicyModule) -> bool:
    """Whether a checkpoint is scored, which has no course to watch."""
    return module.trainer.state.fn == "validate"
