"""Low-rank adapters and quantised base weights, through peft and bitsandbytes.

Kept apart from the policies because it serves any language model of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Policy


@dataclass
class LoraSettings:
    """Low-rank adapters; without dropout, because replayed log-probs must agree."""

    rank: int = 16
    alpha: int = 32


def add_adapters(model: nn.Module, settings: LoraSettings, targets: str) -> Any:
    """Wrap a model into peft's, with adapters on the linear layers whose full name matches."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
    return get_peft_model(model, config)


def quantization_config(
    bits: Literal["4bit", "8bit"] | None, compute_dtype: torch.dtype, kept: list[str]
) -> Any:
    """NF4 (QLoRA, arXiv 2305.14314) or LLM.int8 (arXiv 2208.07339) for all but the kept modules."""
    if bits is None:
        return None
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=kept,
    )


class AdaptersOff(Policy):
    """A policy before its adapters: the same weights, read with adapters switched off.

    Args:
        policy: A policy whose `model` is peft's.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self._policy = (policy,)  # a tuple hides it from nn.Module: parameters are counted once
        self.num_tokens, self.codebook_size = policy.num_tokens, policy.codebook_size

    @property
    def adapted(self) -> Any:
        """The policy with its adapters."""
        return self._policy[0]

    def load(self) -> Policy:
        """Do nothing: the weights are the policy's own."""
        return self

    def logits(
        self, prompts: Sequence[str], tokens: Tensor, unconditional: bool | Tensor = False
    ) -> Tensor:
        """See `Policy.logits`."""
        with self.adapted.model.disable_adapter():
            return self.adapted.logits(prompts, tokens, unconditional)

    def prefill(
        self, prompts: Sequence[str], *, guided: bool, copies: int = 1
    ) -> tuple[Tensor, Any]:
        """See `Policy.prefill`; the cache's memory is the policy's own."""
        with self.adapted.model.disable_adapter():
            return self.adapted.prefill(prompts, guided=guided, copies=copies)

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        """See `Policy.step`."""
        with self.adapted.model.disable_adapter():
            return self.adapted.step(tokens, cache)

    def decode(self, tokens: Tensor) -> Tensor:
        """See `Policy.decode`."""
        return self.adapted.decode(tokens)

    def encode(self, images: Tensor) -> Tensor:
        """See `Policy.encode`."""
        return self.adapted.encode(images)

    def reference(self) -> Policy:
        """Itself: nothing in it changes."""
        return self

    def blocks(self) -> list[nn.Module]:
        """The policy's own layers."""
        return self.adapted.blocks()

    def export(self, folder: Path, *, merge_adapters: bool = True) -> None:
        """Refuse: the weights before the adapters are the checkpoint that was loaded."""
        raise ValueError(
            f"expected a policy to write to {folder}, got the reference of a LoRA policy, which "
            "is its start checkpoint; export the policy instead"
        )
