"""Log-probabilities and entropies of tokens, from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from cotgen_pl.losses.inputs import at_least_float32, check_shape


def token_statistics(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens, and entropies, from one log-softmax.

    Args:
        logits: [B, T, V].
        tokens: [B, T] int64.
        temperature: Divides the logits, above 0; the one that the tokens were sampled with.
        entropy_gradient: Keep the entropies' graph, two more [B, T, V], as a bonus needs it.

    Returns:
        Log-probabilities and entropies (nats, 0 to ln V), [B, T] each, float32 or float64.

    >>> logprobs, entropy = token_statistics(torch.zeros(1, 1, 4), torch.tensor([[3]]))
    >>> round(logprobs.item(), 4), round(entropy.item(), 4)
    (-1.3863, 1.3863)
    """
    distribution = _log_softmax(logits, temperature)
    entropy = _entropy(distribution if entropy_gradient else distribution.detach())
    return _pick(distribution, tokens), entropy


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [B, T] of tokens [B, T] under logits [B, T, V], as `token_statistics`.

    >>> token_logprobs(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1]]), temperature=0.5)
    tensor([[-0.1269]])
    """
    return _pick(_log_softmax(logits, temperature), tokens)


def sum_logprobs(logprobs: Tensor) -> Tensor:
    """Log-probabilities of whole images, [B], float32 or float64, from those of tokens [B, T].

    For policy and reference alike: summed in float64, where the order of the terms, which differs
    between batch shapes, leaves no trace. In float32 it does: 576 tokens sum to about -4000, where
    neighbouring numbers are 0.0002 apart.

    >>> sum_logprobs(torch.tensor([[-1.0, -2.0]]))
    tensor([-3.])
    """
    return logprobs.sum(dim=1, dtype=torch.float64).to(at_least_float32(logprobs).dtype)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}; set it to 1")
    if temperature != 1:  # at 1, log_softmax casts by itself and saves a copy of [B, T, V]
        logits = at_least_float32(logits) / temperature
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _pick(distribution: Tensor, tokens: Tensor) -> Tensor:
    check_shape("tokens", tokens, distribution.shape[:-1])
    return distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _entropy(distribution: Tensor) -> Tensor:
    # Not torch.special.entr, whose gradient is NaN where a probability underflows to 0.
    return -(distribution.exp() * distribution).sum(dim=-1)
