"""Log-probabilities, advantages, KL estimators, GRPO and preference losses: tensors in and out.

Apart from any module or model, so that every formula can be checked on paper. Shapes follow the
legend of `interfaces`; four-digit numbers with a dot name arXiv papers. Every image has T tokens,
so there is one aggregation, the mean over images of the mean over tokens: GRPO's, and for fixed T
also that of BNPO, DAPO and Dr. GRPO.
"""

from cotgen_pl.losses.advantages import (
    EQUAL_REWARDS,
    STD_EPSILON,
    AdvantageScale,
    RewardCombination,
    combined_advantages,
    dead_groups,
    group_advantages,
    signal_weights,
)
from cotgen_pl.losses.grpo import PolicyVariant, RatioLevel, grpo_loss
from cotgen_pl.losses.kl import MAX_LOG_RATIO, KLEstimator, k1_penalty, kl_estimate
from cotgen_pl.losses.logprobs import sum_logprobs, token_logprobs, token_statistics
from cotgen_pl.losses.preferences import PreferenceVariant, dpo_loss

__all__ = [
    "EQUAL_REWARDS",
    "MAX_LOG_RATIO",
    "STD_EPSILON",
    "AdvantageScale",
    "KLEstimator",
    "PolicyVariant",
    "PreferenceVariant",
    "RatioLevel",
    "RewardCombination",
    "combined_advantages",
    "dead_groups",
    "dpo_loss",
    "group_advantages",
    "grpo_loss",
    "k1_penalty",
    "kl_estimate",
    "signal_weights",
    "sum_logprobs",
    "token_logprobs",
    "token_statistics",
]
