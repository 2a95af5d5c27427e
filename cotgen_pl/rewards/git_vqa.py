"""GIT as T2I-R1 uses it: a picture is asked for each thing that its prompt names.

The model is GIT-large fine-tuned on VQAv2 (https://arxiv.org/abs/2205.14100), the score is that of
the GIT reward of https://github.com/CaraJ7/T2I-R1/tree/2d9d4d1. What differs from it:

* T2I-R1 gives 0 to every picture of a prompt about positions or counts, 47 % of its prompts, which
  teaches nothing. Here these prompts' nouns are asked for like all others', which tells whether the
  things are there, but neither where nor how many; `reference_faults: true` gives the 0;
* a picture is encoded once for all of its phrases, and pictures are asked in batches;
* the two answers are compared in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.pixels import normalise, resize_shorter
from cotgen_pl.rewards.base import Kept, ModelReward

ORIGINAL = "microsoft/git-large-vqav2"
BICUBIC = 3  # Pillow's number of it, as processors' settings name it
# T2I-R1's task types without a question in its GIT reward.
NOT_ASKED_BY_REFERENCE = ("spatial", "numeracy")


class GITReward(ModelReward):
    """Whether the things that a prompt names are in the picture, 0 to 1.

    Each phrase, like "red cup", is put as "red cup?"; its score is p(yes) / (p(yes) + p(no)) of the
    first answer token, and a picture's score is the mean over the phrases. A prompt that names
    nothing scores 1, as in T2I-R1: all of its pictures do, so it moves no advantage, while a
    missing verdict would take the prompt from the other members of an ensemble as well.

    The phrases are the fact `attr_nouns` ("red cup"), else `nouns` ("cup"), whatever the prompt's
    category.

    Args:
        path: A folder or a hub id, in transformers' format.
        reference_faults: Score 0 for prompts of the categories `spatial` and `numeracy`, as T2I-R1.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, here of pairs of picture and phrase; device,
            dtype, offload.
    """

    required_facts = ("nouns",)

    def __init__(
        self,
        path: str = ORIGINAL,
        reference_faults: bool = False,
        name: str = "git",
        **residence: Any,
    ) -> None:
        super().__init__(name, **residence)
        self.path, self.reference_faults = path, reference_faults
        self._kept: Kept[Tensor] = Kept()  # phrase to [L] token ids, on the CPU

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError unless `nouns` and, where given, `attr_nouns` are lists of texts."""
        for fact in ("nouns", "attr_nouns"):
            phrases = prompt.facts.get(fact) or []
            if not isinstance(phrases, list) or not all(map(_is_text, phrases)):
                raise ValueError(
                    f"reward {self.name}: expected a list of texts under {fact!r}, got "
                    f'{phrases!r}; write it like ["cup", "hot dog"]'
                )

    def read(self) -> nn.Module:
        """Read tokenizer, the settings of the image processor and weights."""
        from transformers import GitConfig, GitForCausalLM, GitProcessor

        from cotgen_pl.checkpoints import expand_home, read_config, read_processor, read_weights

        path = expand_home(self.path)
        read_config(path, GitConfig, ORIGINAL)
        processor = read_processor(path, GitProcessor)
        self._tokenizer = processor.tokenizer
        self._answers = [find_answer(self._tokenizer, answer, path) for answer in ("yes", "no")]
        self._settings = processor.image_processor
        check_settings(self._settings, path)
        self._git: Any = read_weights(path, GitForCausalLM, dtype=torch.float32)
        model: nn.Module = self._git
        return model

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Ask for all phrases; details: the phrases and the share of yes of each."""
        pixels = fit_pictures(images, self._settings).to(self.torch_dtype)
        silent = [
            self.reference_faults and prompt.category in NOT_ASKED_BY_REFERENCE
            for prompt in prompts
        ]
        asked = [
            [] if is_silent else choose_phrases(prompt.facts)
            for prompt, is_silent in zip(prompts, silent, strict=True)
        ]
        answers = self._ask_all(pixels, asked)
        scores = [
            0.0 if is_silent else _mean(yes) for yes, is_silent in zip(answers, silent, strict=True)
        ]
        details: list[dict[str, Any]] = [
            {"phrases": phrases, "yes": yes} for phrases, yes in zip(asked, answers, strict=True)
        ]
        for score, entry in zip(scores, details, strict=True):
            if math.isnan(score):
                entry["failure"] = "the model's answer is NaN; try dtype: float32"
        return Scores.single(self.name, torch.tensor(scores, device=images.device), details)

    def _ask_all(self, pixels: Tensor, asked: Sequence[Sequence[str]]) -> list[list[float]]:
        """Each picture's shares of yes, in the order of its phrases.

        Pictures with equally many phrases go together, so that no row is spent on filling.
        """
        answers: list[list[float]] = [[] for _ in asked]
        for count in sorted({len(phrases) for phrases in asked} - {0}):
            places = [place for place, phrases in enumerate(asked) if len(phrases) == count]
            size = max(1, self.batch_size // count)  # pictures at a time
            for start in range(0, len(places), size):
                part = places[start : start + size]
                shares = self._ask(pixels[part], [asked[place] for place in part])
                for place, row in zip(part, shares.tolist(), strict=True):
                    answers[place] = row
        return answers

    def _ask(self, pixels: Tensor, asked: Sequence[Sequence[str]]) -> Tensor:
        """Shares of yes, [n, K] float32.

        Args:
            pixels: [n, 3, S, S] normalised.
            asked: n times K phrases.
        """
        # First all pictures' first phrases, then all second ones: the model repeats the pictures
        # that it has encoded in this order when there are more texts.
        phrases = [phrase for column in zip(*asked, strict=True) for phrase in column]
        rows = [self._kept.get_or_compute(phrase, self._tokenize) for phrase in phrases]
        tokens = pad_sequence(rows, batch_first=True).to(pixels.device)  # [K * n, L]
        # Text is read from left to right, so padding on the right is never seen by a last token.
        states = self._git.git(tokens, pixel_values=pixels, use_cache=False).last_hidden_state
        lengths = torch.tensor([len(row) for row in rows], device=pixels.device)
        last = states.shape[1] - tokens.shape[1] + lengths - 1  # pictures stand before the texts
        states = states[torch.arange(len(rows), device=pixels.device), last].float()  # [K * n, D]
        head = self._git.output
        weight, bias = head.weight[self._answers].float(), head.bias[self._answers].float()
        yes, no = F.linear(states, weight, bias).unbind(-1)
        return (yes - no).sigmoid().view(-1, len(asked)).T

    def _tokenize(self, phrase: str) -> Tensor:
        """[L]: the start token and the question's tokens, without an end token."""
        tokens = self._tokenizer.encode(f"{phrase}?", add_special_tokens=False)
        return torch.tensor([self._tokenizer.cls_token_id, *tokens])


