"""The fine-tuned outcome reward model: does this picture show its prompt, yes or no?

A LLaVA-OneVision-Qwen2-7B, tuned on such questions by https://arxiv.org/abs/2501.13926 and used as
a reward by T2I-R1 (https://arxiv.org/abs/2505.00703). What differs from T2I-R1's code (2d9d4d1):

* the reward is the chance of "yes" against "no" itself; there a token is sampled, and the reward is
  0 if it is neither and 0 or 1 where top-p drops one of the two;
* one forward pass over a batch, where there up to 100 tokens are generated for each picture;
* the two logits are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.pixels import normalise, pad_to_square, resize
from cotgen_pl.rewards.base import ModelReward
from cotgen_pl.rewards.language_judges import (
    LLAVA,
    LLAVA_IMAGE,
    QWEN_CHAT,
    Judge,
    ask_about,
    find_checkpoint,
    read_judge,
    read_question,
    single_token,
)

GREY = 127 / 255  # the tower's mean colour, 0.5, as LLaVA cuts it to 8 bits
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation: pictures become -1 to 1
ANSWERS = ("yes", "no")  # lower case, as the judge was tuned


def full_question() -> str:
    """What the judge reads before it answers, with `<image>` and `{prompt}` in it."""
    return QWEN_CHAT.replace("{question}", read_question("orm"))


class ORMReward(ModelReward):
    """The chance of "yes" against "no" as the next word: sigmoid((yes - no) / temperature), 0 to 1.

    Args:
        path: A LLaVA-OneVision folder in transformers' format, converted from `CaraJ/ORM-T2I-R1` or
            from `ZiyuG/Image-Generation-CoT`, or a hub repository of one, such as the untuned
            `llava-hf/llava-onevision-qwen2-7b-ov-hf`.
        temperature: Of the two logits. 0.3 is T2I-R1's; 1 gives a smoother signal.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload.
    """

    def __init__(
        self, path: str, temperature: float = 0.3, name: str = "orm", **residence: Any
    ) -> None:
        super().__init__(name, **residence)
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"expected an ORM temperature above 0, got {temperature}; 0.3 is T2I-R1's"
            )
        self.path, self.temperature = find_checkpoint(path, "ORM"), temperature
        self.question = full_question()

    def read(self) -> nn.Module:
        """Read weights and tokenizer, and check the tokens that matter."""
        judge = read_judge(self.path, "ORM", (LLAVA,), self.torch_dtype)
        self._answer_ids = [single_token(judge.tokenizer, word, self.path) for word in ANSWERS]
        mark = single_token(judge.tokenizer, LLAVA_IMAGE, self.path)
        if mark != judge.model.config.image_token_id:
            raise ValueError(
                f"expected {LLAVA_IMAGE} to be token {judge.model.config.image_token_id}, as "
                f"config.json in {self.path} says, got {mark}; put the tokenizer that belongs to "
                "these weights into their folder"
            )
        self._judge: Judge = judge
        network: nn.Module = judge.model
        return network

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """One pass over the pictures and their questions."""
        logits = self._judge.next_logits(self._inputs(images, prompts), self._answer_ids)  # [B, 2]
        chances = torch.sigmoid((logits[:, 0] - logits[:, 1]) / self.temperature)
        return Scores.single(self.name, chances)

    def _inputs(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The model's inputs: one tile per picture, the question around its features' places."""
        vision = self._judge.model.config.vision_config
        # 384 px in patches of 14: 27 x 27 features, and the model's line break behind them.
        places = (vision.image_size // vision.patch_size) ** 2 + 1
        questions = ask_about(prompts, self.question, LLAVA_IMAGE)
        texts = [text.replace(LLAVA_IMAGE, LLAVA_IMAGE * places) for text in questions]
        tokens = self._judge.tokenizer(texts, padding=True, return_tensors="pt")
        pixels = fit_pictures(images, vision.image_size).to(self.torch_dtype)
        return {
            "input_ids": tokens["input_ids"].to(images.device),
            "attention_mask": tokens["attention_mask"].to(images.device),
            "pixel_values": pixels[:, None],  # [B, 1, 3, size, size]
            "image_sizes": torch.tensor([pixels.shape[-2:]] * len(images)),
            # Pictures that come several at a time are not cut into tiles; these come all at a time.
            "batch_num_images": torch.tensor([max(2, len(images))]),
        }


def fit_pictures(images: Tensor, size: int) -> Tensor:
    """Pad pictures [B, 3, H, W] in [0, 1] to a grey square, resize and normalise them.

    As `image_aspect_ratio="pad"` of llava/mm_utils.py, github.com/LLaVA-VL/LLaVA-NeXT.

    Returns:
        [B, 3, size, size] float32 in [-1, 1].
    """
    return normalise(resize(pad_to_square(images, GREY), size, size), HALF, HALF)
