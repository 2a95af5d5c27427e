"""Suites of held-out prompts, and their verdicts put into means.

Apart from `judging.py`, which draws the pictures and asks the rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt, Reward, check_positive
from cotgen_pl.monitors import Verdicts

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
    images_per_prompt: int | None = None
    """Images of each prompt in the middle of a run; absent means the evaluation's."""
    final_images_per_prompt: int | None = None
    """Images of each prompt at a run's start and end, and in `validate`; likewise."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(
                f"expected a suite's name without '/', which parts the names of metrics and files, "
                f"got {self.name!r}; rename it"
            )
        check_positive(
            images_per_prompt=self.images_per_prompt,
            final_images_per_prompt=self.final_images_per_prompt,
        )


@dataclass
class JudgedSuite:
    """What rewards say of G pictures of each of a suite's P prompts, over all processes."""

    suite: Suite
    prompts: list[Prompt]
    """[P], with their places in the suite, which may have more."""
    verdicts: dict[str, dict[str, Tensor]]
    """By reward, `own` among them, its `total` and its parts, [P, G] float64 each."""
    diversity: Tensor
    """[P] float64, of each prompt's pictures; NaN for one picture."""
    names: dict[str, str] = field(default_factory=dict)
    """How the suite's own reward calls its score of a category, where not by the category."""

    @property
    def domain(self) -> str:
        """The suite's."""
        return self.suite.domain

    @property
    def categories(self) -> list[str]:
        """[P], one per prompt."""
        return [prompt.category for prompt in self.prompts]

    def name_of(self, category: str) -> str:
        """What the score of a category is logged as."""
        return self.names.get(category, category) or UNNAMED

    def part(self, prompts: Sequence[Prompt], copies: int | None = None) -> JudgedSuite:
        """The verdicts on some of the prompts, and on the first `copies` pictures of each."""
        wanted = {prompt.index for prompt in prompts}
        kept = torch.tensor([prompt.index in wanted for prompt in self.prompts])
        verdicts = {
            reward: {name: values[kept, :copies] for name, values in parts.items()}
            for reward, parts in self.verdicts.items()
        }
        variety = self.diversity[kept]
        return JudgedSuite(self.suite, list(prompts), verdicts, variety, self.names)

    def mean(self, values: Tensor) -> float:
        """The mean over categories of values [P, ...]."""
        means = self.category_means(values)
        return sum(means.values()) / len(means)

    def category_means(self, values: Tensor) -> Metrics:
        """The mean over each category's values [P, ...] but NaN; NaN where there are none."""
        means: Metrics = {}
        for category in dict.fromkeys(self.categories):
            rows = torch.tensor([category == other for other in self.categories])
            means[self.name_of(category)] = values[rows].nanmean().item()
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
                    # One that judges some categories alone has the mean over these.
                    means = [m for m in self.category_means(values).values() if not math.isnan(m)]
                    mean = sum(means) / len(means) if means else math.nan
                    metrics[f"{prefix}/parts/{name}"] = mean
        if own["total"].shape[1] > 1:
            metrics[f"{prefix}/diversity"] = self.mean(self.diversity)
        return metrics


def read_suite(suite: Suite) -> list[Prompt]:
    """A suite's prompts, numbered."""
    prompts = [prompt for file in suite.files for prompt in read_prompts(file)]
    for index, prompt in enumerate(prompts):
        prompt.index, prompt.suite = index, suite.name
    return prompts


def check_shares(suite: Suite, num_prompts: int, num_processes: int) -> None:
    """Raise a ValueError where a process would have no prompt."""
    if num_prompts < num_processes:
        raise ValueError(
            f"suite {suite.name}: expected a prompt or more for each of {num_processes} processes, "
            f"got {num_prompts}; add prompts, raise prompts_per_category, or take fewer devices"
        )


def sample_prompts(prompts: Sequence[Prompt], per_category: int | None) -> list[Prompt]:
    """At most k prompts of each category, the same each time; None keeps all.

    Of a category's n prompts they are those at places floor(n i / k), i = 0 ... k - 1, and so from
    all parts of its files. Their order and numbers stay, and with the numbers their noise.
    """
    if per_category is None:
        return list(prompts)
    if per_category == 0:
        return []
    kept: set[int] = set()
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        own = [prompt.index for prompt in prompts if prompt.category == category]
        number = min(per_category, len(own))
        kept |= {own[len(own) * place // number] for place in range(number)}
    return [prompt for prompt in prompts if prompt.index in kept]


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


def domain_verdicts(suites: Sequence[JudgedSuite], domain: str, reward: str = OWN) -> Verdicts:
    """The scores that `domain_mean` is the mean of; NaN where a suite has fewer per prompt."""
    kept = [suite for suite in suites if suite.domain == domain]
    totals = [suite.verdicts[reward]["total"] for suite in kept]
    width = max(values.shape[1] for values in totals)
    values = [pad(v, (0, width - v.shape[1]), value=torch.nan) for v in totals]
    weights = [suite.weights() / len(kept) for suite in kept]
    return Verdicts(torch.cat(values), torch.cat(weights))
