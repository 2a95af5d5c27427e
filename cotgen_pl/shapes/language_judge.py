"""The Shapes world's yes/no judge: a small LLaVA-OneVision that `ORMReward` reads.

Its words attend to the picture, so that it can see relations, which a dual encoder hardly can. It
learns from what the broad scorer learns from: to say the prompts of renderings, as LLaVA learns
from captions first, then to answer about renderings, and last about voted pairs. It is asked just
as `ORMReward` asks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotgen_pl.interfaces import Prompt
from cotgen_pl.shapes.render import CELL, GRID
from cotgen_pl.shapes.scorer_data import Pairs
from cotgen_pl.shapes.scorer_training import (
    BREADTHS,
    PIXEL_MEAN,
    PIXEL_STD,
    Training,
    draw_both_domains,
    fit,
    vote_on,
)

WIDTH = 64  # of both towers
IMAGE, VIDEO = "<image>", "<video>"
ANSWERS = ("yes", "no")
LossOf = Callable[[Tensor], Tensor]  # of the questions with these numbers, [N] int64
PLACES = GRID**2 + 1  # of a picture among the words: its cells, and LLaVA-OneVision's line break


@dataclass(frozen=True)
class JudgeTraining(Training):
    """Amounts of the three stages; tuned here like those of the scorers."""

    naming_epochs: int = 8
    """Over the renderings' right pictures."""
    naming_rate: float = 2e-3
    """Peak learning rate of naming."""
    rendering_epochs: int = 3
    rendering_rate: float = 1e-3
    preference_epochs: int = 6
    preference_rate: float = 5e-4
    batch_size: int = 32


TUNED = JudgeTraining()


@dataclass
class LanguageJudge:
    """A model with its tokenizer and the question that it is asked."""

    model: Any
    """transformers' `LlavaOnevisionForConditionalGeneration`."""
    tokenizer: Any
    question: str
    """With `<image>` and `{prompt}` in it."""

    def tokenize(self, prompts: Sequence[Prompt]) -> Any:
        """`input_ids` and `attention_mask` of the questions, [N, L] int64, padded on the left."""
        asked = self.question.replace(IMAGE, IMAGE * PLACES)
        texts = [asked.replace("{prompt}", prompt.text) for prompt in prompts]
        return self.tokenizer(texts, padding=True, return_tensors="pt")

    def read(self, tokens: Tensor, mask: Tensor, pictures: Tensor) -> Tensor:
        """The last hidden states of each question about each picture, [N, K, L, D].

        Args:
            tokens: [N, L] int64, from `tokenize`.
            mask: [N, L] int64, 0 at the padding.
            pictures: [N, K, 3, 32, 32] uint8.
        """
        copies = pictures.shape[1]
        tokens, mask = (value.repeat_interleave(copies, 0) for value in (tokens, mask))
        pixels = (pictures.flatten(0, 1).float() / 255 - PIXEL_MEAN) / PIXEL_STD
        states: Tensor = self.model.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # as `ORMReward` counts
            pixel_values=pixels[:, None],
            image_sizes=torch.tensor([pixels.shape[-2:]] * len(pixels)),
            batch_num_images=torch.tensor([max(2, len(pixels))]),  # so that none is cut into tiles
            use_cache=False,
        ).last_hidden_state
        return states.unflatten(0, (-1, copies))

    def margins(self, states: Tensor) -> Tensor:
        """The logit of "yes" less that of "no" behind each question, [N, K]; `states` of `read`."""
        yes, no = self.words[self._ids(*ANSWERS)]
        return states[:, :, -1] @ (yes - no)

    @property
    def words(self) -> Tensor:
        """A row for each token, [vocabulary, D], both to read and to say it."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def named(self, tokens: Tensor) -> Tensor:
        """Which tokens [N, L] belong to the prompt or to the sentence behind it, [N, L] bool."""
        (opening,) = self._ids(sentences(self.question)[1])
        return ((tokens == opening).cumsum(1) > 0) & (tokens != opening)

    def _ids(self, *tokens: str) -> list[int]:
        ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(tokens))
        return ids

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer and processor in transformers' format."""
        from transformers import (
            LlavaOnevisionImageProcessor,
            LlavaOnevisionProcessor,
            LlavaOnevisionVideoProcessor,
        )

        self.model.save_pretrained(folder)
        side = GRID * CELL
        look: dict[str, Any] = {
            "size": {"height": side, "width": side},
            "image_mean": [PIXEL_MEAN] * 3,
            "image_std": [PIXEL_STD] * 3,
        }
        LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(
                image_grid_pinpoints=self.model.config.image_grid_pinpoints, **look
            ),
            tokenizer=self.tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(**look),
            num_image_tokens=GRID**2,
            vision_feature_select_strategy="full",
        ).save_pretrained(folder)


