"""Losses against arithmetic written out by hand.

The shared example has two images of three tokens. The old policy gives every token 1/2; the ratios
are chosen, so that the policy's log-probs are log(ratio / 2).
"""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cotgen_pl import losses
from cotgen_pl.losses import (
    combined_advantages,
    dead_groups,
    group_advantages,
    grpo_loss,
    k1_penalty,
    kl_estimate,
    token_entropy,
    token_logprobs,
    token_statistics,
)

NAN = float("nan")
LN2 = math.log(2)
RATIOS = torch.tensor([[1.0, 1.5, 0.5], [0.5, 1.5, 1.0]])
OLD = torch.full((2, 3), 0.5).log()
ADVANTAGES = torch.tensor([1.0, -1.0])
# log reference - log policy: ln 2 at one token of image 1, -ln 2 at one of image 2.
REFERENCE_GAPS = torch.tensor([[LN2, 0.0, 0.0], [0.0, -LN2, 0.0]])


def logprobs_of(ratios: Tensor) -> Tensor:
    return (0.5 * ratios).log().requires_grad_()


def gradient_of(loss: Tensor, logprobs: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logprobs, retain_graph=True)[0]


# Log-probabilities and entropy


def test_log_probs_and_entropy_by_hand() -> None:
    # p = 1/2, 1/4, 1/4: entropy 1/2 ln 2 + 2 * 1/4 * 2 ln 2 = 1.5 ln 2.
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]]).log()
    tokens = torch.tensor([[0, 1]])
    expected = torch.tensor([[-LN2, -2 * LN2]])
    logprobs, entropy = token_statistics(logits, tokens)
    assert_close(logprobs, expected)
    assert_close(entropy, torch.tensor([[1.5 * LN2, 1.5 * LN2]]))
    # Twice the logits at temperature 2 are the same distribution.
    assert_close(token_logprobs(2 * logits, tokens, temperature=2.0), expected)
    assert_close(token_entropy(2 * logits, temperature=2.0), entropy)
    assert_close(token_statistics(2 * logits, tokens, temperature=2.0), (expected, entropy))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_half_precision_logits_give_float32_and_float64_stays(temperature: float) -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(6).reshape(2, 3)
    results = token_statistics(logits, tokens, temperature)
    assert [result.dtype for result in results] == [torch.float32] * 2
    # The bf16 logits are exact in float64: all rounding must be that of float32.
    exact = token_statistics(logits.double(), tokens, temperature)
    assert [result.dtype for result in exact] == [torch.float64] * 2
    assert_close(results, tuple(result.float() for result in exact), rtol=1e-5, atol=1e-5)


def test_entropy_keeps_its_graph_only_on_request() -> None:
    logits = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    tokens = torch.tensor([[0]])
    logprobs, entropy = token_statistics(logits, tokens)
    assert logprobs.requires_grad and not entropy.requires_grad
    entropy = token_statistics(logits, tokens, entropy_gradient=True)[1]
    # dH/dlogit_0 = -p0 p1 (logit_0 - logit_1) for two codes; p0 = 0.731059, p1 = 0.268941.
    assert_close(gradient_of(entropy.sum(), logits)[0, 0, 0], torch.tensor(-0.196612))


def test_entropy_gradient_stays_finite_when_a_probability_underflows() -> None:
    logits = torch.tensor([[[0.0, -200.0]]], requires_grad=True)
    assert gradient_of(token_entropy(logits).sum(), logits).isfinite().all()


# Advantages


def test_advantages_by_hand_for_each_scale() -> None:
    rewards = torch.tensor([0.0, 2.0, 4.0, 10.0])  # group means 1 and 7
    # Sample std of 0, 2: sqrt(2) = 1.414214; of 4, 10: sqrt(18) = 4.242641.
    assert_close(
        group_advantages(rewards, 2, "group"),
        torch.tensor([-1 / 1.414314, 1 / 1.414314, -3 / 4.242741, 3 / 4.242741]),
    )
    # Mean of all 4, squares 16 + 4 + 0 + 36 = 56, std sqrt(56 / 3) = 4.320494.
    assert_close(
        group_advantages(rewards, 2, "batch"),
        torch.tensor([-1.0, 1.0, -3.0, 3.0]) / 4.320594,
    )
    assert_close(group_advantages(rewards, 2, "none"), torch.tensor([-1.0, 1.0, -3.0, 3.0]))


