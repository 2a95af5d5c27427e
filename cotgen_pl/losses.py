"""Log-probabilities, advantages, KL estimators and the GRPO loss: tensors in, tensors out.

Apart from any module or model, so that every formula can be checked on paper. Shapes follow the
legend of `interfaces`; four-digit numbers with a dot name arXiv papers. Every image has T tokens,
so there is one aggregation, the mean over images of the mean over tokens: GRPO's, and for fixed T
also that of BNPO, DAPO and Dr. GRPO.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

AdvantageScale = Literal["group", "batch", "none"]
RewardCombination = Literal["sum_then_normalise", "normalise_then_sum"]
KLEstimator = Literal["k2", "k3", "k3_ratio", "k3_value_k2_gradient"]
RatioLevel = Literal["token", "sequence"]
PolicyVariant = Literal["clip", "cispo"]

STD_EPSILON = 1e-4  # TRL's, added to a std before dividing; shrinks a group of std 0.01 by 1 %
EQUAL_REWARDS = 1e-6  # relative spread that is float32 rounding (eight steps) and no preference
MAX_LOG_RATIO = 20.0  # before exp, which overflows at 88; verl's bound (trainer/ppo/core_algos.py)


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


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropies [B, T] in nats, -sum p log p, of softmax(logits / temperature), logits [B, T, V].

    >>> token_entropy(torch.zeros(1, 1, 2))
    tensor([[0.6931]])
    """
    return _entropy(_log_softmax(logits, temperature))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}; set it to 1")
    if temperature != 1:  # at 1, log_softmax casts by itself and saves a copy of [B, T, V]
        logits = _as_float(logits) / temperature
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _pick(distribution: Tensor, tokens: Tensor) -> Tensor:
    _check_shape("tokens", tokens, distribution.shape[:-1])
    return distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _entropy(distribution: Tensor) -> Tensor:
    # Not torch.special.entr, whose gradient is NaN where a probability underflows to 0.
    return -(distribution.exp() * distribution).sum(dim=-1)


def group_advantages(rewards: Tensor, group_size: int, scale: AdvantageScale = "group") -> Tensor:
    """How much better each image is than its group: (r - mean of the group) / (std + 1e-4), as TRL.

    The std is the sample one (G - 1). Missing verdicts (NaN) are left out of mean and std.
    Deviation from TRL: rewards that differ by rounding only give exactly 0.

    Args:
        rewards: [B], the G images of a prompt adjacent.
        group_size: G, at least 2.
        scale: Whose std divides: the group's (2402.03300, section 4.1.2), the whole batch's (on one
            process, or of rewards gathered from all), or none (2503.20783).

    Returns:
        [B] float32 or float64; 0 for missing verdicts and in `dead_groups`.

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, float("nan")]), group_size=4, scale="none")
    tensor([-2.,  0.,  2.,  0.])
    """
    _check_choice("scale", scale, AdvantageScale)
    groups = _split_groups(rewards, group_size)
    mean, std = _mean_and_std(groups)
    if scale == "batch":
        std = _mean_and_std(groups.flatten())[1]
    advantages = groups - mean if scale == "none" else (groups - mean) / (std + STD_EPSILON)
    silent = groups.isnan() | dead_groups(rewards, group_size).unsqueeze(1)
    return advantages.masked_fill(silent, 0.0).flatten()


def combined_advantages(
    parts: dict[str, Tensor],
    weights: dict[str, float],
    group_size: int,
    scale: AdvantageScale = "group",
    combine: RewardCombination = "sum_then_normalise",
) -> Tensor:
    """Advantages [B] from several rewards.

    `sum_then_normalise`: `group_advantages` of the weighted sum. `normalise_then_sum`: GDPO
    (2601.05242), the weighted sum of each part's advantages by its group's std, divided by the std
    of that sum in the batch (its mean is 0 in every group); blind to each reward's unit. An image
    that misses one weighted part is missing (in TRL, that part counts as 0).

    Args:
        parts: [B] each; those of weight 0 or without a weight are ignored.
        weights: Weight of each part in the sum.
        group_size: G, at least 2.
        scale: As in `group_advantages`; `normalise_then_sum` has its own and takes "group" only.
        combine: What comes first.

    >>> parts = {"style": torch.tensor([0.0, 100.0]), "count": torch.tensor([2.0, 1.0])}
    >>> combined_advantages(parts, {"style": 0.01, "count": 2.0}, group_size=2, scale="none")
    tensor([ 0.5000, -0.5000])
    """
    _check_choice("combine", combine, RewardCombination)
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used or used.keys() - parts.keys():
        raise ValueError(f"expected weights of some of the parts {sorted(parts)}, got {weights}")
    scores = _as_float(torch.stack([parts[name] for name in used]))  # [K, B]
    factors = scores.new_tensor(list(used.values())).unsqueeze(1)
    if combine == "sum_then_normalise":
        return group_advantages((factors * scores).sum(dim=0), group_size, scale)
    if scale != "group":
        raise ValueError(f"normalise_then_sum expects scale 'group', got {scale!r}; leave it out")
    missing = scores.isnan().any(dim=0)
    scores = scores.masked_fill(missing, torch.nan)
    normalised = torch.stack([group_advantages(part, group_size) for part in scores])
    total = (factors * normalised).sum(dim=0).masked_fill(missing, torch.nan)
    return group_advantages(total, group_size, "batch")