def build_judge(policy_tokenizer: Any, question: str, seed: int) -> LanguageJudge:
    """An untrained judge of 0.24 million parameters: a SigLIP whose patches are cells, and a Qwen2.

    Words start at scale 1, that of what the layers add to them; their logits do by the closing
    norm's scale; and those of the answers start at 0.

    Args:
        policy_tokenizer: Extended by what the question needs.
        question: With `<image>` and `{prompt}` in it.
        seed: Of the weights.
    """
    from transformers import LlavaOnevisionForConditionalGeneration

    tokenizer = extend_tokenizer(policy_tokenizer, question)
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(_config(tokenizer))
    judge = LanguageJudge(model, tokenizer, question)
    nn.init.normal_(judge.words)
    judge.words.data[judge._ids(*ANSWERS)] = 0.0
    nn.init.constant_(model.model.language_model.norm.weight, WIDTH**-0.5)
    return judge


def sentences(question: str) -> tuple[str, str, str]:
    """What stands before the picture, between picture and prompt, and behind the prompt."""
    before, _, rest = question.partition(IMAGE)
    between, _, behind = rest.partition("{prompt}")
    return before, between, behind


def extend_tokenizer(policy_tokenizer: Any, question: str) -> Any:
    """The policy's tokenizer with the answers, and each sentence around the prompt, as one token.

    What never changes would otherwise be three quarters of what the judge reads.
    """
    from transformers import AddedToken, PreTrainedTokenizerFast

    kept = {
        name: getattr(policy_tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(policy_tokenizer.backend_tokenizer),
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
        **kept,
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in sentences(question)])
    tokenizer.add_tokens([AddedToken(a, single_word=True, normalized=False) for a in ANSWERS])
    return tokenizer


def _config(tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    layers: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
    }
    text = Qwen2Config(
        **layers,
        vocab_size=len(tokenizer),
        num_hidden_layers=3,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=WIDTH**-0.5,  # at 0.02 so narrow a model binds words late
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    side = GRID * CELL
    vision = SiglipVisionConfig(
        **layers, num_hidden_layers=2, image_size=side, patch_size=CELL, vision_use_head=False
    )
    image, video = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
    return LlavaOnevisionConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[side, side]],
        tie_word_embeddings=True,
    )


def train_judge(
    policy_tokenizer: Any,
    question: str,
    pairs_in_domain: Pairs,
    pairs_wide: Pairs,
    seed: int,
    report: Callable[[str], None],
    training: JudgeTraining = TUNED,
) -> LanguageJudge:
    """Train a judge from nothing on what the broad scorer of the same seed learns from.

    Args:
        policy_tokenizer: The base policy's.
        question: With `<image>` and `{prompt}` in it.
        pairs_in_domain: At least as many as the broad scorer needs; the first ones are used.
        pairs_wide: Likewise.
        seed: Of weights, renderings, mistaken votes and order.
        report: Takes a line of progress after each epoch.
        training: Amounts.

    Returns:
        The judge in evaluation mode.
    """
    pairs, votes = vote_on(BREADTHS["broad"], pairs_in_domain, pairs_wide, seed)
    judge = build_judge(policy_tokenizer, question, seed)
    prompts, pictures = draw_both_domains(BREADTHS["broad"], training.num_renderings, seed)
    naming = _loss_of_naming(judge, prompts, pictures[:, :1])
    renderings = _loss_of_renderings(judge, prompts, pictures, seed)
    preferences = _loss_of_preferences(judge, pairs, votes)
    how = training
    for name, loss_of, number, epochs, rate in (
        ("naming", naming, len(prompts), how.naming_epochs, how.naming_rate),
        ("renderings", renderings, len(prompts), how.rendering_epochs, how.rendering_rate),
        ("preference", preferences, len(pairs), how.preference_epochs, how.preference_rate),
    ):
        say = functools.partial(_report_stage, report, name)
        fit(
            judge.model,
            loss_of,
            number,
            epochs=epochs,
            rate=rate,
            training=training,
            seed=seed,
            report=say,
        )
    judge.model.eval()
    return judge