def test_missing_verdicts_count_in_no_mean_and_get_no_advantage() -> None:
    # First group: 1, 3, 5 have mean 3 and std 2. Second: one verdict. Third: none.
    rewards = torch.tensor([1.0, NAN, 3.0, 5.0, NAN, 7.0, NAN, NAN, NAN, NAN, NAN, NAN])
    expected = torch.zeros(12)
    expected[0], expected[3] = -2 / 2.0001, 2 / 2.0001
    assert_close(group_advantages(rewards, 4), expected)
    # Batch: 1, 3, 5, 7 have mean 4 and std sqrt(20 / 3) = 2.581989.
    expected[0], expected[3] = -2 / 2.582089, 2 / 2.582089
    assert_close(group_advantages(rewards, 4, "batch"), expected)
    expected[0], expected[3] = -2.0, 2.0
    assert_close(group_advantages(rewards, 4, "none"), expected)


def test_whole_batch_without_verdicts_gives_zeros() -> None:
    rewards = torch.full((4,), NAN)
    for scale in get_args(losses.AdvantageScale):
        assert group_advantages(rewards, 2, scale).tolist() == [0.0] * 4
    assert dead_groups(rewards, 2).tolist() == [True, True]


def test_parts_summed_by_weight() -> None:
    parts = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([10.0, 0.0])}
    # 2 a + 0.1 b = 1, 2: mean 1.5.
    advantages = combined_advantages(parts, {"a": 2.0, "b": 0.1}, 2, "none")
    assert_close(advantages, torch.tensor([-0.5, 0.5]))


def test_normalise_then_sum_by_hand() -> None:
    parts = {
        "a": torch.tensor([0.0, 2.0, 0.0, 2.0]),
        "b": torch.tensor([30.0, 10.0, 10.0, 30.0]),
    }
    advantages = combined_advantages(parts, {"a": 3.0, "b": 1.0}, 2, combine="normalise_then_sum")
    # z of a pair is -+ half the gap over gap / sqrt(2): -+ 0.707107, less eps. For a (std 1.414214)
    # 1 / 1.414314 = 0.707057, for b (std 14.14214) 10 / 14.14224 = 0.707102.
    # Sums: group 1 -+ (3 * 0.707057 - 0.707102) = -+ 1.414069, group 2 -+ 2.828273.
    # Mean 0, squares 2 * (1.999591 + 7.999128) = 19.997438, std sqrt(19.997438 / 3) = 2.581824.
    near, far = 1.414069 / 2.581924, 2.828273 / 2.581924
    assert_close(advantages, torch.tensor([-near, near, -far, far]), rtol=1e-5, atol=1e-5)


def test_normalise_then_sum_is_blind_to_the_unit_of_a_reward() -> None:
    parts = {
        "a": torch.tensor([0.0, 1.0, 3.0, 1.0, 0.0, 2.0, 5.0, 4.0]),
        "b": torch.tensor([2.0, 1.0, 1.0, 3.0, 4.0, 0.0, 1.0, 2.0]),
    }
    scaled = parts | {"b": 10 * parts["b"]}
    weights = {"a": 1.0, "b": 1.0}
    before, after = (
        combined_advantages(p, weights, 4, combine="normalise_then_sum") for p in (parts, scaled)
    )
    assert_close(before, after, rtol=1e-3, atol=1e-3)  # up to eps 1e-4 beside a std of about 1
    summed_before, summed_after = (combined_advantages(p, weights, 4) for p in (parts, scaled))
    assert (summed_before - summed_after).abs().max() > 0.5


