"""Networks that answer questions about pictures, for rewards that judge by their answers.

Apart from the rewards because several of them ask the same network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cotgen_pl.pixels import normalise, resize

if TYPE_CHECKING:
    from transformers import BlipForQuestionAnswering, PreTrainedTokenizerBase

LONGEST_QUESTION = 35  # tokens, [ENC] and [SEP] included
MOST_WORDS = 50
# Removed from questions; BLIP's data/utils.py, pre_question.
PUNCTUATION = re.compile(r'[.!"()*#:;~]')


def find_converted(path: str, converter: str, model_type: str) -> Path:
    """The folder that `tools/convert.py` wrote.

    Args:
        path: Of the folder.
        converter: The name of the conversion, for messages.
        model_type: What its config.json must say.

    Raises:
        ValueError: No such folder, the original checkpoint, or the folder of another model.
    """
    folder = Path(path).expanduser()
    advice = f"run `python tools/convert.py {converter} SOURCE TARGET` and set path to TARGET"
    files = [folder / name for name in ("config.json", "model.safetensors")]
    if not all(file.is_file() for file in files):
        raise ValueError(
            f"expected a converted folder, with config.json and model.safetensors, got {path}, "
            f"which is none; {advice}"
        )
    try:
        found = json.loads(files[0].read_text(encoding="utf-8"))["model_type"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{files[0]}: expected a model_type, got {error!r}; {advice}") from error
    if found != model_type:
        raise ValueError(f"{path}: expected model_type {model_type}, got {found}; {advice}")
    return folder


def read_bert_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a converted folder, whose network knows `vocab_size` tokens."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) != vocab_size:  # without its files it would have 5 tokens
        raise ValueError(
            f"{folder}: expected the tokenizer of a network with {vocab_size} tokens, got one with "
            f"{len(tokenizer)}; convert the checkpoint again"
        )
    return tokenizer


def clean_question(question: str) -> str:
    """A question as BLIP was trained on it: lower case, no marks but commas and "?", 50 words.

    >>> clean_question('A "big" red cat (or two)?  ')
    'a big red cat or two?'
    """
    words = PUNCTUATION.sub("", question.lower()).rstrip(" ").split(" ")
    return " ".join(words[:MOST_WORDS])


class BlipVQA(nn.Module):
    """BLIP's question answerer (https://arxiv.org/abs/2201.12086) between yes and no.

    As T2I-CompBench asks it (https://github.com/Karine-Huang/T2I-CompBench/tree/1b70949,
    BLIPvqa_eval/models/blip_vqa.py, `vqa_prob`): the question's first token becomes [ENC], the
    decoder reads [DEC] alone, and yes and no share the probability between them.

    Args:
        model: Of transformers.
        tokenizer: BERT's with [DEC] and [ENC] added.
    """

    def __init__(self, model: BlipForQuestionAnswering, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.encode_id, self.decode_id, self.yes_id, self.no_id = (
            _token_id(tokenizer, token) for token in ("[ENC]", "[DEC]", "yes", "no")
        )

    @classmethod
    def read(cls, folder: Path) -> BlipVQA:
        """Read a converted folder, in float32."""
        from transformers import BlipForQuestionAnswering

        from cotgen_pl.checkpoints import read_weights

        model = read_weights(str(folder), BlipForQuestionAnswering, dtype=torch.float32)
        return cls(model, read_bert_tokenizer(folder, model.config.text_config.vocab_size))

    def forward(self, images: Tensor, pictures: Sequence[int], questions: Sequence[str]) -> Tensor:
        """Probability of "yes" against "no" for each question about its picture.

        Questions of one length are asked together, at most B at once. None is padded: transformers
        5.17 to 5.23 let the decoder look at padding (BlipTextAttention.forward loses the mask of
        cross-attention), and an answer would depend on the other questions.

        Args:
            images: [B, 3, H, W] in [0, 1].
            pictures: Q row numbers of `images`; a picture is encoded once, however often it is
                asked about.
            questions: Q of them.

        Returns:
            [Q] float32.
        """
        features = self._encode_pictures(images)
        tokens = self.tokenize(questions)
        probabilities = torch.empty(len(questions), device=images.device)
        for length in sorted({len(ids) for ids in tokens}):
            asked = [i for i, ids in enumerate(tokens) if len(ids) == length]
            for start in range(0, len(asked), len(images)):
                part = asked[start : start + len(images)]
                token_ids = torch.tensor([tokens[i] for i in part], device=images.device)
                probabilities[part] = self._ask(features[[pictures[i] for i in part]], token_ids)
        return probabilities

    def prepare_pictures(self, images: Tensor) -> Tensor:
        """Squash pictures [B, 3, H, W] to the network's square and normalise them."""
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        vision: Any = self.model.config.vision_config
        resized = resize(images, vision.image_size, vision.image_size)
        return normalise(resized, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def tokenize(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of the cleaned questions: [ENC], word pieces, [SEP]."""
        cleaned = [clean_question(question) for question in questions]
        tokens = self.tokenizer(cleaned, truncation=True, max_length=LONGEST_QUESTION)
        return [[self.encode_id, *ids[1:]] for ids in tokens["input_ids"]]

    def _encode_pictures(self, images: Tensor) -> Tensor:
        pixels = self.prepare_pictures(images)  # cast to the weights' dtype by the network
        encoded: Tensor = self.model.vision_model(pixel_values=pixels).last_hidden_state
        return encoded  # [B, N, D]

    def _ask(self, features: Tensor, token_ids: Tensor) -> Tensor:
        """Probabilities [Q] for features [Q, N, D] and questions [Q, L]."""
        # Its forward is bidirectional although its config says decoder, as it must be here.
        asked = self.model.text_encoder(input_ids=token_ids, encoder_hidden_states=features)
        logits = self.model.text_decoder(
            input_ids=torch.full_like(token_ids[:, :1], self.decode_id),
            encoder_hidden_states=asked.last_hidden_state,
            use_cache=False,
        ).logits[:, 0]  # [Q, V]
        yes, no = logits[:, self.yes_id].float(), logits[:, self.no_id].float()
        return torch.sigmoid(yes - no)  # p_yes / (p_yes + p_no), without 0 / 0


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise ValueError(
            f"BLIP-VQA tokenizer: expected {token!r} as a single token, got none; convert the "
            "checkpoint again with BERT's own tokenizer (bert-base-uncased)"
        )
    return int(index)
