"""The paths that pictures are drawn by, held to the slowest one, which is transformers' layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cotgen_pl.sampling import guide, sample_tokens

EAGER = "eager"


def paths_on(device: torch.device) -> list[str]:
    """Those that differ on a device; without a GPU, `graph` is `fused`."""
    return ["graph", "fused", EAGER] if device.type == "cuda" else ["fused", EAGER]


def draw_by(policy: Any, path: str, texts: Sequence[str], guidance: float) -> Tensor:
    """Tokens by a path, [B, T]; image b has seed b.

    Args:
        policy: With `DecodingSettings`.
        path: Of theirs.
        texts: B prompts.
        guidance: Weight of classifier-free guidance.
    """
    policy.decoding = replace(policy.decoding, path=path)
    return sample_tokens(policy, texts, guidance=guidance, seeds=range(len(texts)))[0]


@torch.no_grad()
def stepped_logprobs(
    policy: Any, path: str, texts: Sequence[str], tokens: Tensor, guidance: float
) -> dict[str, Tensor]:
    """Log-probs of given tokens [B, T] as a path's decoding steps have them.

    Returns:
        `conditional` and, with guidance above 1, `guided`; [B, T] each, in nats.
    """
    policy.decoding = replace(policy.decoding, path=path)
    guided = guidance != 1
    logits, cache = policy.prefill(texts, guided=guided, copies=1)
    found: dict[str, list[Tensor]] = {}
    for position, chosen in enumerate(tokens.T):
        if position:
            logits = policy.step(tokens[:, position - 1], cache)
        branches = {"conditional": logits[: len(texts)].float()}
        if guided:
            conditional, unconditional = logits.tensor_split(2)
            branches["guided"] = guide(conditional, unconditional, guidance)
        for name, branch in branches.items():
            logprobs = branch.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
            found.setdefault(name, []).append(logprobs)
    return {name: torch.stack(columns, 1) for name, columns in found.items()}


def compare_paths(policy: Any, texts: Sequence[str], guidance: float) -> dict[str, Any]:
    """How far each path lies from the eager one.

    Returns:
        `equal_tokens`, the share of tokens that sampling by the same seeds has in common, by path;
        for each kind of log-probs, the 99th percentile of the absolute difference on the eager
        path's tokens, by path, in nats. In bfloat16 tokens differ where two nearly tie, and lead to
        others: there the percentile tells.
    """
    device = next(policy.parameters()).device
    tokens = draw_by(policy, EAGER, texts, guidance)
    expected = stepped_logprobs(policy, EAGER, texts, tokens, guidance)
    found: dict[str, Any] = {"equal_tokens": {}} | {f"{name}_logprobs_p99": {} for name in expected}
    for path in paths_on(device)[:-1]:
        same = draw_by(policy, path, texts, guidance) == tokens
        found["equal_tokens"][path] = same.double().mean().item()
        for name, own in stepped_logprobs(policy, path, texts, tokens, guidance).items():
            apart = (own - expected[name]).abs().flatten()
            found[f"{name}_logprobs_p99"][path] = apart.quantile(0.99).item()
    return found
