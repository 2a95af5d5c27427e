"""The records and the two interfaces that everything else meets through.

Legend for shapes, used in every docstring of the package: B images in a batch, P distinct prompts,
G images per prompt (B = P * G, the G images of one prompt stand side by side), T image tokens per
image, V image codebook size, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Prompt:
    """One text to draw. Not frozen: Lightning moves batches between devices field by field."""

    text: str
    """What rewards see."""
    suite: str = "train"
    """The set it belongs to: `train`, or the name of a benchmark."""
    category: str = ""
    """The skill that it tests; scores are averaged per category."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Ground truth for rule-based scorers: objects, counts, relations."""
    generation_text: str = ""
    """What the policy sees, when that is a rewritten or reasoned form of `text`; empty means
    `text`."""
    index: int = 0
    """Its place in its data set; a part of the key of its noise."""
    occurrence: int = 0
    """How often the data set has been passed before this draw; a part of the key of its noise."""

    @property
    def drawn_text(self) -> str:
        """The text that the policy is conditioned on."""
        return self.generation_text or self.text


@dataclass
class Scores:
    """A reward's verdict on B images."""

    total: Tensor
    """[B] float32, higher is better; NaN means no verdict."""
    parts: dict[str, Tensor]
    """Named terms, [B] float32 each; a single scorer has one part, itself."""
    weights: dict[str, float]
    """Weight of each part in the total; 0 for parts that are only watched."""
    details: list[dict[str, Any]] | None = None
    """Per image, what to look at: failed clauses, boxes, text answered."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each reward took, by its name."""

    @classmethod
    def single(
        cls, name: str, values: Tensor, details: list[dict[str, Any]] | None = None
    ) -> Scores:
        """The verdict of a scorer whose only part is itself."""
        values = values.float()
        return cls(values, {name: values}, {name: 1.0}, details)

    @classmethod
    def join(cls, batches: Sequence[Scores]) -> Scores:
        """The verdicts of one reward on consecutive batches, as one; times are not kept.

        Raises:
            ValueError: The batches have other parts.
        """
        first = batches[0]
        for batch in batches:
            if batch.parts.keys() != first.parts.keys():
                raise ValueError(
                    f"expected the same parts of a reward in each batch, got {sorted(first.parts)} "
                    f"and {sorted(batch.parts)}; let it give NaN where a part has no verdict"
                )
        details = None
        if first.details is not None:
            details = [entry for batch in batches for entry in batch.details or []]
        parts = {name: torch.cat([batch.parts[name] for batch in batches]) for name in first.parts}
        total = torch.cat([batch.total for batch in batches])
        return cls(total, parts, first.weights, details)

    def replace(self, rows: Tensor, other: Scores) -> None:
        """Put the totals and parts of other images, [len(rows)] each, in the place of some."""
        self.total[rows] = other.total
        for name, values in other.parts.items():
            self.parts[name][rows] = values

    def to(self, device: torch.device) -> Scores:
        """The same verdicts, float32, on another device."""
        parts = {name: values.to(device).float() for name, values in self.parts.items()}
        total = self.total.to(device).float()
        return Scores(total, parts, self.weights, self.details, self.seconds)


