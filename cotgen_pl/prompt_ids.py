"""Prompts as the token ids that a Janus reads before it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BEGIN_OF_IMAGE = "<begin_of_image>"


@dataclass(frozen=True)
class PromptReader:
    """Turns texts into rows of ids: BOS, the templated prompt, begin-of-image."""

    path: str
    """Of the checkpoint, for messages."""
    tokenizer: Any
    template: str
    """With a place for `prompt`."""
    begin_of_image: int
    """Its id."""
    pad: int
    """Its id."""
    context: int
    """Tokens of prompt and picture together, at most."""
    num_tokens: int
    """Of the picture."""

    def read(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt, all in one call of the tokenizer.

        Raises:
            ValueError: A prompt and its picture are longer than the model's context.
        """
        texts = [self.template.format(prompt=prompt.strip()) for prompt in prompts]
        rows: list[list[int]] = self.tokenizer([text + BEGIN_OF_IMAGE for text in texts]).input_ids
        for prompt, ids in zip(prompts, rows, strict=True):
            self._check(prompt, ids)
        return rows

    def _check(self, prompt: str, ids: list[int]) -> None:
        if ids[0] != self.tokenizer.bos_token_id or ids[-1] != self.begin_of_image:
            raise ValueError(
                f"expected {self.path}'s tokenizer to put BOS first and {BEGIN_OF_IMAGE} last, "
                f"got {self.tokenizer.convert_ids_to_tokens(ids)}; convert the checkpoint again"
            )
        room = self.context - self.num_tokens
        if len(ids) > room:
            raise ValueError(
                f"expected a prompt of at most {room} tokens beside {self.num_tokens} of the "
                f"picture, got {len(ids)}; shorten: {prompt[:80]!r}"
            )

    def unconditional(self, length: int) -> list[int]:
        """BOS, pads, begin-of-image: as long as the prompt itself, all positions attended.

        Source: generation_inference.py of github.com/deepseek-ai/Janus at 1daa72f. The batch is
        padded on the left with the prompt's mask, so a row does not depend on its neighbours.
        """
        return [self.tokenizer.bos_token_id, *[self.pad] * (length - 2), self.begin_of_image]

    def read_branches(
        self, prompts: Sequence[str], unconditional: bool | Tensor
    ) -> list[tuple[int, ...]]:
        """The ids of each prompt, or of its unconditional row: all alike, or as [P] bool says."""
        dropped = torch.as_tensor(unconditional).expand(len(prompts)).tolist()
        rows = zip(self.read(prompts), dropped, strict=True)
        return [tuple(self.unconditional(len(row)) if drop else row) for row, drop in rows]

    def pad_left(
        self, rows: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of rows, [R, L] each."""
        longest = max(map(len, rows))
        ids = [[self.pad] * (longest - len(row)) + list(row) for row in rows]
        mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
