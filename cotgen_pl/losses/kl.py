"""Estimates of the KL divergence between policy and reference, from sampled tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cotgen_pl.interfaces import check_choice
from cotgen_pl.losses.inputs import check_shape

KLEstimator = Literal["k2", "k3", "k3_ratio", "k3_value_k2_gradient"]

MAX_LOG_RATIO = 20.0  # before exp, which overflows at 88; verl's bound (trainer/ppo/core_algos.py)


def kl_estimate(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    estimator: KLEstimator,
    ratio: Tensor | None = None,
) -> Tensor:
    """KL divergence to the reference at each sampled token, [B, T], to be averaged into a loss.

    With policy π, reference q and d = log q - log π (joschu.net/blog/kl-approx.html):
    `k2`: d² / 2, a biased value with the gradient of KL(π‖q) (2506.09477).
    `k3`: exp(d) - d - 1, the value of KL(π‖q) with the gradient of KL(q‖π) (2402.03300, eq. 4).
    `k3_ratio`: k3 times π / old; value and gradient of KL(π‖q), on samples of old (2512.02556).
    `k3_value_k2_gradient`: value and gradient of KL(π‖q) on samples of π (verl's `k3+`).

    Args:
        logprobs: [B, T], with gradient.
        reference_logprobs: [B, T].
        estimator: One of the four. In k3, d stops at `MAX_LOG_RATIO`, where its gradient is 0.
        ratio: [B, T], π / old of each token with gradient, for `k3_ratio` only.

    >>> import torch
    >>> kl_estimate(torch.tensor([[-2.0]]), torch.tensor([[-1.0]]), "k3")
    tensor([[0.7183]])
    """
    check_kl_estimator(estimator)
    check_shape("reference_logprobs", reference_logprobs, logprobs.shape)
    difference = reference_logprobs.detach() - logprobs
    bounded = difference.clamp(max=MAX_LOG_RATIO)
    k2, k3 = difference.square() / 2, bounded.exp() - bounded - 1
    if estimator == "k2":
        return k2
    if estimator == "k3_value_k2_gradient":
        return k2 - k2.detach() + k3.detach()
    if estimator == "k3":
        return k3
    if ratio is None:
        raise ValueError("expected the ratio to the old policy for k3_ratio, got None; pass it")
    return ratio * k3


def k1_penalty(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The k1 estimate of each image's KL to the reference, [B], to subtract from its *reward*.

    The sum over tokens, because the log-ratio of a whole image is what has the KL as its mean.

    >>> import torch
    >>> k1_penalty(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -3.0]]))
    tensor([1.5000])
    """
    return (logprobs - reference_logprobs).detach().sum(dim=1)


def check_kl_estimator(estimator: str) -> None:
    """Raise a ValueError unless the estimator is one that a loss can use."""
    if estimator == "k1":
        raise ValueError(
            "expected a KL estimator for a loss, got k1, whose gradient there is zero on average; "
            "use k2, k3 or a variant of k3, or subtract k1_penalty from the rewards"
        )
    check_choice("kl_estimator", estimator, KLEstimator)
