"""UnifiedReward: a vision-language model that marks a picture from 1 to 5.

https://arxiv.org/abs/2503.05236, code at https://github.com/CodeGoat24/UnifiedReward (ff6f520).
What differs from the authors' scripts:

* pictures go in as they are, not resized to 512 x 512 first;
* decoding is greedy and nothing else: the checkpoint's own repetition penalty would lower the marks
  that the question names, and its sampling would add noise;
* the mark must be a number from 1 to 5 that ends where it seems to; "Final Score: 10" is no 1 and
  "5.7" no mark. An answer without a mark gives no verdict, where the scripts give 0.

`reference_faults` brings back the third.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores, check_choice, check_positive
from cotgen_pl.pixels import to_pillow
from cotgen_pl.rewards.base import ModelReward
from cotgen_pl.rewards.language_judges import (
    LLAVA_IMAGE,
    QWEN_CHAT,
    Judge,
    ask_about,
    ending_tokens,
    find_checkpoint,
    read_judge,
    read_question,
)

Question = Literal["score_only", "elements", "axes", "word_wise_axes"]
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
BEST = 5  # the highest mark
AXES = ("alignment", "coherence", "style")
MARK = r"\s*([0-9]+(?:\.[0-9]+)?)(?!\w|\.[0-9])"
FAULTY_MARK = r"Final Score:\s*([1-5](?:\.\d+)?)"  # the scripts': no end, so 10 reads as 1
FORCED = "Final Score: "  # the digit behind the blank is a token of its own


def read_mark(answer: str, label: str = "Final Score") -> float:
    """The first number behind `label:` in an answer, if it is from 1 to 5, else NaN.

    >>> read_mark("Final Score: 4")
    4.0
    >>> read_mark("Final Score: 10")
    nan
    """
    found = re.search(re.escape(label) + ":" + MARK, answer)
    mark = float(found[1]) if found else math.nan
    return mark if 1 <= mark <= BEST else math.nan


def read_mark_as_reference(answer: str) -> float:
    """What the authors' expression reads: digits are cut off, and 0 stands for no mark.

    >>> read_mark_as_reference("Final Score: 10"), read_mark_as_reference("none")
    (1.0, 0.0)
    """
    found = re.search(FAULTY_MARK, answer)
    return float(found[1]) if found else 0.0


class UnifiedReward(ModelReward):
    """A mark from 1 to 5, divided by 5: 0.2 to 1, higher is better.

    Answers take a handful of values, so many groups tie; `expected` spreads them. With the axes
    the total is the mean of three marks, and the parts are alignment, coherence and style.

    Args:
        path: A folder in transformers' format or a hub repository: Qwen2.5-VL or Qwen3-VL as
            published, a LLaVA-OneVision (UnifiedReward-7b, -7b-v1.5) after conversion.
        question: `score_only` asks for nothing but the mark; `elements` first for each element of
            the prompt; `axes` for three marks, of the 2.0 models; `word_wise_axes` the same of the
            first generation, after a mark per word.
        expected: Do not generate: put `Final Score:` into the model's mouth and take the mean of
            the digits 1 to 5 under its next-token distribution, in one pass. Decimals behind the
            digit are not seen. Needs `score_only`.
        reference_faults: Read answers as the authors' scripts do, faults included.
        max_new_tokens: At which an answer is cut off; `elements` takes up to about 512.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload.
    """

    def __init__(
        self,
        path: str = "CodeGoat24/UnifiedReward-qwen-7b",
        question: Question = "score_only",
        expected: bool = False,
        reference_faults: bool = False,
        max_new_tokens: int = 512,
        name: str = "unified_reward",
        **residence: Any,
    ) -> None:
        super().__init__(name, **residence)
        check_choice("question", question, Question)
        check_positive(max_new_tokens=max_new_tokens)
        if expected and question != "score_only":
            raise ValueError(
                f"expected question: score_only beside expected: true, got {question}, whose "
                "answer does not begin with the mark; set one of the two"
            )
        self.by_axes = question in ("axes", "word_wise_axes")
        if reference_faults and (expected or self.by_axes):
            raise ValueError(
                "expected reference_faults with score_only or elements and without expected: only "
                f"their answers are read for one mark, got question {question}; leave it out"
            )
        self.path = find_checkpoint(path, "UnifiedReward")
        self.question, self.max_new_tokens = read_question(question), max_new_tokens
        self.expected, self.reference_faults = expected, reference_faults

    def read(self) -> nn.Module:
        """Read weights, tokenizer and processor, and check the digits."""
        judge = read_judge(self.path, "UnifiedReward", FAMILIES, self.torch_dtype)
        self._judge: Judge = judge
        if self.expected:
            digits = [str(mark) for mark in range(1, BEST + 1)]
            self._digits = ending_tokens(judge.tokenizer, FORCED, digits, judge.path)
        network: nn.Module = judge.model
        return network

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Ask about each picture; details hold the answers."""
        texts = self._conversations(prompts)
        if self.expected:
            return self._expected_marks(images, texts)
        answers = self._answers(self._encode(images, texts))
        return self._axes_scores(answers, images) if self.by_axes else self._scores(answers, images)

    def _conversations(self, prompts: Sequence[Prompt]) -> list[str]:
        """The question about each prompt in the model's chat form, up to where it answers."""
        processor = self._judge.processor
        questions = ask_about(prompts, self.question, processor.image_token)
        if self._judge.is_llava:
            marked = [f"{LLAVA_IMAGE}\n{question}" for question in questions]
            return [QWEN_CHAT.replace("{question}", question) for question in marked]
        turns = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
        chats = [[{"role": "user", "content": turn}] for turn in turns]
        texts: list[str] = [
            processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]
        return texts

    def _encode(self, images: Tensor, texts: Sequence[str]) -> dict[str, Any]:
        inputs = self._judge.processor(
            text=list(texts), images=to_pillow(images), padding=True, return_tensors="pt"
        )
        return dict(inputs.to(images.device, self.torch_dtype))

    def _answers(self, inputs: dict[str, Any]) -> list[str]:
        """What the model says to each text, by greedy decoding."""
        tokens = self._judge.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,  # the checkpoint's would be warned about
            top_p=None,
            top_k=None,
        )
        said = tokens[:, inputs["input_ids"].shape[1] :]
        answers: list[str] = self._judge.tokenizer.batch_decode(said, skip_special_tokens=True)
        return answers

    def _scores(self, answers: Sequence[str], images: Tensor) -> Scores:
        read = read_mark_as_reference if self.reference_faults else read_mark
        marks = torch.tensor([read(answer) for answer in answers], device=images.device)
        return Scores.single(self.name, marks / BEST, _describe(answers, marks))

    def _axes_scores(self, answers: Sequence[str], images: Tensor) -> Scores:
        labels = [f"{axis.capitalize()} Score (1-5)" for axis in AXES]
        rows = [[read_mark(answer, label) for label in labels] for answer in answers]
        marks = torch.tensor(rows, device=images.device)  # [B, 3]
        total = marks.mean(dim=1)  # NaN where one of them is
        parts = dict(zip(AXES, (marks / BEST).unbind(dim=1), strict=True))
        weights = dict.fromkeys(AXES, 1 / len(AXES))
        return Scores(total / BEST, parts, weights, _describe(answers, total))

    def _expected_marks(self, images: Tensor, texts: Sequence[str]) -> Scores:
        inputs = self._encode(images, [text + FORCED for text in texts])
        chances = self._judge.next_logits(inputs, self._digits).softmax(dim=-1)  # [B, 5]
        marks = torch.arange(1.0, BEST + 1, device=chances.device)
        details = [{"chances": [round(chance, 4) for chance in row]} for row in chances.tolist()]
        return Scores.single(self.name, chances @ marks / BEST, details)


def _describe(answers: Sequence[str], marks: Tensor) -> list[dict[str, Any]]:
    """The answers, and which of them gave no verdict."""
    missing = {"problem": f"no mark from 1 to {BEST}"}
    return [
        {"answer": answer} | (missing if math.isnan(mark) else {})
        for answer, mark in zip(answers, marks.tolist(), strict=True)
    ]