@pytest.mark.parametrize("combine", get_args(losses.RewardCombination))
def test_missing_weighted_part_makes_the_image_missing(combine: Any) -> None:
    parts = {
        "a": torch.tensor([0.0, 1.0, 100.0, 2.0]),
        "b": torch.tensor([1.0, 1.0, NAN, 1.0]),
        "watched": torch.tensor([NAN, NAN, NAN, NAN]),
    }
    advantages = combined_advantages(
        parts, {"a": 1.0, "b": 1.0, "watched": 0.0}, 4, combine=combine
    )
    kept = combined_advantages({"a": torch.tensor([0.0, 1.0, 2.0])}, {"a": 1.0}, 3, combine=combine)
    assert_close(advantages, torch.tensor([kept[0], kept[1], 0.0, kept[2]]), rtol=1e-4, atol=1e-4)
    assert kept[0] < -0.5


@pytest.mark.parametrize(
    ("combine", "scale"),
    [
        ("sum_then_normalise", "group"),
        ("sum_then_normalise", "batch"),
        ("sum_then_normalise", "none"),
        ("normalise_then_sum", "group"),
    ],
)
def test_dead_group_is_counted_and_silent_in_every_mode(combine: Any, scale: Any) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 0.5, 2.0, 5.0, 1.0, 3.0, 3.0, 1.0])
    assert dead_groups(rewards, 3).float().mean().item() == 0.25
    advantages = combined_advantages({"a": rewards}, {"a": 1.0}, 3, scale, combine)
    alive = (advantages.view(4, 3).abs().amax(dim=1) > 0).tolist()
    assert alive == [False, True, True, True]


def test_dead_groups_ignore_rounding_and_see_small_differences() -> None:
    rounded = torch.tensor([0.3, 0.3 * (1 + 1e-7)])
    small = torch.tensor([0.28, 0.2801])  # what two pictures differ by under HPS
    assert dead_groups(torch.cat([rounded, small]), 2).tolist() == [True, False]
    assert group_advantages(rounded, 2).tolist() == [0.0, 0.0]
    # Missing verdicts: two equal ones left, two different ones left, one left.
    gaps = torch.tensor([1.0, NAN, 1.0, 1.0, NAN, 2.0, NAN, 5.0, NAN])
    assert dead_groups(gaps, 3).tolist() == [True, False, True]


# KL estimators


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


# The GRPO loss


def test_clipped_loss_and_every_metric_by_hand() -> None:
    loss, metrics = grpo_loss(logprobs_of(RATIOS), OLD, None, ADVANTAGES)
    # Image 1, A = 1, min(ratio, clipped): 1, 1.2, 0.5: sum 2.7, loss -0.9.
    # Image 2, A = -1, min(-ratio, -clipped): -0.8, -1.5, -1: sum -3.3, loss 1.1. Mean 0.1.
    expected = {
        "policy_loss": 0.1,
        "loss": 0.1,
        "ratio/mean": 1.0,
        "clip_ratio/low_mean": 1 / 6,  # 0.5 < 0.8 in image 2, whose A < 0
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_mean": 1 / 6,  # 1.5 > 1.2 in image 1, whose A > 0
        "clip_ratio/high_max": 1 / 3,
        "clip_ratio/region_mean": 1 / 3,
    }
    assert_close(loss.item(), 0.1)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in metrics.values())


def test_clipped_tokens_have_no_gradient_and_others_that_of_the_ratio() -> None:
    logprobs = logprobs_of(RATIOS)
    loss, _ = grpo_loss(logprobs, OLD, None, ADVANTAGES)
    # -A ratio / (B T) where the unclipped term is the smaller one, else 0.
    expected = torch.tensor([[-1.0, 0.0, -0.5], [0.0, 1.5, 1.0]]) / 6
    assert_close(gradient_of(loss, logprobs), expected)


def test_clip_range_may_be_asymmetric() -> None:
    loss, metrics = grpo_loss(
        logprobs_of(RATIOS), OLD, None, ADVANTAGES, clip_low=0.1, clip_high=0.6
    )
    # Image 1: 1, 1.5, 0.5: sum 3, loss -1. Image 2: -0.9, -1.5, -1: loss 3.4 / 3. Mean 0.2 / 3.
    assert_close(loss.item(), 0.2 / 3)
    assert metrics["clip_ratio/high_mean"].item() == 0
    assert_close(metrics["clip_ratio/low_mean"].item(), 1 / 6)