@dataclass
class Rollout:
    """All that one policy update needs. Images of one prompt are adjacent."""

    prompts: list[Prompt]
    """One per image."""
    tokens: Tensor
    """[B, T] int64."""
    logprobs: Tensor
    """[B, T] float32, of the sampled tokens under the distribution that they were drawn from."""
    rewards: dict[str, Tensor]
    """Each part's scores, [B] float32."""
    advantages: Tensor
    """[B] float32."""
    weights: Tensor
    """[B] float32, 1 for images that are trained on and 0 for those of masked groups."""
    old_logprobs: Tensor | None = None
    """[B, T] float32, by teacher forcing before the first update; absent when there is one update
    only."""
    reference_logprobs: Tensor | None = None
    """[B, T] float32; absent when the KL coefficient is 0."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def split(self, size: int) -> Iterator[Rollout]:
        """Yield consecutive parts of at most `size` images."""
        for start in range(0, len(self), size):
            yield self._part(slice(start, start + size))

    def _part(self, part: slice) -> Rollout:
        cut: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, dict):
                cut[entry.name] = {name: scores[part] for name, scores in value.items()}
            else:
                cut[entry.name] = None if value is None else value[part]
        return Rollout(**cut)


@dataclass
class PreferencePair:
    """B pairs of pictures, the two of a pair drawn for one prompt."""

    prompts: list[Prompt]
    """One per pair."""
    chosen: Tensor
    """[B, T] int64, tokens of the better pictures."""
    rejected: Tensor
    """[B, T] int64, tokens of the worse ones."""
    scores: Tensor
    """[B, 2] float32, of chosen and rejected; higher is better."""
    rows: Tensor
    """[B] int64, each pair's place in its set."""

    def __len__(self) -> int:
        return self.chosen.shape[0]


class Policy(nn.Module, ABC):
    """An autoregressive image generator: prompts to image tokens, and tokens to log-probabilities.

    Constructing one is cheap and checks its arguments; `load` reads the weights. Prompts are
    strings here.
    """

    num_tokens: int
    """T, image tokens per image."""
    codebook_size: int
    """V, image codes."""
    merges_exactly: bool = True
    """Whether adapters merge into the weights without loss; quantised weights do not take them."""

    @abstractmethod
    def load(self, *, empty: bool = False) -> Policy:
        """Read the weights and decide what trains; a second call does nothing. Returns self.

        Args:
            empty: Make room for all weights without reading any; another process sends them.
        """

    def describe(self) -> dict[str, Any]:
        """What was found out rather than configured, for the run folder: JSON values."""
        return {}

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a ValueError for a text that cannot be drawn, before weights load."""
        return

    @abstractmethod
    def prefill(
        self, prompts: Sequence[str], *, guided: bool, copies: int = 1
    ) -> tuple[Tensor, Any]:
        """Read P prompts, each distinct one once, and make room for `copies` images of each.

        Returns:
            Logits of the first token, [R, V], and a cache for `step`. R = P * copies, in the order
            prompt 0 copy 0, prompt 0 copy 1, ...; when guided, the same number of unconditional
            rows follows (2R).
        """

    @abstractmethod
    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        """Append one token to each image and give the next logits, in the row order of `prefill`.

        Args:
            tokens: [B] int64; an image's unconditional row gets its token too.
            cache: From `prefill`; advanced in place.
        """

    @abstractmethod
    def logits(
        self, prompts: Sequence[str], tokens: Tensor, unconditional: bool | Tensor = False
    ) -> Tensor:
        """Logits of every token by teacher forcing, with gradient.

        Args:
            prompts: B texts.
            tokens: [B, T] int64.
            unconditional: Drop the condition, for all images or for those marked in a [B] bool
                tensor.

        Returns:
            [B, T, V]: row t predicts token t.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Draw tokens [B, T] as pictures [B, 3, H, W], float32 in [0, 1]."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Read pictures [B, 3, H, W] in [0, 1] as tokens [B, T]."""

    def prepare(self, pictures: Sequence[Image]) -> Tensor:
        """Bring pictures of any size to what `encode` reads, [B, 3, H, W] float32 in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} takes no pictures of another size")

    def answer(
        self, pictures: Sequence[Image], questions: Sequence[str], max_tokens: int
    ) -> list[str]:
        """Greedy answers to questions about pictures, of at most `max_tokens` tokens each."""
        raise NotImplementedError(f"{type(self).__name__} answers no questions about pictures")

    @abstractmethod
    def reference(self) -> Policy:
        """A frozen twin with the weights of now; under LoRA, the same weights with adapters off."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The layers that are sharded and gathered one by one."""

    @abstractmethod
    def export(self, folder: Path, *, merge_adapters: bool = True) -> None:
        """Write the policy in its own library's format; adapters merged, or apart for peft."""


