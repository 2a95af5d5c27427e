"""transformers' own image generation as a baseline, on a policy's weights and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from cotgen_pl.interfaces import Policy
from cotgen_pl.sampling import forced_logits, sample_tokens

# In bfloat16 two right programs choose different tokens where two logits nearly tie. A wrong one,
# by another prompt or another position, is off by a deviation of the logits or more.
LARGEST_SHORTFALL = 0.2


def check_generates(guidance: float) -> None:
    """Raise a ValueError where transformers' generate cannot draw with a guidance weight."""
    if not guidance > 1:
        raise ValueError(
            f"expected guidance above 1 beside transformers' generate, got {guidance:g}; it fails "
            "without guidance: set --guidance 5, or measure without --against transformers"
        )


def generate_tokens(
    model: Any, ids: Tensor, mask: Tensor, guidance: float, *, greedy: bool = False
) -> Tensor:
    """Image tokens [B, T] by `generate(generation_mode="image")`, over the whole codebook.

    Args:
        model: transformers' Janus.
        ids: Prompts, padded on the left, [B, L].
        mask: 1 where they are not padding, [B, L].
        guidance: Above 1.
        greedy: Take the likeliest token, do not sample.

    Raises:
        ValueError: This version of transformers draws no pictures.
    """
    settings: dict[str, Any] = {"generation_mode": "image", "guidance_scale": guidance}
    settings |= {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
    try:
        tokens: Tensor = model.generate(input_ids=ids, attention_mask=mask, **settings)
    except TypeError as error:
        if "prefill_chunk_size" not in str(error):
            raise
        raise ValueError(
            "expected a transformers that generates Janus pictures, got version "
            f"{version('transformers')}, which fails ({error}); install 5.23, or measure without "
            "--against transformers"
        ) from error
    return tokens


def check_agreement(
    policy: Policy, texts: Sequence[str], guidance: float, expected: Tensor
) -> float:
    """Hold greedy sampling to transformers' greedy tokens before any time is taken.

    In float32 and float64 all tokens must be equal. In bfloat16 roundings decide between near ties,
    and a token that differs once leads to others: there, 99 % of transformers' tokens must come
    near the likeliest one of our own teacher-forced pass.

    Args:
        policy: Ours.
        texts: B prompts.
        guidance: Above 1.
        expected: Greedy tokens of transformers on the same weights, [B, T].

    Returns:
        Share of equal tokens.

    Raises:
        ValueError: They differ by more than that.
    """
    own, _ = sample_tokens(policy, texts, guidance=guidance, seeds=range(len(texts)), top_k=1)
    equal = (own == expected).double().mean().item()
    rounds = any(weight.dtype == torch.bfloat16 for weight in policy.parameters())
    if equal < 1 and not rounds:
        raise ValueError(
            f"expected the greedy tokens of transformers' generate, got {equal:.1%} of them; the "
            "two do not compute the same, so their speeds do not compare: look for the first "
            "position that differs"
        )
    shortfall = 0.0 if equal == 1 else _shortfall(policy, texts, guidance, expected)
    if not shortfall <= LARGEST_SHORTFALL:  # NaN is no agreement
        raise ValueError(
            "expected 99 % of transformers' greedy tokens within "
            f"{LARGEST_SHORTFALL} deviations of our likeliest ones, got {shortfall:.2f}; the two "
            "do not compute the same, so their speeds do not compare"
        )
    return equal


@torch.no_grad()
def _shortfall(policy: Policy, texts: Sequence[str], guidance: float, tokens: Tensor) -> float:
    """How far tokens [B, T] lie below the likeliest one, in deviations of the position's logits.

    The 99th percentile over all; one picture at a time, for [T, V] logits of many are large.
    """
    parts = []
    for row, text in enumerate(texts):
        logits = forced_logits(policy, [text], tokens[row : row + 1], guidance=guidance)[0]
        chosen = logits.gather(-1, tokens[row][:, None])[:, 0]
        parts.append((logits.amax(-1) - chosen) / logits.std(-1))
    return torch.cat(parts).float().quantile(0.99).item()
