"""The GRPO loss against arithmetic written out by hand."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cotgen_pl import losses
from cotgen_pl.losses import grpo_loss, token_logprobs, token_statistics
from tests.losses.example import (
    ADVANTAGES,
    OLD,
    RATIOS,
    REFERENCE_GAPS,
    gradient_of,
    logprobs_of,
)

NAN = float("nan")


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
