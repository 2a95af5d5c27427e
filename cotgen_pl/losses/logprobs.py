"""Log-probabilities and entropies of tokens, from logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cotgen_pl.losses.inputs import at_least_float32, check_shape

# Of a distribution that is held at once: 17 MB in float32, enough to keep a GPU busy.
NUMBERS_AT_ONCE = 1 << 22


def token_statistics(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens, and entropies; of [B, T, V], only the logits are kept.

    Neither a log-softmax nor a probability outlives the rows that it is read for: the backward pass
    makes them again. Both passes go through the rows in parts of `NUMBERS_AT_ONCE`.

    Args:
        logits: [B, T, V].
        tokens: [B, T] int64.
        temperature: Divides the logits, above 0; the one that the tokens were sampled with.
        entropy_gradient: Give entropies that carry gradients, as a bonus needs them.

    Returns:
        Log-probabilities and entropies (nats, 0 to ln V), [B, T] each, float32 or float64.

    >>> logprobs, entropy = token_statistics(torch.zeros(1, 1, 4), torch.tensor([[3]]))
    >>> round(logprobs.item(), 4), round(entropy.item(), 4)
    (-1.3863, 1.3863)
    """
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}; set it to 1")
    check_shape("tokens", tokens, logits.shape[:-1])
    rows, picked = logits.flatten(0, -2), tokens.flatten()
    logprobs, entropy = _Statistics.apply(rows, picked, temperature)
    entropy = entropy if entropy_gradient else entropy.detach()
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [B, T] of tokens [B, T] under logits [B, T, V], as `token_statistics`.

    >>> token_logprobs(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1]]), temperature=0.5)
    tensor([[-0.1269]])
    """
    return token_statistics(logits, tokens, temperature)[0]


def sum_logprobs(logprobs: Tensor) -> Tensor:
    """Log-probabilities of whole images, [B], float32 or float64, from those of tokens [B, T].

    For policy and reference alike: summed in float64, where the order of the terms, which differs
    between batch shapes, leaves no trace. In float32 it does: 576 tokens sum to about -4000, where
    neighbouring numbers are 0.0002 apart.

    >>> sum_logprobs(torch.tensor([[-1.0, -2.0]]))
    tensor([-3.])
    """
    return logprobs.sum(dim=1, dtype=torch.float64).to(at_least_float32(logprobs).dtype)


class _Statistics(torch.autograd.Function):
    """Log-probabilities and entropies, [N] each, of rows [N, V] and the token [N] of each.

    With log-probabilities l, probabilities p and entropy H of a row, the gradient by its logits is
    (1 - p) at the token and -p elsewhere for the token's log-probability, and -p (l + H) for H.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logprobs, entropies = (logits.new_empty(len(logits), dtype=dtype) for _ in range(2))
        for part in _parts(logits):
            distribution = _log_softmax(logits[part], temperature)
            logprobs[part] = distribution.gather(1, tokens[part, None])[:, 0]
            entropies[part] = _entropy(distribution)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_logprobs: Tensor | None, by_entropies: Tensor | None
    ) -> tuple[Tensor, None, None]:
        logits, tokens = ctx.saved_tensors
        gradients = torch.empty_like(logits)
        for part in _parts(logits):
            gradients[part] = _gradient(
                _log_softmax(logits[part], ctx.temperature),
                tokens[part, None],
                None if by_logprobs is None else by_logprobs[part, None],
                None if by_entropies is None else by_entropies[part, None],
            ).div_(ctx.temperature)
        return gradients, None, None


def _gradient(
    distribution: Tensor, tokens: Tensor, by_logprobs: Tensor | None, by_entropies: Tensor | None
) -> Tensor:
    """By the scaled logits, [n, V]; all others are [n, 1]. Overwrites the distribution."""
    if by_entropies is None:
        gradient = torch.zeros_like(distribution)
    else:
        entropy = _entropy(distribution)[:, None]
        gradient = (distribution + entropy).mul_(-by_entropies)
    if by_logprobs is None:
        return gradient.mul_(distribution.exp_())
    gradient -= by_logprobs
    gradient *= distribution.exp_()
    return gradient.scatter_add_(1, tokens, by_logprobs)


def _parts(rows: Tensor) -> Iterator[slice]:
    size = max(1, NUMBERS_AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1:  # at 1, log_softmax casts by itself and saves a copy of [B, T, V]
        logits = at_least_float32(logits) / temperature
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _entropy(distribution: Tensor) -> Tensor:
    # Not torch.special.entr, whose gradient is NaN where a probability underflows to 0.
    return -distribution.exp().mul_(distribution).sum(dim=-1)
