"""How far the policy has moved from its start, along pictures of held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cotgen_pl.interfaces import Policy, Prompt
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.sampling import forced_logits


def divergence(
    module: PolicyModule, prompts: Sequence[Prompt], num_images: int, batch_size: int
) -> float:
    """KL(policy || start) of the sampled distribution, mean per token, along some images.

    Args:
        module: Whose policy draws.
        prompts: Of a suite.
        num_images: Images at most, one each of prompts that are spread over all of them.
        batch_size: Images drawn at a time.
    """
    spread = prompts[:: max(1, len(prompts) // num_images)][:num_images]
    total = 0.0
    for first in range(0, len(spread), batch_size):
        part = spread[first : first + batch_size]
        tokens, _ = module.draw(part, 1, "evaluation")
        now = _sampled_distribution(module, module.policy, part, tokens)
        with module.start_weights() as base:
            then = _sampled_distribution(module, base, part, tokens)
        total += (now.exp() * (now - then)).sum(-1).mean(1).sum().item()
    return total / len(spread)


def _sampled_distribution(
    module: PolicyModule, policy: Policy, prompts: Sequence[Prompt], tokens: Tensor
) -> Tensor:
    """Log-probabilities of the whole codebook, [B, T, V], as they were sampled from."""
    with module.precision():
        logits = forced_logits(
            policy, [p.drawn_text for p in prompts], tokens, guidance=module.guidance, mode="guided"
        )
    return (logits.float() / module.temperature).log_softmax(-1)