def _report_stage(report: Callable[[str], None], name: str, line: str) -> None:
    report(f"{name} {line}")


def _loss_of_naming(judge: LanguageJudge, prompts: Sequence[Prompt], pictures: Tensor) -> LossOf:
    asked = judge.tokenize(prompts)

    def loss_of(chosen: Tensor) -> Tensor:
        tokens, mask = _unpadded(asked, chosen)
        states = judge.read(tokens, mask, pictures[chosen])
        return naming_loss(judge.words, states[:, 0], tokens, judge.named(tokens))

    return loss_of


def _loss_of_renderings(
    judge: LanguageJudge, prompts: Sequence[Prompt], pictures: Tensor, seed: int
) -> LossOf:
    asked, generator = judge.tokenize(prompts), torch.Generator().manual_seed(seed)

    def loss_of(chosen: Tensor) -> Tensor:
        tokens, mask = _unpadded(asked, chosen)
        states = judge.read(tokens, mask, with_easy_one(pictures[chosen], generator))
        right = torch.zeros_like(chosen)
        loss = yes_no_loss(judge.margins(states), right)
        return loss + naming_loss(judge.words, states[:, 0], tokens, judge.named(tokens))

    return loss_of


def _loss_of_preferences(judge: LanguageJudge, pairs: Pairs, votes: Tensor) -> LossOf:
    asked = judge.tokenize(pairs.prompts)

    def loss_of(chosen: Tensor) -> Tensor:
        states = judge.read(*_unpadded(asked, chosen), pairs.pictures[chosen])
        return yes_no_loss(judge.margins(states), votes[chosen])

    return loss_of


def _unpadded(asked: Any, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask of some questions, cut to the longest of them, [N, L] each."""
    tokens, mask = asked["input_ids"][chosen], asked["attention_mask"][chosen]
    longest = int(mask.sum(-1).max())
    return tokens[:, -longest:], mask[:, -longest:]


def with_easy_one(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The right picture, one of the two hard negatives by chance, and another prompt's right one.

    With hard ones alone it takes twice as many steps until a word is tied to what it names.

    Args:
        pictures: [N, 3, 3, 32, 32] uint8, the right one first.
        generator: Of the chance.
    """
    hard = torch.randint(1, 3, (len(pictures),), generator=generator)
    right = pictures[:, 0]
    return torch.stack([right, pictures[torch.arange(len(hard)), hard], right.roll(1, 0)], dim=1)


def yes_no_loss(margins: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy of each picture's answer, and of the right picture among those of its prompt.

    Args:
        margins: [N, K], logits of "yes" against "no".
        right: [N] int64, the picture that deserves "yes"; the others deserve "no".
    """
    answers = functional.one_hot(right, margins.shape[1]).to(margins.dtype)
    answer_loss = functional.binary_cross_entropy_with_logits(margins, answers)
    return answer_loss + functional.cross_entropy(margins, right)


def naming_loss(words: Tensor, states: Tensor, tokens: Tensor, named: Tensor) -> Tensor:
    """Cross-entropy of saying the prompt, word after word, behind its own picture.

    As LLaVA learns from captions before it learns from questions.

    Args:
        words: [vocabulary, D].
        states: [N, L, D], behind each token.
        tokens: [N, L] int64.
        named: [N, L] bool, the tokens to be said.
    """
    before, said = states[:, :-1], named[:, 1:]
    return functional.cross_entropy(before[said] @ words.T, tokens[:, 1:][said])
