"""Scores on held-out prompts, in domain and out of domain, before, during and after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cotgen_pl.callbacks.base import Observer
from cotgen_pl.data.prompts import PromptFile, check_scorable, read_prompts
from cotgen_pl.interfaces import Policy, Prompt, Reward, Scores, check_positive, freeze
from cotgen_pl.modules.base import PolicyModule, scorer_of
from cotgen_pl.sampling import forced_logits

Metrics = dict[str, float]
UNNAMED = "other"  # where prompts of no category are counted


@dataclass
class Suite:
    """Held-out prompts and the scorer that judges pictures of them."""

    name: str
    domain: Literal["id", "ood", "shift"]
    """In domain, out of domain, or a suite that moves one thing and enters no mean."""
    files: list[PromptFile]
    reward: Reward | None = None
    """Absent means the training reward."""


class SuiteEvaluation(Observer):
    """Draws the same prompts with the same noise each time, and logs how they score.

    Logged: `val/<domain>/<suite>/<category>` (mean over images), `val/<domain>/<suite>/mean` (over
    categories), `val/<domain>/<suite>/parts/<part>` for each watched part of the scorer (mean over
    categories), `val/id/mean` and `val/ood/mean` (over suites), `val/gap` (in domain less out of
    domain), and `val/kl_to_base`: the KL divergence of the sampled distribution to that of the
    start weights, exact over the codebook, along the images drawn, mean per token, in nats.

    Args:
        suites: What is scored.
        every_n_updates: Rollouts between two evaluations in training.
        images_per_prompt: Images of each prompt in the middle of a run.
        final_images_per_prompt: Images of each prompt at its start and end, and in `validate`.
        batch_size: Images drawn at a time, on each process.
        kl_images: Images of each in-domain and out-of-domain suite along which the divergence is
            taken; 0 leaves it out.
    """

    def __init__(
        self,
        suites: list[Suite],
        every_n_updates: int = 100,
        images_per_prompt: int = 2,
        final_images_per_prompt: int = 8,
        batch_size: int = 256,
        kl_images: int = 64,
    ) -> None:
        names = [suite.name for suite in suites]
        if not suites or len(set(names)) < len(names):
            raise ValueError(
                f"expected suites with names of their own, got {names}; name each once"
            )
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
        self.prompts = {suite.name: _read_suite(suite) for suite in suites}
        self.first: Metrics = {}
        self.last: Metrics = {}
        self.last_scored = -1
        """Rollouts before the last scores."""

    # When ---------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before weights load, prompts that cannot be drawn or lack a scorer's facts."""
        assert isinstance(pl_module, PolicyModule)
        for suite in self.suites:
            prompts = self.prompts[suite.name]
            check_scorable(prompts, _scorer(pl_module, suite))
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
        """The scores of the start and the last ones, for the table at the end of a resumed run."""
        return {"first": self.first, "last": self.last, "last_scored": self.last_scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the scores."""
        self.first, self.last = state_dict["first"], state_dict["last"]
        self.last_scored = state_dict["last_scored"]

    # What ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, module: PolicyModule, images_per_prompt: int) -> Metrics:
        """Score all suites, log the metrics and return them."""
        metrics: Metrics = {}
        divergences: list[float] = []
        for suite in self.suites:
            metrics |= self._score_suite(module, suite, images_per_prompt)
            if self.kl_images and suite.domain != "shift":
                divergences.append(self._divergence(module, self.prompts[suite.name]))
        metrics |= _domain_means(metrics, self.suites)
        if divergences:
            metrics["val/kl_to_base"] = sum(divergences) / len(divergences)
        self.last, self.last_scored = metrics, module.rollouts
        for logger in module.trainer.loggers:
            logger.log_metrics(metrics, step=module.rollouts)
        return metrics

    def _score_suite(self, module: PolicyModule, suite: Suite, images_per_prompt: int) -> Metrics:
        """Means per category; each process draws its share of the prompts."""
        prompts = self.prompts[suite.name]
        categories = list(dict.fromkeys(prompt.category for prompt in prompts))
        reward = _ready(_scorer(module, suite), module)
        sums: dict[str, Tensor] = {}
        for part in self._share(module, prompts, images_per_prompt):
            scores = _draw_and_score(module, reward, part, images_per_prompt)
            rows = torch.tensor(
                [
                    categories.index(prompt.category)
                    for prompt in part
                    for _ in range(images_per_prompt)
                ],
                device=module.device,
            )
            for name, values in {"total": scores.total, **scores.parts}.items():
                new = torch.zeros(2, len(categories), dtype=torch.float64, device=module.device)
                seen = ~values.isnan()
                new[0].index_add_(0, rows[seen], values[seen].double())
                new[1].index_add_(0, rows[seen], torch.ones_like(values[seen]).double())
                sums[name] = sums.get(name, 0) + new
        return _suite_metrics(
            suite, categories, {n: module.sum_over_processes(s) for n, s in sums.items()}
        )

    def _share(
        self, module: PolicyModule, prompts: list[Prompt], copies: int
    ) -> Iterator[list[Prompt]]:
        """This process's prompts, in batches."""
        own = prompts[module.global_rank :: module.trainer.world_size]
        size = max(1, self.batch_size // copies)
        for start in range(0, len(own), size):
            yield own[start : start + size]

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


def _read_suite(suite: Suite) -> list[Prompt]:
    prompts = [prompt for file in suite.files for prompt in read_prompts(file)]
    for index, prompt in enumerate(prompts):
        prompt.index, prompt.suite = index, suite.name
    return prompts


def _ready(reward: Reward, module: PolicyModule) -> Reward:
    """The scorer with its weights, frozen, on the policy's device: Lightning moves it nowhere."""
    freeze(reward.load()).to(module.device)
    return reward


def _scorer(module: PolicyModule, suite: Suite) -> Reward:
    return scorer_of(module, suite.reward, f"suite {suite.name}")


def _draw_and_score(
    module: PolicyModule, reward: Reward, prompts: list[Prompt], copies: int
) -> Scores:
    tokens, _ = module.draw(prompts, copies, "evaluation")
    images = module.policy.decode(tokens)
    with torch.autocast(images.device.type, enabled=False):
        return reward.score(images, [prompt for prompt in prompts for _ in range(copies)])


def _sampled_distribution(
    module: PolicyModule, policy: Policy, prompts: Sequence[Prompt], tokens: Tensor
) -> Tensor:
    """Log-probabilities of the whole codebook, [B, T, V], as they were sampled from."""
    with module.precision():
        logits = forced_logits(
            policy, [p.drawn_text for p in prompts], tokens, guidance=module.guidance, mode="guided"
        )
    return (logits.float() / module.temperature).log_softmax(-1)


def _suite_metrics(suite: Suite, categories: list[str], sums: dict[str, Tensor]) -> Metrics:
    """Names and means from sums and counts, [2, categories] for the total and each part."""
    prefix = f"val/{suite.domain}/{suite.name}"
    means = {name: (total / count).tolist() for name, (total, count) in sums.items()}
    named = [category or UNNAMED for category in categories]
    metrics = {f"{prefix}/{name}": mean for name, mean in zip(named, means["total"], strict=True)}
    metrics[f"{prefix}/mean"] = sum(means["total"]) / len(categories)
    if len(means) > 2:  # a single scorer's only part is its total
        for name, values in means.items():
            if name != "total":
                metrics[f"{prefix}/parts/{name}"] = sum(values) / len(categories)
    return metrics


def _domain_means(metrics: Metrics, suites: Sequence[Suite]) -> Metrics:
    means: Metrics = {}
    for domain in ("id", "ood"):
        values = [metrics[f"val/{domain}/{s.name}/mean"] for s in suites if s.domain == domain]
        if values:
            means[f"val/{domain}/mean"] = sum(values) / len(values)
    if len(means) == 2:
        means["val/gap"] = means["val/id/mean"] - means["val/ood/mean"]
    return means
