"""Drawing image tokens: guidance, keyed noise and one decoding loop for every policy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cotgen_pl.interfaces import Policy

LogprobMode = Literal["conditional", "guided", "guided_detached"]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: u + scale * (c - u), in at least float32.

    Source: generation_inference.py of github.com/deepseek-ai/Janus at 1daa72f. It computes in
    bfloat16; there the rounding error of the result is about sqrt(scale^2 + (scale-1)^2) times that
    of one logit, so this is a deviation on purpose.

    >>> guide(torch.tensor([2.0]), torch.tensor([1.0]), 5.0)
    tensor([6.])
    """
    conditional, unconditional = _at_least_float32(conditional), _at_least_float32(unconditional)
    return unconditional + scale * (conditional - unconditional)


def noise_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as (run seed, "rollout", rollout, prompt, occurrence, copy).

    Equal keys give equal seeds on every machine; keys that differ anywhere give unrelated ones.

    >>> noise_seed(0, "rollout", 1) == noise_seed(0, "rollout", 1)
    True
    >>> noise_seed(1, "2") == noise_seed(12, "")
    False
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform_noise(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """One uniform number in [0, 1) per token, [B, T] float64 on the CPU; row b has seeds[b]."""
    noise = torch.empty(len(seeds), num_tokens, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in enumerate(seeds):
        generator.manual_seed(seed)
        noise[row].uniform_(generator=generator)
    return noise


@torch.no_grad()
def sample_tokens(
    policy: Policy,
    prompts: Sequence[str],
    *,
    guidance: float,
    temperature: float = 1.0,
    seeds: Sequence[int],
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw images, token by token, all at once.

    Args:
        policy: Draws.
        prompts: P texts.
        guidance: Weight of classifier-free guidance; 1 is none and costs half.
        temperature: Divides the guided logits.
        seeds: One per image, P * copies of them: the copies of prompt 0 first. An image depends on
            its prompt and its own seed, not on the rest of the batch.
        top_k: Keep only the k likeliest tokens; 1 is greedy. Not for training, whose log-probs do
            not know it.
        top_p: Keep only the likeliest tokens that together reach this probability; likewise.

    Returns:
        Tokens [B, T] int64, and their log-probabilities [B, T], in nats, under the distribution
        that they were drawn from (after guidance, temperature, top-k and top-p).
    """
    _check_sampling(len(prompts), len(seeds), guidance, temperature, top_k, top_p)
    copies, guided = len(seeds) // len(prompts), guidance != 1.0
    logits, cache = policy.prefill(prompts, guided=guided, copies=copies)
    noise = uniform_noise(seeds, policy.num_tokens).to(logits.device)
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    for position in range(policy.num_tokens):
        if position:
            logits = policy.step(tokens[-1], cache)
        if guided:
            conditional, unconditional = logits.tensor_split(2)
            logits = guide(conditional, unconditional, guidance)
        scores = keep_likeliest(_at_least_float32(logits) / temperature, top_k, top_p)
        scores = scores.log_softmax(-1)
        tokens.append(_inverse_cdf(scores.exp(), noise[:, position]))
        logprobs.append(scores.gather(-1, tokens[-1][:, None])[:, 0])
    return torch.stack(tokens, 1), torch.stack(logprobs, 1)


def forced_logits(
    policy: Policy,
    prompts: Sequence[str],
    tokens: Tensor,
    *,
    guidance: float,
    mode: LogprobMode = "guided",
) -> Tensor:
    """Logits of given tokens by teacher forcing, [B, T, V], of the distribution that `mode` names.

    Args:
        policy: Whose logits.
        prompts: B texts.
        tokens: [B, T] int64.
        guidance: Weight of classifier-free guidance.
        mode: `guided` is what is sampled. `guided_detached` has the same values, but no gradient
            flows through the unconditional branch: half the backward work. `conditional` leaves
            guidance out: half of all the work, and another distribution than the sampled one
            unless guidance is 1.
    """
    conditional = policy.logits(prompts, tokens)
    if guidance == 1 or mode == "conditional":
        return conditional
    with torch.set_grad_enabled(torch.is_grad_enabled() and mode == "guided"):
        unconditional = policy.logits(prompts, tokens, unconditional=True)
    return guide(conditional, unconditional, guidance)


def keep_likeliest(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set all but the likeliest tokens to minus infinity, [B, V]; top-k acts before top-p.

    The likeliest token always stays. Ties at the k-th place go to the lower token.

    >>> keep_likeliest(torch.tensor([[1.0, 3.0, 2.0]]), top_k=2)
    tensor([[-inf, 3., 2.]])
    """
    if top_k is None and top_p is None:
        return logits
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    dropped = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k is not None:
        dropped[:, top_k:] = True
    if top_p is not None and top_p < 1:
        probabilities = ordered.masked_fill(dropped, -math.inf).softmax(-1)
        dropped |= probabilities.cumsum(-1) - probabilities >= top_p
    dropped[:, 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)


def _inverse_cdf(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The token, [B], at which the running sum of [B, V] probabilities first passes noise [B].

    In float64, where sums of 16,384 float32 numbers hardly round: a GPU adds in parallel, and in
    float32 its running sum may rise over a token of probability 0.
    """
    total = probabilities.double().cumsum(-1)
    end = total[:, -1:]
    target = noise[:, None] * end
    # A product that rounds up to the whole sum would point past the last token.
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
    return torch.searchsorted(total, target, right=True)[:, 0]


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_sampling(
    num_prompts: int,
    num_images: int,
    guidance: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not num_prompts or not num_images or num_images % num_prompts:
        raise ValueError(
            f"{num_images} seeds do not split over {num_prompts} prompts; "
            "give the same number of seeds for each prompt"
        )
    check_guidance(guidance)
    if not temperature > 0:
        raise ValueError(
            f"expected a temperature above 0, got {temperature}; for greedy sampling set top_k to 1"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(
            f"expected top_k of 1 or more, got {top_k}; leave it out to keep all tokens"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"expected top_p in (0, 1], got {top_p}; leave it out to keep all tokens")


def check_guidance(guidance: float) -> None:
    """Raise a ValueError for a guidance weight below 1: it would push pictures off the prompt."""
    if not guidance >= 1:
        raise ValueError(
            f"expected guidance of 1 (none) or more, got {guidance}; Janus-Pro was made for 5"
        )