class Reward(nn.Module, ABC):
    """Anything that scores pictures: a training reward, a benchmark, a pair labeller, a selector.

    A class and not a call-only protocol, because the command line reads the latter as a plain
    callable. Constructing one is cheap and checks its arguments; `load` reads the weights.
    """

    name: str
    """Under which its time, and a single score, are logged; its class's unless it has its own."""
    required_facts: tuple[str, ...] = ()
    """Facts that each prompt must have; missing ones stop a run before any weights load."""
    device: str | None = None
    """Where it scores, like `cuda:1`, or `remote`; None means on the device of the pictures."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.name = vars(cls).get("name", cls.__name__)

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError for a prompt that it cannot judge by, before weights load."""
        return

    def metric_name(self, category: str) -> str:
        """What its score of a category is called: with what makes it another metric, if it is."""
        return category

    def load(self) -> Reward:
        """Read the weights, if there are any; a second call does nothing. Returns self."""
        return self

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score pictures [B, 3, H, W], float32 in [0, 1], against B prompts, each its own."""


def freeze(module: nn.Module) -> nn.Module:
    """Put a module into evaluation mode without gradients."""
    module.eval()
    return module.requires_grad_(False)


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise a ValueError unless a setting is one of a Literal's choices."""
    if value not in get_args(choices):
        raise ValueError(f"expected {name} to be one of {get_args(choices)}, got {value!r}")


def check_positive(**values: int | None) -> None:
    """Raise a ValueError that names the first setting below 1; absent ones (None) pass.

    >>> check_positive(batch_size=0)
    Traceback (most recent call last):
    ValueError: expected batch_size of 1 or more, got 0; raise it, or leave it out for its default
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(
                f"expected {name} of 1 or more, got {value}; raise it, or leave it out for its "
                "default"
            )


def check_share(**values: float) -> None:
    """Raise a ValueError that names the first setting outside 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"expected {name} from 0 to 1, a share, got {value}; set it so")


def check_scores(
    scores: Scores, num_images: int, name: str, *, most_missing: float | None = 1.0
) -> None:
    """Raise a ValueError unless a reward's verdict fits the images and says something.

    Args:
        scores: The verdict.
        num_images: B.
        name: The reward's name, for the message.
        most_missing: Largest share of images that may lack a verdict (NaN); all of them never may.
            None accepts any share.
    """
    if not isinstance(scores, Scores):
        raise ValueError(
            f"reward {name}: expected Scores, got {type(scores).__name__}; return "
            "Scores.single(name, values) from its score()"
        )
    for part, values in {"total": scores.total, **scores.parts}.items():
        if values.shape != (num_images,):
            raise ValueError(
                f"reward {name}: expected {part} of shape ({num_images},), one score per image, "
                f"got {tuple(values.shape)}; return Scores with one float per image"
            )
        if torch.isinf(values).any():
            raise ValueError(
                f"reward {name}: expected finite scores or NaN for no verdict, got "
                f"{values[torch.isinf(values)][0].item()} in {part}; look for a division by 0 or "
                "a logarithm of 0 in the scorer"
            )
    if most_missing is not None:
        _check_missing(scores.total, name, most_missing)


def _check_missing(total: Tensor, name: str, most_missing: float) -> None:
    missing = total.isnan()
    if missing.all():
        raise ValueError(
            f"reward {name}: expected scores, got NaN (no verdict) for all {len(total)} images; "
            "look at the scorer's own output for these prompts before resuming"
        )
    if missing.float().mean() > most_missing:
        raise ValueError(
            f"reward {name}: expected a share of at most {most_missing} of the images without "
            f"verdict, got {int(missing.sum())} of {len(total)}; look at the scorer's own output, "
            "or raise most_missing"
        )
