"""The columns of a pair set, and a pair as a row of them: written from pictures, read as records.

Columns as in Pick-a-Pic (huggingface.co/datasets/yuvalkirstain/pickapic_v1): `caption`, `jpg_0`,
`jpg_1` (bytes of a picture file, here PNG; 0 is the chosen one), `label_0`, `label_1` (1.0 and
0.0). Our own: `tokens_0`, `tokens_1`, `score_0`, `score_1`, `seed_0`, `seed_1` (null where the
policy did not draw), and what restores the `Prompt`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value
from PIL import Image
from torch import Tensor

from cotgen_pl.interfaces import Prompt

PICTURES = {"jpg_0": Value("binary"), "jpg_1": Value("binary")}
TRAINED_ON = {
    "caption": Value("string"),
    "tokens_0": List(Value("int32")),
    "tokens_1": List(Value("int32")),
    "score_0": Value("float32"),
    "score_1": Value("float32"),
    "suite": Value("string"),
    "category": Value("string"),
    "facts": Value("string"),  # JSON: each prompt has facts of its own
    "generation_text": Value("string"),
    "prompt_index": Value("int64"),
    "occurrence": Value("int64"),
}
NOTED = {
    "label_0": Value("float64"),
    "label_1": Value("float64"),
    "seed_0": Value("int64"),
    "seed_1": Value("int64"),
}
FEATURES = Features(PICTURES | TRAINED_ON | NOTED)


@dataclass
class Drawn:
    """Pictures to choose pairs from; the G of one prompt stand side by side."""

    prompts: list[Prompt]
    """P prompts."""
    tokens: Tensor
    """[P * G, T] integers."""
    images: Tensor
    """[P * G, 3, H, W] in [0, 1]."""
    scores: Tensor
    """[P * G], higher is better."""
    seeds: Sequence[int | None]
    """P * G seeds of the noise; None where the policy did not draw."""

    def pairs(self, chosen: Sequence[int], rejected: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of a shard: pair k has image chosen[k] and, of the same prompt, rejected[k]."""
        return [self._pair(*rows) for rows in zip(chosen, rejected, strict=True)]

    def _pair(self, chosen: int, rejected: int) -> dict[str, Any]:
        group_size = len(self.tokens) // len(self.prompts)
        assert chosen // group_size == rejected // group_size, "a pair has one prompt"
        prompt = self.prompts[chosen // group_size]
        row: dict[str, Any] = {
            "caption": prompt.text,
            "suite": prompt.suite,
            "category": prompt.category,
            "facts": json.dumps(prompt.facts, ensure_ascii=False),
            "generation_text": prompt.generation_text,
            "prompt_index": prompt.index,
            "occurrence": prompt.occurrence,
        }
        for side, image in enumerate((chosen, rejected)):
            row |= {
                f"jpg_{side}": encode_png(self.images[image]),
                f"label_{side}": 1.0 - side,
                f"tokens_{side}": self.tokens[image].tolist(),
                f"score_{side}": self.scores[image].item(),
                f"seed_{side}": self.seeds[image],
            }
        return row


def encode_png(image: Tensor) -> bytes:
    """A picture [3, H, W] in [0, 1] as the bytes of a PNG file, 8 bits per channel."""
    pixels = (image.float().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def read_prompts(table: pa.Table) -> list[Prompt]:
    """The prompts of B pairs in a table with the columns of `TRAINED_ON`."""
    return [
        Prompt(
            text=row["caption"],
            suite=row["suite"],
            category=row["category"],
            facts=json.loads(row["facts"]),
            generation_text=row["generation_text"],
            index=row["prompt_index"],
            occurrence=row["occurrence"],
        )
        for row in table.drop_columns(["tokens_0", "tokens_1"]).to_pylist()
    ]


def read_tokens(table: pa.Table, name: str) -> Tensor:
    """Tokens of one side, [B, T] int64."""
    values = table[name].combine_chunks().flatten().to_numpy()
    return torch.from_numpy(values.astype(np.int64)).view(len(table), -1)
