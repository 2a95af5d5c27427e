"""Low-rank adapters and quantised base weights, through peft and bitsandbytes; what excludes what.

Kept apart from the policies because it serves any language model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Policy
from cotgen_pl.sharding import own_part, take_values, whole


@dataclass
class LoraSettings:
    """Low-rank adapters; without dropout, because replayed log-probs must agree."""

    rank: int = 16
    alpha: int = 32


def check_training(settings: Any) -> None:
    """Raise a ValueError for settings of what a policy trains that exclude each other."""
    lora, quantize = settings.lora, settings.quantize
    if quantize and not lora:
        raise ValueError(
            f"expected lora beside quantize: {quantize}, got none, and quantised weights "
            "cannot train; add lora: {}"
        )
    if lora and (settings.trains != "language_model" or settings.train_text_embedding):
        raise ValueError(
            f"expected lora to adapt the language model alone, got trains: {settings.trains} and "
            f"train_text_embedding: {settings.train_text_embedding}; leave both out or drop lora"
        )
    if settings.trained_dtype != "float32" and (lora or settings.dtype == "float64"):
        raise ValueError(
            "expected trained_dtype: float32 beside lora or dtype: float64, got "
            f"{settings.trained_dtype}; leave it out"
        )


def train_parts(policy: Any, parts: Sequence[nn.Module]) -> None:
    """Let parts train, beside adapters, and give all that trains its type.

    Args:
        policy: Has its settings `dtype` and `trained_dtype`; nothing but adapters trains in it yet.
        parts: Of it.
    """
    for part in parts:
        part.requires_grad_(True)
    dtype = getattr(torch, "float64" if policy.dtype == "float64" else policy.trained_dtype)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def check_rounding(policy: Policy, make_optimizer: Callable[[list[nn.Parameter]], Any]) -> None:
    """Refuse an optimizer that would lose the small steps of weights in bfloat16.

    Args:
        policy: What trains.
        make_optimizer: Makes the optimizer from parameters.
    """
    if getattr(policy, "trained_dtype", "float32") != "bfloat16":
        return
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))])
    if not getattr(optimizer, "rounds_stochastically", False):
        raise ValueError(
            "expected an optimizer that rounds stochastically beside trained_dtype: bfloat16, "
            f"got {type(optimizer).__name__}, which loses 98 of 100 steps of size 1e-6; use "
            "cotgen_pl.optimizers.StochasticAdamW8bit, or trained_dtype: float32"
        )


def add_adapters(model: nn.Module, settings: LoraSettings, targets: str) -> Any:
    """Wrap a model into peft's, with adapters on the linear layers whose full name matches.

    They begin by the seed that torch was given last, whatever has been drawn since.
    """
    from peft import LoraConfig, get_peft_model

    _keep_differentiable(model)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        return get_peft_model(model, config)


def _keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for its CPU kernel.

    On CPUs with AVX512-BF16, a layer in evaluation mode (where policies stay) packs its weights in
    place at the first input without gradient, such as sampling's. That kernel passes no gradient
    to the layers below, and its packing fails on rows shorter than a block of 64 weights.
    """
    layer: Any  # torch types no attributes of modules
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # bitsandbytes.nn.Linear4bit
            layer.support_avx512bf16_for_cpu = False


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


class AdaptersThen(Policy):
    """A LoRA policy as it was when this was made: the same base weights under adapters of then.

    Adapters that have not learnt yet are switched off, which is the same and costs nothing; others
    are copied, and the copies lent to the policy's model while this one computes.

    Args:
        policy: A policy whose `model` is peft's.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self._policy = (policy,)  # a tuple hides it from nn.Module: parameters are counted once
        self.num_tokens, self.codebook_size = policy.num_tokens, policy.codebook_size
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        fresh = all("lora_" in name for name in trained) and not any(
            whole(p.detach()).any() for name, p in trained.items() if "lora_B" in name
        )
        self._weights = None if fresh else {n: p.detach().clone() for n, p in trained.items()}

    @property
    def adapted(self) -> Any:
        """The policy with its adapters."""
        return self._policy[0]

    @contextmanager
    def _then(self) -> Iterator[Any]:
        if self._weights is None:
            with self.adapted.model.disable_adapter():
                yield self.adapted
        else:
            with lend_weights(self.adapted, self._weights):
                yield self.adapted

    def load(self, *, empty: bool = False) -> Policy:
        """Do nothing: the weights are the policy's own."""
        return self

    def logits(
        self, prompts: Sequence[str], tokens: Tensor, unconditional: bool | Tensor = False
    ) -> Tensor:
        """See `Policy.logits`; without gradient, for the weights are lent for this call only."""
        with self._then() as policy, torch.no_grad():
            return policy.logits(prompts, tokens, unconditional)

    def prefill(
        self, prompts: Sequence[str], *, guided: bool, copies: int = 1
    ) -> tuple[Tensor, Any]:
        """See `Policy.prefill`; the cache's memory is the policy's own."""
        with self._then() as policy:
            return policy.prefill(prompts, guided=guided, copies=copies)

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        """See `Policy.step`."""
        with self._then() as policy:
            return policy.step(tokens, cache)

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
        """Refuse: export the policy itself."""
        raise ValueError(
            f"expected a policy to write to {folder}, got the reference of a LoRA policy, which "
            "only lends it adapters; export the policy instead"
        )


@contextmanager
def lend_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the named parameters of a model other values while the context lasts.

    In their own memory, where a sharded model gathers its weights from; it must be in parts now.
    """
    parameters = dict(model.named_parameters())
    now = {name: own_part(parameters[name].detach()).clone() for name in weights}
    try:
        take_values(parameters, weights)
        yield
    finally:
        take_values(parameters, now)
