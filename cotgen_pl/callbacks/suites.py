"""Suites of held-out prompts: drawn, judged by several rewards at once, and put into means.

Apart from `evaluation.py`, which says when this happens and what is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt, Reward, Scores, check_scores
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.monitors import Verdicts, diversity
from cotgen_pl.scoring import ask

Metrics = dict[str, float]
OWN = "own"  # the suite's own reward among those that judge it
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


@dataclass
class JudgedSuite:
    """What rewards say of G pictures of each of a suite's P prompts, over all processes."""

    suite: Suite
    categories: list[str]
    """[P], one per prompt."""
    verdicts: dict[str, dict[str, Tensor]]
    """By reward, `own` among them, its `total` and its parts, [P, G] float64 each."""
    diversity: Tensor
    """[P] float64, of each prompt's pictures; NaN for one picture."""

    @property
    def domain(self) -> str:
        """The suite's."""
        return self.suite.domain

    def mean(self, values: Tensor) -> float:
        """The mean over categories of values [P, ...]."""
        means = self.category_means(values)
        return sum(means.values()) / len(means)

    def category_means(self, values: Tensor) -> Metrics:
        """The mean over each category's values [P, ...] but NaN; NaN where there are none."""
        means: Metrics = {}
        for category in dict.fromkeys(self.categories):
            rows = torch.tensor([category == other for other in self.categories])
            means[category or UNNAMED] = values[rows].nanmean().item()
        return means

    def weights(self) -> Tensor:
        """[P], of each prompt's values in `mean`."""
        numbers = torch.tensor([self.categories.count(name) for name in self.categories])
        return 1.0 / numbers.double() / len(set(self.categories))

    def metrics(self) -> Metrics:
        """The suite's own scores and variety, by their logged names."""
        prefix, own = f"val/{self.domain}/{self.suite.name}", self.verdicts[OWN]
        total = self.category_means(own["total"])
        metrics = {f"{prefix}/{name}": mean for name, mean in total.items()}
        metrics[f"{prefix}/mean"] = self.mean(own["total"])
        if len(own) > 2:  # a single scorer's only part is its total
            for name, values in own.items():
                if name != "total":
                    metrics[f"{prefix}/parts/{name}"] = self.mean(values)
        if own["total"].shape[1] > 1:
            metrics[f"{prefix}/diversity"] = self.mean(self.diversity)
        return metrics


def read_suite(suite: Suite) -> list[Prompt]:
    """A suite's prompts, numbered."""
    prompts = [prompt for file in suite.files for prompt in read_prompts(file)]
    for index, prompt in enumerate(prompts):
        prompt.index, prompt.suite = index, suite.name
    return prompts


def judge_suite(
    module: PolicyModule,
    suite: Suite,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    copies: int,
    batch_size: int,
) -> JudgedSuite:
    """Draw `copies` pictures of each prompt and ask each reward; each process has its share.

    Args:
        module: Whose policy draws.
        suite: What the prompts are of.
        prompts: P, numbered.
        rewards: The suite's own under `own`, and others.
        copies: G.
        batch_size: Images drawn at a time, on each process.
    """
    number = len(prompts)
    batches: list[dict[str, Scores]] = []
    varieties = []
    for part in _split(_share(module, prompts), max(1, batch_size // copies)):
        tokens, _ = module.draw(part, copies, "evaluation")
        images = module.policy.decode(tokens)
        batches.append(ask_each(rewards, images, [p for p in part for _ in range(copies)]))
        varieties.append(
            diversity(images, copies) if copies > 1 else images.new_full((len(part),), torch.nan)
        )
    verdicts = {}
    for name in rewards:
        scores = Scores.join([batch[name] for batch in batches])
        verdicts[name] = {
            part: _join_processes(module, values.view(-1, copies), number)
            for part, values in {"total": scores.total, **scores.parts}.items()
        }
    categories = [prompt.category for prompt in prompts]
    variety = _join_processes(module, torch.cat(varieties), number)
    return JudgedSuite(suite, categories, verdicts, variety)


def _share(module: PolicyModule, rows: Any) -> Any:
    """This process's rows of a list or tensor over all prompts."""
    return rows[module.global_rank :: module.trainer.world_size]


def _split(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def ask_each(
    rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[Prompt]
) -> dict[str, Scores]:
    """The verdict of each reward, by its name; one under several names is asked once."""
    verdicts: dict[int, Scores] = {}
    for reward in rewards.values():
        if id(reward) not in verdicts:
            scores = ask(reward, images, prompts)
            check_scores(scores, len(images), reward.name, most_missing=None)
            verdicts[id(reward)] = scores
    return {name: verdicts[id(reward)] for name, reward in rewards.items()}


def _join_processes(module: PolicyModule, own: Tensor, number: int) -> Tensor:
    """[number, ...] float64 on the CPU, in the prompts' order, from each process's share."""
    whole = torch.zeros(number, *own.shape[1:], dtype=torch.float64, device=module.device)
    _share(module, whole)[:] = own.double().to(module.device)
    return module.sum_over_processes(whole).cpu()


def domains_of(suites: Sequence[Suite]) -> list[str]:
    """The domains that have means of their own: in and out of domain, where there are suites."""
    present = {suite.domain for suite in suites}
    return [domain for domain in ("id", "ood") if domain in present]


def domain_mean(suites: Sequence[JudgedSuite], domain: str, reward: str = OWN) -> float:
    """What a reward says of a domain that has suites: the mean over suites of each one's."""
    values = [one.mean(one.verdicts[reward]["total"]) for one in suites if one.domain == domain]
    return sum(values) / len(values)


def domain_means(suites: Sequence[JudgedSuite]) -> Metrics:
    """`val/<domain>/mean`, and their gap."""
    domains = domains_of([judged.suite for judged in suites])
    means = {f"val/{domain}/mean": domain_mean(suites, domain) for domain in domains}
    if len(means) == 2:
        means["val/gap"] = means["val/id/mean"] - means["val/ood/mean"]
    return means


def domain_verdicts(
    suites: Sequence[JudgedSuite], domain: str, copies: int, reward: str = OWN
) -> Verdicts:
    """The scores that `domain_mean` is the mean of, of the first `copies` pictures per prompt."""
    kept = [suite for suite in suites if suite.domain == domain]
    values = [suite.verdicts[reward]["total"][:, :copies] for suite in kept]
    weights = [suite.weights() / len(kept) for suite in kept]
    return Verdicts(torch.cat(values), torch.cat(weights))