def test_delta_caps_the_ratio_where_the_advantage_is_negative() -> None:
    logprobs = logprobs_of(RATIOS)
    loss, _ = grpo_loss(logprobs, OLD, None, ADVANTAGES, delta=1.3)
    # Image 1 as before, -0.9. Image 2: -0.8, min(-1.3, -1.2), -1: sum -3.1. Mean (3.1 - 2.7) / 6.
    assert_close(loss.item(), 0.4 / 6)
    assert_close(
        gradient_of(loss, logprobs), torch.tensor([[-1.0, 0.0, -0.5], [0.0, 0.0, 1.0]]) / 6
    )


def test_sequence_level_by_hand() -> None:
    # Geometric means: (1 * 2 * 4)^(1/3) = 2 and (1 * 1/4 * 1/2)^(1/3) = 1/2.
    ratios = torch.tensor([[1.0, 2.0, 4.0], [1.0, 0.25, 0.5]])
    clipped, metrics = grpo_loss(logprobs_of(ratios), OLD, None, ADVANTAGES, level="sequence")
    # -1.2 for image 1 and 0.8 for image 2: both clipped.
    assert_close(clipped.item(), -0.2)
    shares = {name: value.item() for name, value in metrics.items() if "clip" in name}
    assert shares == {
        "clip_ratio/low_mean": 0.5,
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_mean": 0.5,
        "clip_ratio/high_max": 1.0,
        "clip_ratio/region_mean": 1.0,
    }
    logprobs = logprobs_of(ratios)
    loss, _ = grpo_loss(logprobs, OLD, None, -ADVANTAGES, level="sequence")
    # 2 for image 1, -0.5 for image 2: mean 0.75. Gradient -A ratio / (B T), equal for all tokens.
    assert_close(loss.item(), 0.75)
    expected = torch.tensor([[1 / 3] * 3, [-1 / 12] * 3])
    assert_close(gradient_of(loss, logprobs), expected)


def test_cispo_weighs_the_plain_gradient_by_a_detached_ratio() -> None:
    logprobs = logprobs_of(RATIOS)
    advantages = torch.tensor([1.0, -2.0])
    loss, metrics = grpo_loss(logprobs, OLD, None, advantages, clip_high=1.2, variant="cispo")
    # Weights 1, 1.2, 0.5 and 0.5, 1.2, 1; log-probs -0.693147, -0.287682, -1.386294 and reversed.
    # Both images: -0.693147 - 0.345218 - 0.693147 = -1.731512. Mean (1 - 2) * 1.731512 / 6.
    assert_close(loss.item(), -1.731512 / 6, rtol=1e-5, atol=1e-6)
    # The gradient of the plain policy loss is -A / (B T); each weight multiplies it, no more.
    expected = torch.tensor([[-1.0, -1.2, -0.5], [1.0, 2.4, 2.0]]) / 6
    assert_close(gradient_of(loss, logprobs), expected)
    assert_close(metrics["cispo_clip_ratio"].item(), 1 / 6)  # 1.5 > 1.2 where A > 0
    assert not any(name.startswith("clip_ratio") for name in metrics)


def test_cispo_at_sequence_level_by_hand() -> None:
    logprobs = logprobs_of(torch.tensor([[1.0, 2.0, 4.0], [1.0, 0.25, 0.5]]))
    loss, _ = grpo_loss(
        logprobs, OLD, None, ADVANTAGES, clip_high=1.5, variant="cispo", level="sequence"
    )
    # Ratios 2, capped at 1.5, and 0.5.
    assert_close(gradient_of(loss, logprobs), torch.tensor([[-1.5] * 3, [0.5] * 3]) / 6)


