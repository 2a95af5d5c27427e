"""T2I-CompBench's scores of pictures, as far as they are rewards: color, shape and texture.

The metric is BLIP-VQA (https://arxiv.org/abs/2307.06350): the network of `perception.py` is asked
about each noun phrase of the prompt, and the answers are multiplied. What differs from the
authors' code (https://github.com/Karine-Huang/T2I-CompBench/tree/1b70949, BLIPvqa_eval):

* phrases come with the prompt; theirs are the noun chunks that spaCy 3.5.3 finds, and T2I-R1's
  `attr_nouns` are singular forms, "rubber glove" for "rubber gloves";
* pictures are resized as tensors, to within one step of 256 of Pillow's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.rewards.base import ModelReward
from cotgen_pl.rewards.perception import BlipVQA, find_converted

CATEGORIES = ("color", "shape", "texture")
MOST_PHRASES = 8  # the authors' np_num; further phrases are not asked about
DECIMALS = 4


def multiply_answers(probabilities: Sequence[float]) -> float:
    """The score of a picture: a product in float32 of rounded numbers, rounded to 4 decimals.

    >>> multiply_answers([0.5, 0.333333])
    0.1666
    """
    # [n] of 1 or more; one by one, because the order of a tensor's own product is not told.
    product = reduce(mul, torch.tensor([round(p, DECIMALS) for p in probabilities]))
    return round(product.item(), DECIMALS)


class CompBenchReward(ModelReward):
    """Whether a picture shows each phrase of its prompt, 0 to 1.

    Details: of each picture, the phrases with the probability of "yes" for each.

    Args:
        path: The folder that `tools/convert.py blip_vqa` wrote.
        phrases: The fact that holds a prompt's phrases, a list of texts. T2I-R1's data have
            `attr_nouns`; T2I-CompBench's own files have none.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload. At most batch_size
            questions are asked at once.
    """

    def __init__(
        self, path: str, phrases: str = "attr_nouns", name: str = "compbench", **residence: Any
    ) -> None:
        super().__init__(name, **residence)
        self.phrases, self.required_facts = phrases, (phrases,)
        self.folder = find_converted(path, "blip_vqa", "blip")

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError unless it is of a known category and has phrases to ask about."""
        if prompt.category not in CATEGORIES:
            raise ValueError(
                f"reward {self.name}: expected prompts of the categories {CATEGORIES}, got "
                f"{prompt.category!r} for {prompt.text!r}; leave the others out of its data"
            )
        match prompt.facts.get(self.phrases):
            case [_, *_] as given if all(isinstance(p, str) and p.strip() for p in given):
                return
            case given:
                raise ValueError(
                    f"reward {self.name}: expected a list of phrases, like ['a red cat'], under "
                    f"{self.phrases!r}, got {given!r}; add them, or set phrases to the fact that "
                    "holds them"
                )

    def read(self) -> nn.Module:
        """Read the question answerer."""
        return BlipVQA.read(self.folder)

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Products of the probabilities that the phrases are there."""
        phrases = [self._phrases_of(prompt) for prompt in prompts]
        pictures = [row for row, asked in enumerate(phrases) for _ in asked]
        questions = [f"{phrase}?" for asked in phrases for phrase in asked]
        answers = iter(self.network(images, pictures, questions).tolist())
        probabilities = [[next(answers) for _ in asked] for asked in phrases]
        scores = torch.tensor([multiply_answers(given) for given in probabilities])
        details: list[dict[str, Any]] = [
            {
                "phrases": [
                    {"phrase": phrase, "yes": round(p, DECIMALS)}
                    for phrase, p in zip(asked, given, strict=True)
                ]
            }
            for asked, given in zip(phrases, probabilities, strict=True)
        ]
        return Scores.single(self.name, scores.to(images.device), details)

    def _phrases_of(self, prompt: Prompt) -> list[str]:
        self.check_prompt(prompt)
        return list(prompt.facts[self.phrases])[:MOST_PHRASES]
