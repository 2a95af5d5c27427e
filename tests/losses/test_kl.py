"""KL estimators: exact values and gradients on a small categorical, by enumeration."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cotgen_pl import losses
from cotgen_pl.losses import grpo_loss, k1_penalty, kl_estimate
from tests.losses.example import (
    ADVANTAGES,
    LN2,
    OLD,
    RATIOS,
    REFERENCE_GAPS,
    gradient_of,
    logprobs_of,
)


def kl_gradients(weights: Tensor, logits: Tensor, reference: Tensor, name: Any) -> Tensor:
    """Gradient of the estimator's mean over samples drawn by `weights`, every code enumerated."""
    logprobs = logits.log_softmax(0)
    ratio = (logprobs - weights.log()).exp()
    values = kl_estimate(logprobs[None], reference.log()[None], name, ratio=ratio[None])[0]
    return gradient_of((weights * values).sum(), logits)


@pytest.fixture
def categorical() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, reference, and the exact gradients of KL(policy, reference) and the reverse."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    policy = logits.softmax(0)
    forward = (policy * (policy.log() - reference.log())).sum()
    reverse = (reference * (reference.log() - policy.log())).sum()
    return logits, reference, gradient_of(forward, logits), gradient_of(reverse, logits)


def test_gradient_of_each_kl_estimator(categorical: tuple[Tensor, ...]) -> None:
    logits, reference, exact, reverse = categorical
    policy = logits.detach().softmax(0)
    assert (exact - reverse).abs().max() > 0.05  # else the test could not tell them apart
    for name in ("k2", "k3_ratio", "k3_value_k2_gradient"):
        assert_close(kl_gradients(policy, logits, reference, name), exact)
    assert_close(kl_gradients(policy, logits, reference, "k3"), reverse)


def test_only_the_ratio_keeps_the_kl_gradient_exact_off_policy(
    categorical: tuple[Tensor, ...],
) -> None:
    logits, reference, exact, _ = categorical
    old = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert_close(kl_gradients(old, logits, reference, "k3_ratio"), exact)
    for name in ("k2", "k3", "k3_value_k2_gradient"):
        assert (kl_gradients(old, logits, reference, name) - exact).abs().max() > 0.01


def test_value_of_each_kl_estimator(categorical: tuple[Tensor, ...]) -> None:
    logits, reference = categorical[0].detach(), categorical[1]
    logprobs = logits.log_softmax(0)
    exact = (logprobs.exp() * (logprobs - reference.log())).sum()
    means = {
        name: (
            logprobs.exp() * kl_estimate(logprobs, reference.log(), name, logprobs * 0 + 1)
        ).sum()
        for name in get_args(losses.KLEstimator)
    }
    assert len(means) == 4
    for name in ("k3", "k3_ratio", "k3_value_k2_gradient"):
        assert_close(means[name], exact)
    assert abs(means["k2"] - exact) > 0.005  # biased: 0.2995 for 0.3091


def test_k1_is_refused_in_the_loss_because_its_gradient_is_zero(
    categorical: tuple[Tensor, ...],
) -> None:
    logits, reference, *_ = categorical
    logprobs = logits.log_softmax(0)
    as_loss = (logprobs.detach().exp() * (logprobs - reference.log())).sum()
    assert_close(gradient_of(as_loss, logits), torch.zeros_like(logits))
    k1: Any = "k1"
    with pytest.raises(
        ValueError, match=r"zero on average; .* subtract k1_penalty from the rewards"
    ):
        kl_estimate(logprobs, reference.log(), k1)
    with pytest.raises(ValueError, match="zero on average"):
        grpo_loss(OLD, OLD, None, ADVANTAGES, kl_estimator=k1)


def test_k1_penalty_is_the_log_ratio_of_the_image() -> None:
    logprobs = logprobs_of(RATIOS)
    penalty = k1_penalty(logprobs, logprobs.detach() + REFERENCE_GAPS)
    assert_close(penalty, torch.tensor([-LN2, LN2]))
    assert not penalty.requires_grad


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reference_logprobs of shape \[2, 3\], got \[3\]"):
        kl_estimate(OLD, OLD[0], "k3")
    with pytest.raises(ValueError, match="the ratio to the old policy for k3_ratio, got None"):
        kl_estimate(OLD, OLD, "k3_ratio")
