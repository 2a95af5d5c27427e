"""Vision-language models that are asked about a picture: checkpoints, questions, next tokens.

Shared by the rewards that put a question to such a model and read what it says next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cotgen_pl.interfaces import Prompt
from cotgen_pl.weights import find_weights

QUESTIONS = Path(__file__).parent / "questions"
# `qwen_1_5` of llava/conversation.py, github.com/LLaVA-VL/LLaVA-NeXT: what LLaVA-OneVision-Qwen2
# was trained with. Its template in transformers' format lacks the first two lines.
QWEN_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)
LLAVA = "llava_onevision"
LLAVA_IMAGE = "<image>"
# SigLIP's last hidden state came after its closing norm there: wrong features, and no warning
# (https://github.com/huggingface/transformers/pull/40994).
WRONG_FEATURES = ("4.57.0", "4.57.1")


@dataclass
class Judge:
    """A vision-language model with what belongs to it."""

    model: Any
    """transformers' own, with a language head."""
    processor: Any
    """Texts and pictures to the model's inputs, padded on the left."""
    path: str
    """The folder or hub repository that it was read from."""

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    @property
    def is_llava(self) -> bool:
        """Whether it is a LLaVA-OneVision, whose chat form and positions differ from Qwen-VL's."""
        return bool(self.model.config.model_type == LLAVA)

    def next_logits(self, inputs: dict[str, Any], tokens: Sequence[int]) -> Tensor:
        """Logits of some tokens right after each text, [B, len(tokens)] float32, in one pass.

        The head's rows are applied in float32: half precision has steps of 0.125 near a logit of
        20, hence ties between pictures.

        Args:
            inputs: The model's, padded on the left.
            tokens: Their ids.
        """
        positions: dict[str, Tensor] = {}
        # Counted without the padding, or rounding would depend on the longest text beside.
        if self.is_llava:  # Qwen-VL works out its own, in three dimensions
            mask = inputs["attention_mask"]
            positions["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        last = self.model.model(**inputs, **positions, use_cache=False).last_hidden_state[:, -1]
        rows = self.model.get_output_embeddings().weight[list(tokens)]  # [len(tokens), D]
        return last.float() @ rows.float().T


def read_question(name: str) -> str:
    """A question with `{prompt}` in it; the header of its file ends at the first empty line."""
    _, _, question = (QUESTIONS / f"{name}.txt").read_text(encoding="utf-8").partition("\n\n")
    return question.removesuffix("\n")


def ask_about(prompts: Sequence[Prompt], question: str, forbidden: str) -> list[str]:
    """The question about each prompt.

    Args:
        prompts: B of them.
        question: With `{prompt}` in it.
        forbidden: The model's mark of a picture: in a prompt it would stand for one that is not
            there.
    """
    for prompt in prompts:
        if forbidden in prompt.text:
            raise ValueError(
                f"expected prompts without {forbidden}, the judge's mark of a picture, got "
                f"{prompt.text!r}; take it out of the prompt file"
            )
    return [question.replace("{prompt}", prompt.text) for prompt in prompts]


def find_checkpoint(path: str, name: str) -> str:
    """The folder in transformers' format, `~` expanded, or the hub id that `path` names.

    Raises:
        ValueError: It is neither.
    """
    config = find_weights(path, ("config.json",), name)
    if config is None:
        return path
    if config.name != "config.json":
        raise ValueError(
            f"{name} weights: expected a folder or a hub repository (owner/name), got the file "
            f"{path}; name the folder that holds it and its config.json"
        )
    return str(config.parent)


def read_judge(path: str, name: str, families: Sequence[str], dtype: torch.dtype) -> Judge:
    """Read a model and its processor, on the CPU.

    Args:
        path: From `find_checkpoint`.
        name: Of the reward, for messages.
        families: transformers' model types that will do.
        dtype: Of the weights.

    Raises:
        ValueError: A model of another family, missing files, or a version of transformers that
            computes other features.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from cotgen_pl.checkpoints import read_processor, read_weights

    family = _read_family(path, name)
    if family not in families:
        raise ValueError(
            f"{name} weights: expected a {' or '.join(families)} checkpoint in {path}, got "
            f"model_type {family!r}; one of LLaVA-NeXT's own format (llava, llava_qwen) is to be "
            "converted first: python tools/convert.py"
        )
    if family == LLAVA:
        _check_version()
    model_class: Any = AutoModelForImageTextToText
    processor_class: Any = AutoProcessor
    processor = read_processor(path, processor_class)
    processor.tokenizer.padding_side = "left"  # so that the next token stands in one column
    return Judge(read_weights(path, model_class, dtype=dtype), processor, path)


def _read_family(path: str, name: str) -> str | None:
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(path, local_files_only=Path(path).is_dir())
    except OSError as error:  # offline, not cached, no such repository, damaged
        raise ValueError(
            f"{name} weights: expected a local folder or the hub repository {path}, got neither "
            f"({type(error).__name__}); where there is a network run `hf download {path}`, then "
            "set path to that folder here"
        ) from error
    family: str | None = config.get("model_type")
    return family


def _check_version() -> None:
    import transformers

    if transformers.__version__ in WRONG_FEATURES:
        raise ValueError(
            f"expected a transformers that computes LLaVA-OneVision's picture features right, got "
            f"{transformers.__version__}, which does not; install another one: pip install "
            '"transformers>=5.17"'
        )


def single_token(tokenizer: Any, word: str, path: str) -> int:
    """The id of a word that is one token; a ValueError that names the tokenizer otherwise."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == word:
        return int(ids[0])
    raise ValueError(
        f"expected {word!r} to be a single token of the tokenizer in {path} "
        f"({type(tokenizer).__name__}), got {tokenizer.convert_ids_to_tokens(ids)}; name a "
        "checkpoint with the tokenizer that the judge was trained with"
    )


def ending_tokens(tokenizer: Any, beginning: str, endings: Sequence[str], path: str) -> list[int]:
    """The ids of endings, each one token behind the beginning's own.

    Raises:
        ValueError: They are not; the message names the tokenizer.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    rows = [encode(beginning + ending) for ending in endings]
    if all(ids[:-1] == encode(beginning) for ids in rows):
        return [ids[-1] for ids in rows]
    raise ValueError(
        f"expected each of {list(endings)} to be a single token behind {beginning!r} in the "
        f"tokenizer in {path} ({type(tokenizer).__name__}), got {rows}; name a checkpoint with the "
        "tokenizer that the judge was trained with"
    )