def choose_phrases(facts: dict[str, Any]) -> list[str]:
    """What is asked for: nouns with their attributes where there are such, else the nouns.

    >>> choose_phrases({"nouns": ["cup", "dog"], "attr_nouns": ["red cup", "hot dog"]})
    ['red cup', 'hot dog']
    """
    return list(facts.get("attr_nouns") or facts.get("nouns") or [])


def fit_pictures(images: Tensor, settings: Any) -> Tensor:
    """Pictures as CLIP's image processor makes them: shorter side resized, middle cut out.

    Args:
        images: [b, 3, H, W] in [0, 1].
        settings: transformers' image processor, for size, mean and deviation.

    Returns:
        [b, 3, S, S] float32, normalised.
    """
    size = settings.crop_size.height
    images = resize_shorter(images, settings.size.shortest_edge)
    height, width = images.shape[-2:]
    # The processor rounds an odd remainder down; `crop_centre` rounds it as torchvision does.
    top, left = (height - size) // 2, (width - size) // 2
    square = images[..., top : top + size, left : left + size]
    return normalise(square, settings.image_mean, settings.image_std)


def check_settings(settings: Any, path: str) -> None:
    """Raise a ValueError for an image processor that does something else than `fit_pictures`."""
    side, crop = getattr(settings.size, "shortest_edge", None), getattr(settings, "crop_size", None)
    fits = side and crop and crop.height == crop.width <= side and settings.resample == BICUBIC
    if not (fits and settings.do_resize and settings.do_center_crop and settings.do_normalize):
        raise ValueError(
            f"expected an image processor in {path} that resizes the shorter side (bicubic), cuts "
            f"out the middle and normalises, got size {settings.size}, crop {crop} and resample "
            f"{settings.resample}; take the preprocessor_config.json of {ORIGINAL}"
        )


def find_answer(tokenizer: Any, answer: str, path: str) -> int:
    """The id of an answer that is one token.

    Raises:
        ValueError: It is several, or unknown.
    """
    tokens: list[int] = tokenizer.encode(answer, add_special_tokens=False)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"expected {answer!r} to be a single token of the tokenizer in {path}, got "
            f"{tokenizer.convert_ids_to_tokens(tokens)}; use the tokenizer that the weights were "
            "trained with"
        )
    return tokens[0]


def _mean(yes: Sequence[float]) -> float:
    return sum(yes) / len(yes) if yes else 1.0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
