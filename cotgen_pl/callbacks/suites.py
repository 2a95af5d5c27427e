"""Suites of held-out prompts: drawn, judged by several rewards at once, and put into means.

Apart from `evaluation.py`, which says when this happens and what is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from cotgen_pl.callbacks.verdicts import JudgedBatch, VerdictStore, as_plain
from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.files import write_whole
from cotgen_pl.interfaces import Policy, Prompt, Reward, Scores, check_positive, check_scores
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.monitors import Verdicts, diversity
from cotgen_pl.pixels import to_pillow
from cotgen_pl.sampling import forced_logits
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


@dataclass
class Gallery:
    """Keeps the first picture of some of a suite's prompts, as `<place in the suite>.png`."""

    folder: Path
    prompts: list[Prompt]

    def keep(self, prompts: Sequence[Prompt], images: Tensor) -> None:
        """Write those of P prompts that are wanted.

        Args:
            prompts: P.
            images: [P, 3, H, W] in [0, 1], the first of each.
        """
        wanted = {prompt.index for prompt in self.prompts}
        for prompt, picture in zip(prompts, to_pillow(images), strict=True):
            if prompt.index in wanted:
                path = self.folder / f"{prompt.index}.png"
                write_whole(path, partial(picture.save, format="PNG"))


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


def judge_suite(
    module: PolicyModule,
    suite: Suite,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    copies: int,
    batch_size: int,
    store: VerdictStore | None = None,
    gallery: Gallery | None = None,
) -> JudgedSuite:
    """Draw `copies` pictures of each prompt and ask each reward; each process has its share.

    Args:
        module: Whose policy draws.
        suite: What the prompts are of.
        prompts: P, numbered.
        rewards: The suite's own under `own`, and others.
        copies: G.
        batch_size: Images drawn at a time, on each process.
        store: Where verdicts are kept until the evaluation is finished. What is in it is not drawn
            again.
        gallery: Keeps some pictures.
    """
    done = _take_up(module, store) if store else []
    finished = {index for batch in done for index in batch.prompts}
    rest = [prompt for prompt in prompts if prompt.index not in finished]
    own = rest[module.global_rank :: module.trainer.world_size]
    batches = done if module.global_rank == 0 else []
    drawn = []
    with module.gathered(), _progress(module, suite, copies * len(own)) as bar:
        for part in _split(own, max(1, batch_size // copies)):
            drawn.append(_judge_batch(module, suite, part, rewards, copies, gallery))
            if store:
                store.append(drawn[-1])
            bar.update(len(part) * copies)
    pattern = [*drawn, *done][0]  # of parts; a process may have none left to draw
    judged = _join(module, suite, prompts, [*batches, *drawn], pattern)
    judged.names = {c: rewards[OWN].metric_name(c) for c in judged.categories}
    return judged


def _take_up(module: PolicyModule, store: VerdictStore) -> list[JudgedBatch]:
    """What an interrupted evaluation has left, on each process the same."""
    suite, done = store.variant["suite"], store.read()
    for path, differing in store.others().items():
        rank_zero_info(
            f"suite {suite}: {path} is of an unfinished evaluation with other "
            f"{', '.join(differing)}; this one begins anew, remove that file if you do not go on "
            "with that one"
        )
    number = sum(len(batch.prompts) for batch in done)
    if number:
        rank_zero_info(f"suite {suite}: {number} prompts were judged before an interruption")
    module.trainer.strategy.barrier("verdicts are read")
    return done


def _progress(module: PolicyModule, suite: Suite, images: int) -> Any:
    """A bar with time left, on the first process and where the trainer shows one too."""
    shows = module.trainer.progress_bar_callback is not None and module.global_rank == 0
    return tqdm(total=images, desc=f"suite {suite.name}", disable=not shows, leave=False)


def _judge_batch(
    module: PolicyModule,
    suite: Suite,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    copies: int,
    gallery: Gallery | None,
) -> JudgedBatch:
    """Draw and ask; rewards that draw have a random state that belongs to the batch."""
    tokens, _ = module.draw(prompts, copies, "evaluation")
    images = module.policy.decode(tokens)
    if gallery is not None:
        gallery.keep(prompts, images[::copies])
    with module.own_random_state("evaluation", suite.name, prompts[0].index):
        scores = ask_each(rewards, images, [p for p in prompts for _ in range(copies)])
    variety = (
        diversity(images, copies) if copies > 1 else images.new_full((len(prompts),), torch.nan)
    )
    verdicts = {
        name: {
            part: values.cpu().double().view(-1, copies)
            for part, values in {"total": given.total, **given.parts}.items()
        }
        for name, given in scores.items()
    }
    told, starts = scores[OWN].details, range(0, len(images), copies)
    details = None if told is None else [as_plain(told[at : at + copies]) for at in starts]
    indices = [prompt.index for prompt in prompts]
    return JudgedBatch(indices, verdicts, variety.cpu().double(), details)


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


def _join(
    module: PolicyModule,
    suite: Suite,
    prompts: Sequence[Prompt],
    batches: Sequence[JudgedBatch],
    pattern: JudgedBatch,
) -> JudgedSuite:
    """The verdicts of all processes in the prompts' order, from the batches that each gives."""
    places = {prompt.index: row for row, prompt in enumerate(prompts)}
    rows = [places[index] for batch in batches for index in batch.prompts]

    def join(own: list[Tensor], like: Tensor) -> Tensor:
        whole = torch.zeros(len(prompts), *like.shape[1:], dtype=torch.float64)
        whole[rows] = torch.cat(own) if own else whole[rows]
        return module.sum_over_processes(whole).cpu()

    verdicts = {
        name: {
            part: join([batch.verdicts[name][part] for batch in batches], like)
            for part, like in parts.items()
        }
        for name, parts in pattern.verdicts.items()
    }
    variety = join([batch.diversity for batch in batches], pattern.diversity)
    return JudgedSuite(suite, list(prompts), verdicts, variety)


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


# How far the policy has moved -------------------------------------------------------------------


def divergence(
    module: PolicyModule, prompts: Sequence[Prompt], num_images: int, batch_size: int
) -> float:
    """KL(policy || start) of the sampled distribution, mean per token, along some images.

    Args:
        module: Whose policy draws.
        prompts: Of a suite.
        num_images: Images at most, one each of prompts that are spread over all of them.
        batch_size: Images drawn at a time.
    """
    spread = prompts[:: max(1, len(prompts) // num_images)][:num_images]
    total = 0.0
    for part in _split(spread, batch_size):
        tokens, _ = module.draw(part, 1, "evaluation")
        now = _sampled_distribution(module, module.policy, part, tokens)
        with module.start_weights() as base:
            then = _sampled_distribution(module, base, part, tokens)
        total += (now.exp() * (now - then)).sum(-1).mean(1).sum().item()
    return total / len(spread)


def _sampled_distribution(
    module: PolicyModule, policy: Policy, prompts: Sequence[Prompt], tokens: Tensor
) -> Tensor:
    """Log-probabilities of the whole codebook, [B, T, V], as they were sampled from."""
    with module.precision():
        logits = forced_logits(
            policy, [p.drawn_text for p in prompts], tokens, guidance=module.guidance, mode="guided"
        )
    return (logits.float() / module.temperature).log_softmax(-1)
