"""Preference losses: raise the chosen image of a pair above the rejected one, from a reference."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cotgen_pl.interfaces import check_choice
from cotgen_pl.losses.inputs import check_shape
from cotgen_pl.losses.logprobs import sum_logprobs

PreferenceVariant = Literal["sigmoid", "ipo", "hinge", "robust", "cdpo"]

SMOOTHED = ("robust", "cdpo")  # the variants that know a share of wrong labels


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    variant: PreferenceVariant = "sigmoid",
    label_smoothing: float = 0.0,
    likelihood_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of direct preference optimisation (2305.18290, eq. 7), the mean over B pairs.

    With s the log-ratio of a whole image to the reference, Δ = s of the chosen minus s of the
    rejected one, and ε the label smoothing:

    `sigmoid`: -log σ(βΔ).
    `ipo`: (Δ / T - 1 / (2β))² (2310.12036, eq. 17). Deviation, as TRL: Δ / T, the mean over tokens.
    `hinge`: max(0, 1 - βΔ) (2309.06657).
    `robust`: [-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε), whose mean over labels that are
    flipped with probability ε is the sigmoid loss of the true ones (2403.00409).
    `cdpo`: -(1 - ε) log σ(βΔ) - ε log σ(-βΔ), smallest at σ(βΔ) = 1 - ε
    (ericmitchell.ai/cdpo.pdf, eq. 3).

    Args:
        chosen: [B, T] log-probabilities of tokens, with gradient.
        rejected: [B, T], likewise.
        ref_chosen: [B], `sum_logprobs` of the reference for the same images, float32 or float64.
        ref_rejected: [B], likewise.
        beta: Above 0. How little the policy may leave the reference; 0.1 as TRL. One that suits
            `ipo`, which asks for Δ = T / (2β), suits no other variant.
        variant: One of the five.
        label_smoothing: Probability that a label is wrong, 0 or more and below 0.5; for `robust`
            and `cdpo`.
        likelihood_coef: Weight of the chosen image's mean negative log-probability per token,
            against its sinking with that of the rejected one (2404.19733, eq. 1; there 1).

    Returns:
        The loss and detached metrics, each a mean over pairs: those of micro-batches average by
        their share of the pairs. `logps/` are sums over tokens in nats, `rewards/` are βs;
        `likelihood_loss`, without its weight, only where it acts.

    >>> policy, zero = torch.tensor([[-1.0, -1.0]]), torch.zeros(1)
    >>> loss, metrics = dpo_loss(policy, 2 * policy, zero - 3, zero - 2)
    >>> round(loss.item(), 4), round(metrics["rewards/margins"].item(), 4)
    (0.5544, 0.3)
    """
    _check_settings(beta, variant, label_smoothing, likelihood_coef)
    _check_pairs(chosen, rejected, ref_chosen, ref_rejected)
    chosen_sums, rejected_sums = sum_logprobs(chosen), sum_logprobs(rejected)
    chosen_ratios = chosen_sums - ref_chosen.detach()  # s, [B]
    rejected_ratios = rejected_sums - ref_rejected.detach()
    gaps = chosen_ratios - rejected_ratios  # Δ, [B]
    loss = _pair_losses(gaps, chosen.shape[1], beta, variant, label_smoothing).mean()
    metrics = {
        "logps/chosen": chosen_sums.mean(),
        "logps/rejected": rejected_sums.mean(),
        "rewards/chosen": beta * chosen_ratios.mean(),
        "rewards/rejected": beta * rejected_ratios.mean(),
        "rewards/margins": beta * gaps.mean(),
        "rewards/accuracies": (chosen_ratios > rejected_ratios).to(gaps.dtype).mean(),
    }
    if likelihood_coef != 0:
        metrics["likelihood_loss"] = -chosen_sums.mean() / chosen.shape[1]
        loss = loss + likelihood_coef * metrics["likelihood_loss"]
    metrics["loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def _pair_losses(
    gaps: Tensor, num_tokens: int, beta: float, variant: PreferenceVariant, label_smoothing: float
) -> Tensor:
    """The loss of each pair, [B], from Δ, [B]."""
    if variant == "ipo":
        return (gaps / num_tokens - 1 / (2 * beta)).square()
    margins = beta * gaps
    if variant == "hinge":
        return (1 - margins).relu()
    kept, flipped = -logsigmoid(margins), -logsigmoid(-margins)
    if variant == "sigmoid":
        return kept
    if variant == "robust":
        difference = (1 - label_smoothing) * kept - label_smoothing * flipped
        return difference / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * kept + label_smoothing * flipped


def _check_settings(
    beta: float, variant: str, label_smoothing: float, likelihood_coef: float
) -> None:
    check_choice("variant", variant, PreferenceVariant)
    if not beta > 0:
        raise ValueError(f"expected beta above 0, got {beta}; 0.1 is usual for sigmoid")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"expected label_smoothing of 0 or more and below 0.5, got {label_smoothing}; where "
            "half of the labels are wrong, pairs say nothing"
        )
    if label_smoothing and variant not in SMOOTHED:
        raise ValueError(
            f"expected label_smoothing 0 for {variant}, got {label_smoothing}; set variant to one "
            f"of {SMOOTHED}"
        )
    if not likelihood_coef >= 0:
        raise ValueError(
            f"expected likelihood_coef of 0 or more, got {likelihood_coef}; below 0 it would push "
            "the chosen image away"
        )


def _check_pairs(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> None:
    if chosen.ndim != 2:
        raise ValueError(
            f"expected chosen of shape [pairs, tokens], got {list(chosen.shape)}; pass the "
            "log-probabilities of tokens, not their sums"
        )
    check_shape("rejected", rejected, chosen.shape)
    for name, sums in {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}.items():
        check_shape(name, sums, chosen.shape[:1])
        if sums.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"expected {name} in float32 or float64, got {sums.dtype}, whose steps are nats "
                "apart at such sums; use sum_logprobs"
            )