def dead_groups(totals: Tensor, group_size: int) -> Tensor:
    """Groups [P] bool without signal: all totals [B] equal, or fewer than two that are not NaN.

    >>> dead_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, float("nan"), 1.0]), group_size=2)
    tensor([ True, False,  True])
    """
    groups = _split_groups(totals, group_size)
    missing = groups.isnan()
    highest = groups.masked_fill(missing, -torch.inf).amax(dim=1)
    lowest = groups.masked_fill(missing, torch.inf).amin(dim=1)
    equal = torch.isclose(highest, lowest, rtol=EQUAL_REWARDS, atol=0.0)
    return equal | ((~missing).sum(dim=1) < 2)


def signal_weights(advantages: Tensor, group_size: int) -> Tensor:
    """1 for the images of groups in which any advantage differs from 0, else 0; [B] from [B].

    >>> signal_weights(torch.tensor([0.7, -0.7, 0.0, 0.0]), group_size=2)
    tensor([1., 1., 0., 0.])
    """
    alive = (_split_groups(advantages, group_size) != 0).any(dim=1)
    return alive.repeat_interleave(group_size).to(advantages.dtype)


def _split_groups(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards of shape {list(rewards.shape)} do not split into groups of {group_size}; set "
            f"group_size to a divisor of {rewards.numel()} that is at least 2"
        )
    return _as_float(rewards).reshape(-1, group_size)


def _mean_and_std(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample deviation of the verdicts along the last axis, which is kept."""
    count = (~rewards.isnan()).sum(dim=-1, keepdim=True)
    mean = rewards.nansum(dim=-1, keepdim=True) / count.clamp(min=1)
    squares = (rewards - mean).square().nansum(dim=-1, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


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

    >>> kl_estimate(torch.tensor([[-2.0]]), torch.tensor([[-1.0]]), "k3")
    tensor([[0.7183]])
    """
    _check_kl_estimator(estimator)
    _check_shape("reference_logprobs", reference_logprobs, logprobs.shape)
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

    >>> k1_penalty(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -3.0]]))
    tensor([1.5000])
    """
    return (logprobs - reference_logprobs).detach().sum(dim=1)


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
    _check_choice("level", level, RatioLevel)
    _check_kl_estimator(kl_estimator)
    _check_shape("old_logprobs", old_logprobs, logprobs.shape)
    _check_shape("advantages", advantages, logprobs.shape[:1])
    weights = torch.ones_like(advantages) if weights is None else weights
    _check_shape("weights", weights, advantages.shape)
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
    _check_choice("variant", variant, PolicyVariant)
    if min(clip_low, clip_high) < 0:
        raise ValueError(f"expected clip_low, clip_high >= 0, got {clip_low}, {clip_high}; try 0.2")
    if variant == "cispo" and (clip_high < 1 or delta is not None):
        raise ValueError(
            "cispo caps the ratio at clip_high: expected at least 1 and no delta, "
            f"got {clip_high} and {delta}; set clip_high to 5 and leave delta out"
        )
    if delta is not None and delta <= 1 + clip_high:
        raise ValueError(f"expected delta above 1 + clip_high = {1 + clip_high}, got {delta}")


def _check_kl_estimator(estimator: str) -> None:
    if estimator == "k1":
        raise ValueError(
            "expected a KL estimator for a loss, got k1, whose gradient there is zero on average; "
            "use k2, k3 or a variant of k3, or subtract k1_penalty from the rewards"
        )
    _check_choice("kl_estimator", estimator, KLEstimator)


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"expected {name} to be one of {get_args(choices)}, got {value!r}")


def _check_shape(name: str, values: Tensor, shape: torch.Size) -> None:
    """Refuse what would broadcast without a word."""
    if values.shape != shape:
        raise ValueError(f"expected {name} of shape {list(shape)}, got {list(values.shape)}")


def _as_float(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