@pytest.mark.parametrize(
    ("estimator", "mean_kl"),
    [
        # k2 is 0.240227 at both gaps; k3 is 2 - ln 2 - 1 = 0.306853 and 0.5 + ln 2 - 1 = 0.193147.
        ("k2", 0.480453 / 6),
        ("k3", 0.5 / 6),
        ("k3_value_k2_gradient", 0.5 / 6),
        ("k3_ratio", (1.0 * 0.306853 + 1.5 * 0.193147) / 6),
    ],
)
@pytest.mark.parametrize("level", get_args(losses.RatioLevel))
def test_kl_term_is_added_by_its_coefficient(estimator: Any, mean_kl: float, level: Any) -> None:
    logprobs = logprobs_of(RATIOS)
    reference = logprobs.detach() + REFERENCE_GAPS
    loss, metrics = grpo_loss(
        logprobs, OLD, reference, ADVANTAGES, kl_coef=0.6, kl_estimator=estimator, level=level
    )
    assert_close(metrics["kl"].item(), mean_kl, rtol=1e-5, atol=1e-6)
    policy_loss = grpo_loss(logprobs, OLD, None, ADVANTAGES, level=level)[0].item()
    assert_close(metrics["policy_loss"].item(), policy_loss)
    assert_close(loss.item(), policy_loss + 0.6 * mean_kl, rtol=1e-5, atol=1e-6)
    assert_close(metrics["loss"].item(), loss.item())


def test_entropy_is_logged_and_subtracted_by_its_coefficient() -> None:
    entropy = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]], requires_grad=True)
    loss, metrics = grpo_loss(
        logprobs_of(RATIOS), OLD, None, ADVANTAGES, entropy=entropy, entropy_coef=0.05
    )
    assert_close(loss.item(), 0.1 - 0.05 * 2.0)
    assert metrics["entropy"].item() == 2.0
    assert_close(metrics["policy_loss"].item(), 0.1)
    assert_close(gradient_of(loss, entropy), torch.full((2, 3), -0.05 / 6))
    watched, metrics = grpo_loss(OLD, OLD, None, ADVANTAGES, entropy=entropy)
    assert metrics["entropy"].item() == 2.0 and not watched.requires_grad


@pytest.mark.parametrize("level", get_args(losses.RatioLevel))
def test_first_update_has_ratio_one_nothing_clipped_and_the_plain_gradient(level: Any) -> None:
    logprobs = logprobs_of(RATIOS)
    loss, metrics = grpo_loss(
        logprobs, logprobs.detach(), None, ADVANTAGES, clip_low=3e-4, clip_high=4e-4, level=level
    )
    assert metrics["ratio/mean"].item() == 1
    assert [value.item() for name, value in metrics.items() if "clip" in name] == [0.0] * 5
    plain = torch.tensor([[-1 / 6] * 3, [1 / 6] * 3])
    assert_close(gradient_of(loss, logprobs), plain)
    # The caller may hand in the log-probs themselves.
    attached, _ = grpo_loss(logprobs, logprobs, None, ADVANTAGES, level=level)
    assert_close(gradient_of(attached, logprobs), plain)


def test_dropped_image_has_no_gradient_and_the_divisor_stays() -> None:
    logprobs = logprobs_of(RATIOS)
    entropy = torch.ones(2, 3, requires_grad=True)
    loss, metrics = grpo_loss(
        logprobs,
        OLD,
        logprobs.detach() + REFERENCE_GAPS,
        ADVANTAGES,
        kl_coef=0.6,
        entropy=entropy,
        entropy_coef=0.3,
        weights=torch.tensor([0.0, 1.0]),
    )
    # Image 2 alone: policy 1.1, k3 0.193147 / 3, entropy 1; halved, since B stays 2.
    assert_close(metrics["policy_loss"].item(), 0.55)
    assert_close(loss.item(), (1.1 + 0.6 * 0.193147 / 3 - 0.3) / 2, rtol=1e-5, atol=1e-6)
    by_logprobs, by_entropy = torch.autograd.grad(loss, (logprobs, entropy))
    for gradient in (by_logprobs, by_entropy):
        assert gradient[0].tolist() == [0.0] * 3
        assert gradient[1].abs().sum() > 0
    assert_close(metrics["kl"].item(), 0.5 / 6)  # watched for every image


