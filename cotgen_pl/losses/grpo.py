"""The GRPO loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cotgen_pl.interfaces import check_choice
from cotgen_pl.losses.inputs import check_shape
from cotgen_pl.losses.kl import MAX_LOG_RATIO, KLEstimator, check_kl_estimator, kl_estimate

RatioLevel = Literal["token", "sequence"]
PolicyVariant = Literal["clip", "cispo"]


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    level: RatioLevel = "token",
    variant: PolicyVariant = "clip",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of GRPO (2402.03300, eq. 3), the mean over images of the mean over tokens, and metrics.

    Its divisor is B whatever the weights: micro-batch losses, each times its share of the images,
    add up to the loss of all images.

    Args:
        logprobs: [B, T], with gradient.
        old_logprobs: [B, T] of the policy that sampled; at one update per rollout, `logprobs`.
        reference_logprobs: [B, T]; not read when `kl_coef` is 0.
        advantages: [B].
        clip_low: With A < 0, ratios stop at 1 - clip_low. Unused by cispo. Both 0.2 as TRL.
        clip_high: With A > 0, ratios stop at 1 + clip_high (DAPO, 2503.14476: 0.28). For cispo the
            cap itself, about 5.
        delta: With A < 0, the cap of the ratio (two-sided clipping, 2505.07291).
        kl_coef: Weight of the KL term; 0 leaves it and its metric out.
        kl_estimator: See `kl_estimate`; k3_ratio takes token ratios always (TRL: those of `level`).
        level: Ratio of each token, or exp of an image's mean log-ratio (GSPO, 2507.18071, eq. 7;
            its clip_low is 3e-4, its clip_high 4e-4).
        variant: `clip`, or `cispo` (2506.13585): capped ratio, detached, times A times log-prob.
        entropy: [B, T] nats, logged; with gradient if it earns a bonus.
        entropy_coef: Weight of the mean entropy, which the loss subtracts.
        weights: [B]; 0 drops an image's policy, KL and entropy terms.

    Returns:
        The loss and detached metrics. Losses are weighted; ratio, clip shares, `kl` and `entropy`
        count every image. `clip_ratio/low_min` is a minimum over images, `clip_ratio/high_max` a
        maximum; all others average over micro-batches by their share of the images.

    >>> old = torch.tensor([[-1.0, -2.0]])
    >>> loss, metrics = grpo_loss(old + 0.1, old, None, torch.tensor([2.0]))
    >>> round(loss.item(), 4), metrics["clip_ratio/region_mean"].item()
    (-2.2103, 0.0)
    """
    _check_clipping(clip_low, clip_high, delta, variant)
    check_choice("level", level, RatioLevel)
    check_kl_estimator(kl_estimator)
    check_shape("old_logprobs", old_logprobs, logprobs.shape)
    check_shape("advantages", advantages, logprobs.shape[:1])
    weights = torch.ones_like(advantages) if weights is None else weights
    check_shape("weights", weights, advantages.shape)
    log_ratio = logprobs - old_logprobs.detach()
    token_ratio = _bounded_exp(log_ratio)
    ratio = token_ratio if level == "token" else _bounded_exp(log_ratio.mean(1, keepdim=True))
    signal = advantages.unsqueeze(1)  # [B, 1]
    if variant == "cispo":
        terms = -ratio.clamp(max=clip_high).detach() * signal * logprobs
    else:
        capped = ratio if delta is None else ratio.clamp(max=delta)
        terms = -torch.minimum(capped * signal, ratio.clamp(1 - clip_low, 1 + clip_high) * signal)
    loss = _mean_over_images(terms, weights)
    metrics = {"policy_loss": loss, "ratio/mean": ratio.mean()}
    metrics |= _clip_metrics(ratio, signal, clip_low, clip_high, variant)
    if kl_coef != 0:
        if reference_logprobs is None or kl_coef < 0:
            raise ValueError(f"kl_coef {kl_coef}: expected 0, or above 0 and reference_logprobs")
        kl = kl_estimate(logprobs, reference_logprobs, kl_estimator, token_ratio)
        loss = loss + kl_coef * _mean_over_images(kl, weights)
        metrics["kl"] = kl.mean()
    if entropy_coef != 0:
        if entropy is None or (logprobs.requires_grad and not entropy.requires_grad):
            raise ValueError("entropy_coef needs entropy with gradient: set entropy_gradient=True")
        loss = loss - entropy_coef * _mean_over_images(entropy, weights)
    if entropy is not None:
        metrics["entropy"] = entropy.mean()
    metrics["loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    # Deviation from verl: no lower bound, since exp of a very negative number is only 0.
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _mean_over_images(terms: Tensor, weights: Tensor) -> Tensor:
    return (terms.mean(dim=1) * weights).mean()


def _clip_metrics(
    ratio: Tensor, signal: Tensor, clip_low: float, clip_high: float, variant: PolicyVariant
) -> dict[str, Tensor]:
    """Shares of the ratios (of tokens; of images at sequence level) that are held back."""
    if variant == "cispo":
        return {"cispo_clip_ratio": ((ratio > clip_high) & (signal > 0)).float().mean()}
    low = ((ratio < 1 - clip_low) & (signal < 0)).float().mean(dim=1)  # [B]
    high = ((ratio > 1 + clip_high) & (signal > 0)).float().mean(dim=1)
    return {
        "clip_ratio/low_mean": low.mean(),
        "clip_ratio/low_min": low.min(),
        "clip_ratio/high_mean": high.mean(),
        "clip_ratio/high_max": high.max(),
        "clip_ratio/region_mean": (low + high).mean(),
    }


def _check_clipping(
    clip_low: float, clip_high: float, delta: float | None, variant: PolicyVariant
) -> None:
    check_choice("variant", variant, PolicyVariant)
    if min(clip_low, clip_high) < 0:
        raise ValueError(f"expected clip_low, clip_high >= 0, got {clip_low}, {clip_high}; try 0.2")
    if variant == "cispo" and (clip_high < 1 or delta is not None):
        raise ValueError(
            "cispo caps the ratio at clip_high: expected at least 1 and no delta, "
            f"got {clip_high} and {delta}; set clip_high to 5 and leave delta out"
        )
    if delta is not None and delta <= 1 + clip_high:
        raise ValueError(f"expected delta above 1 + clip_high = {1 + clip_high}, got {delta}")
