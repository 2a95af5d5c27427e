"""Several rewards as one: a weighted sum whose parts stay visible.

T2I-R1 (https://arxiv.org/abs/2505.00703) adds its rewards as they are, with weight 1; so does the
default here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Reward, Scores, check_scores
from cotgen_pl.scoring import ask


def standardise_scores(values: Tensor) -> Tensor:
    """Shift and scale scores to mean 0 and deviation 1; [B] to [B] float32.

    (x - mean) / std over the verdicts, with the population's deviation. NaN is left out and stays
    NaN; verdicts that are all equal, or only one, become 0.

    >>> standardise_scores(torch.tensor([1.0, 3.0, float("nan")]))
    tensor([-1.,  1., nan])
    """
    given = values.double()[~values.isnan()]  # float64, so that close scores keep their distances
    # Compared exactly: equal numbers can have a rounding error for a deviation.
    if len(given) == 0 or bool(given.max() == given.min()):
        return values.float() * 0.0
    return ((values.double() - given.mean()) / given.std(correction=0)).float()


class Ensemble(Reward):
    """A weighted sum of named rewards.

    Each reward gives one part, its total, under its own name. A reward with several parts shows
    those as well, as "name/part" with weight 0. Parts are always the rewards' own numbers; with
    `standardise` the total is the weighted sum of the standardised ones. An image that lacks a
    verdict on any part with a weight has no verdict.
    """

    name = "ensemble"

    def __init__(
        self,
        rewards: dict[str, Reward],
        weights: dict[str, float] | None = None,
        standardise: bool = False,
    ) -> None:
        """Check the arguments; nothing is read yet.

        Args:
            rewards: By name; names are the user's own and appear in the logs.
            weights: By the same names, 1 each by default; 0 watches a reward without adding it.
            standardise: Bring each part to mean 0 and deviation 1 over the images of one call
                before adding, so that a reward that spreads over 0.02 counts as much as one that
                spreads over 1. Totals of different calls are then not comparable: for training,
                not for evaluation.
        """
        super().__init__()
        weights = dict.fromkeys(rewards, 1.0) if weights is None else weights
        _check_names(rewards, weights)
        self.rewards = dict(rewards)
        self.weights = {name: float(weights[name]) for name in rewards}
        self.standardise = standardise
        self.members = nn.ModuleList(rewards.values())  # a ModuleDict would refuse names with a dot
        facts = [fact for reward in rewards.values() for fact in reward.required_facts]
        self.required_facts = tuple(dict.fromkeys(facts))

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError for a prompt that one of the rewards cannot judge by."""
        for reward in self.rewards.values():
            reward.check_prompt(prompt)

    def metric_name(self, category: str) -> str:
        """The category, or what rewards with a weight call their own score of it instead."""
        names = [
            reward.metric_name(category)
            for name, reward in self.rewards.items()
            if self.weights[name] != 0
        ]
        return "+".join(dict.fromkeys(n for n in names if n != category)) or category

    def load(self) -> Ensemble:
        """Read the weights of every reward; a second call does nothing."""
        for reward in self.rewards.values():
            reward.load()
        return self

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score pictures [B, 3, H, W] in [0, 1]; results lie on the device of `images`."""
        verdicts = self._ask_all(images, prompts)
        total = torch.zeros(len(images), dtype=torch.float32, device=images.device)
        parts: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for name, verdict in verdicts.items():
            check_scores(verdict, len(images), name, most_missing=None)
            inner = verdict.parts if len(verdict.parts) > 1 else {}
            shown = {name: verdict.total, **{f"{name}/{part}": inner[part] for part in inner}}
            parts |= {part: values.float().to(images.device) for part, values in shown.items()}
            weights |= dict.fromkeys(shown, 0.0) | {name: self.weights[name]}
            if self.weights[name] != 0:  # 0 * NaN would be NaN
                total = total + self.weights[name] * self._term(parts[name])
        seconds = {name: sum(verdicts[name].seconds.values()) for name in verdicts}
        return Scores(total, parts, weights, _join_details(verdicts, len(images)), seconds)

    def _ask_all(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Scores]:
        """Every member's verdict: one after another on one device, several devices at a time.

        Each remote one is a place of its own.
        """
        places: dict[str, list[str]] = {}
        for name, reward in self.rewards.items():
            place = _place(reward.device, images.device)
            places.setdefault(f"{place} {name}" if place == "remote" else place, []).append(name)

        def ask_some(names: list[str]) -> dict[str, Scores]:
            return {name: ask(self.rewards[name], images, prompts) for name in names}

        if len(places) == 1:
            verdicts = ask_some(list(self.rewards))
        else:
            self.load()  # one after another: reading sets the whole process's default dtype
            with ThreadPoolExecutor(len(places)) as pool:
                groups = list(pool.map(ask_some, places.values()))
            verdicts = {name: verdict for group in groups for name, verdict in group.items()}
        return {name: verdicts[name] for name in self.rewards}

    def _term(self, values: Tensor) -> Tensor:
        return standardise_scores(values) if self.standardise else values


def _place(device: str | None, pictures: torch.device) -> str:
    """Where a reward scores, by the one name that each place has; `cuda` is not yet one.

    >>> _place("cuda", torch.device("cuda:1")), _place(None, torch.device("cpu"))
    ('cuda:1', 'cpu')
    """
    if device is None or (device == "cuda" and pictures.type == "cuda"):
        return str(pictures)
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def _check_names(rewards: dict[str, Reward], weights: dict[str, float]) -> None:
    if not rewards:
        raise ValueError(
            "ensemble: expected at least one reward, got none; name some under rewards"
        )
    slashed = [name for name in rewards if "/" in name]
    if slashed:
        raise ValueError(
            "ensemble: expected names without '/', which separates a reward from its parts, got "
            f"{slashed}; rename them"
        )
    if set(weights) != set(rewards):
        raise ValueError(
            f"ensemble: expected one weight for each of {sorted(rewards)}, got weights for "
            f"{sorted(weights)}; give both the same names (weight 0 only watches)"
        )
    if not any(weights.values()):
        raise ValueError(
            f"ensemble: expected a weight other than 0, got {weights}; the total would be 0 for "
            "every image, so give the reward to train on a weight"
        )


def _join_details(verdicts: dict[str, Scores], num_images: int) -> list[dict[str, object]] | None:
    """Per image, each reward's own details under its name; None if no reward has any."""
    given = {name: verdict.details for name, verdict in verdicts.items() if verdict.details}
    if not given:
        return None
    return [{name: details[i] for name, details in given.items()} for i in range(num_images)]