def test_zero_coefficient_needs_no_reference_and_stays_finite() -> None:
    logprobs = torch.full((2, 3), -100.0, requires_grad=True)
    for reference in (None, torch.zeros(2, 3), torch.full((2, 3), NAN)):
        loss, metrics = grpo_loss(logprobs, logprobs.detach(), reference, ADVANTAGES)
        assert loss.item() == 0  # A sums to 0 at ratio 1
        assert "kl" not in metrics
        assert gradient_of(loss, logprobs).isfinite().all()


@pytest.mark.parametrize("estimator", get_args(losses.KLEstimator))
def test_far_log_probs_stay_finite(estimator: Any) -> None:
    # Log-ratios of +-100 to old and reference; exp(100) is infinite in float32.
    logprobs = torch.tensor([[-100.0, 0.0], [0.0, -100.0]], requires_grad=True)
    old = torch.tensor([[0.0, -100.0], [-100.0, 0.0]])
    loss, _ = grpo_loss(logprobs, old, old, ADVANTAGES, kl_coef=0.1, kl_estimator=estimator)
    assert loss.isfinite()
    assert gradient_of(loss, logprobs).isfinite().all()


# Micro-batches and length variants


@pytest.fixture
def update() -> dict[str, Tensor]:
    """Eight images of three tokens over five codes, some of them clipped."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 3, 5, generator=generator, dtype=torch.float64)
    tokens = torch.randint(5, (8, 3), generator=generator)
    own = token_logprobs(logits, tokens)
    return {
        "logits": logits.requires_grad_(),
        "tokens": tokens,
        "old": own.detach() + 0.3 * torch.randn(8, 3, generator=generator),
        "reference": own.detach() + 0.3 * torch.randn(8, 3, generator=generator),
        "advantages": torch.randn(8, generator=generator, dtype=torch.float64),
        "weights": torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]).double(),
    }


def accumulate(update: dict[str, Tensor], sizes: list[int], **settings: Any) -> tuple[Any, Any]:
    """Gradient by the logits, and metrics averaged by share, over micro-batches of these sizes."""
    averaged: dict[str, float] = {}
    logits, start = update["logits"], 0
    logits.grad = None
    for size in sizes:
        part = {name: values[start : start + size] for name, values in update.items()}
        logprobs, entropy = token_statistics(part["logits"], part["tokens"], entropy_gradient=True)
        loss, metrics = grpo_loss(
            logprobs,
            part["old"],
            part["reference"],
            part["advantages"],
            weights=part["weights"],
            entropy=entropy,
            **settings,
        )
        (loss * size / 8).backward()
        for name, value in metrics.items():
            averaged[name] = averaged.get(name, 0.0) + value.item() * size / 8
        start += size
    assert logits.grad is not None
    return logits.grad.clone(), averaged


@pytest.mark.parametrize("variant", get_args(losses.PolicyVariant))
@pytest.mark.parametrize("level", get_args(losses.RatioLevel))
def test_micro_batches_change_neither_gradient_nor_metrics(
    update: dict[str, Tensor], level: Any, variant: Any
) -> None:
    settings: dict[str, Any] = {
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "level": level,
        "variant": variant,
        "clip_high": 1.1 if variant == "cispo" else 0.1,
    }
    whole, metrics = accumulate(update, [8], **settings)
    assert whole.abs().max() > 1e-3
    for sizes in ([1] * 8, [3, 5]):
        gradient, averaged = accumulate(update, sizes, **settings)
        assert_close(gradient, whole)
        for name in metrics.keys() - {"clip_ratio/low_min", "clip_ratio/high_max"}:
            assert averaged[name] == pytest.approx(metrics[name]), name


# Loss of one micro-batch of b images from its token losses, as each paper aggregates, when the
# rollout has B = 8 images of T = 3 tokens and four micro-batches are averaged.
LENGTH_VARIANTS = {
    "grpo": lambda terms: (terms.sum(1) / 3).mean(),  # per image by its length, then images
    "bnpo": lambda terms: terms.sum() / terms.numel(),  # by the tokens of the micro-batch
    "dapo": lambda terms: terms.sum() / (8 * 3 / 4),  # by the tokens of the rollout
    "dr_grpo": lambda terms: terms.sum() / (len(terms) * 3),  # by a constant, the longest length
}


@pytest.mark.parametrize("name", LENGTH_VARIANTS)
def test_length_variants_coincide_for_images_of_one_length(
    update: dict[str, Tensor], name: str
) -> None:
    update["weights"] = torch.ones(8, dtype=torch.float64)
    ours, _ = accumulate(update, [8])
    logits = update["logits"]
    logits.grad = None
    for start in range(0, 8, 2):
        part = {key: values[start : start + 2] for key, values in update.items()}
        ratio = (token_logprobs(part["logits"], part["tokens"]) - part["old"]).exp()
        advantages = part["advantages"][:, None]
        terms = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        (LENGTH_VARIANTS[name](terms) / 4).backward()
    assert logits.grad is not None
    assert_close(logits.grad, ours)


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 1.2}, r"delta above 1 \+ clip_high = 1.2, got 1.2"),
        ({"clip_low": -0.1}, "got -0.1, 0.2"),
        ({"clip_high": -0.1}, "got 0.2, -0.1"),
        ({"variant": "cispo"}, "expected at least 1 and no delta, got 0.2 and None"),
        ({"variant": "cispo", "clip_high": 5.0, "delta": 9.0}, "got 5.0 and 9.0"),
        ({"kl_coef": 0.1}, "kl_coef 0.1: expected 0, or above 0 and reference_logprobs"),
        ({"kl_coef": -0.1}, "kl_coef -0.1: expected 0"),
        ({"level": "image"}, r"expected level to be one of \('token', 'sequence'\), got 'image'"),
        ({"variant": "sapo"}, "expected variant to be one of"),
        ({"kl_estimator": "k4"}, "expected kl_estimator to be one of"),
        ({"entropy_coef": 0.1}, "entropy with gradient"),
        ({"entropy_coef": 0.1, "entropy": OLD}, "entropy with gradient"),
        ({"weights": torch.ones(2, 1)}, r"weights of shape \[2\], got \[2, 1\]"),
    ],
)
def test_grpo_loss_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_loss(logprobs_of(RATIOS), OLD, None, ADVANTAGES, **settings)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"advantages of shape \[2\], got \[2, 1\]"):
        grpo_loss(OLD, OLD, None, ADVANTAGES[:, None])
    with pytest.raises(ValueError, match=r"old_logprobs of shape \[2, 3\], got \[1, 3\]"):
        grpo_loss(OLD, OLD[:1], None, ADVANTAGES)
    with pytest.raises(ValueError, match=r"reference_logprobs of shape \[2, 3\], got \[3\]"):
        kl_estimate(OLD, OLD[0], "k3")
    with pytest.raises(ValueError, match=r"tokens of shape \[2, 3\], got \[1, 3\]"):
        token_logprobs(torch.zeros(2, 3, 4), torch.zeros(1, 3, dtype=torch.int64))


def test_other_mistakes_are_refused() -> None:
    rewards = torch.zeros(16)
    with pytest.raises(ValueError, match="do not split into groups of 6; set group_size to a div"):
        group_advantages(rewards, 6)
    with pytest.raises(ValueError, match=r"a divisor of 16 that is at least 2"):
        dead_groups(rewards, 1)
    with pytest.raises(ValueError, match="expected scale to be one of"):
        group_advantages(rewards, 4, "rank")  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ValueError, match="normalise_then_sum expects scale 'group', got 'batch'"):
        combined_advantages({"a": rewards}, {"a": 1.0}, 4, "batch", "normalise_then_sum")
    for weights in ({"b": 1.0}, {"a": 0.0}, {}):
        with pytest.raises(ValueError, match=r"some of the parts \['a'\], got"):
            combined_advantages({"a": rewards}, weights, 4)
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        token_entropy(torch.zeros(1, 1, 2), temperature=0.0)
    with pytest.raises(ValueError, match="the ratio to the old policy for k3_ratio, got None"):
        kl_estimate(OLD, OLD, "k3_ratio")
