"""Preference losses against arithmetic written out by hand.

The shared example has two pairs of three tokens and beta 1/2. Pair 1: the chosen image gained ln 3
nats over the reference and the rejected one lost as much, so Δ = 2 ln 3, βΔ = ln 3, σ = 3/4. Pair
2: the chosen image lost 3 ln 7 and the rejected one ln 7, so βΔ = -ln 7, σ = 1/8.
"""

import math
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cotgen_pl import losses
from cotgen_pl.losses import dpo_loss, sum_logprobs
from tests.losses.example import LN2, gradient_of

LN3, LN7 = math.log(3), math.log(7)
CHOSEN = torch.tensor([[-1.0, -2.0, -0.5], [-4.0, -2.0, -3.0]], dtype=torch.float64)
REJECTED = torch.tensor([[-3.0, -2.0, -1.5], [-1.0, -1.0, -0.5]], dtype=torch.float64)
# Sums -3.5, -9 and -6.5, -2.5, less the log-ratios.
REF_CHOSEN = torch.tensor([-3.5 - LN3, -9.0 + 3 * LN7], dtype=torch.float64)
REF_REJECTED = torch.tensor([-6.5 + LN3, -2.5 + LN7], dtype=torch.float64)
VARIANTS = get_args(losses.PreferenceVariant)


def example_loss(**settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=0.5, **settings)


def loss_of(chosen_ratio: float, rejected_ratio: float = 0.0, **settings: Any) -> float:
    """The loss of one pair of four tokens with these log-ratios."""
    policy = torch.full((1, 4), -2.5, dtype=torch.float64)
    reference = policy.sum(1)
    loss, _ = dpo_loss(
        policy, policy, reference - chosen_ratio, reference - rejected_ratio, **settings
    )
    return loss.item()


# Values


# Each variant's losses of pair 1 and pair 2, and the gradient by a chosen token of either: half of
# beta times the slope in βΔ, as B = 2; for ipo 2 (Δ / T - 1) / (T B), as 1 / (2β) = 1.
BY_HAND = {
    "sigmoid": (math.log(4 / 3), math.log(8), -1 / 4 / 4, -7 / 8 / 4),
    # Δ / T = 2 ln 3 / 3 = 0.732408 and -2 ln 7 / 3 = -1.297273.
    "ipo": (0.267592**2, 2.297273**2, -0.267592 / 3, -2.297273 / 3),
    # 1 - ln 3 = -0.098612 is past the hinge; 1 + ln 7 = 2.945910.
    "hinge": (0.0, 2.945910, 0.0, -1 / 4),
    # ε = 1/4, 1 - 2ε = 1/2. Slopes (3/4 * 1/4 + 1/4 * 3/4) * 2 and (3/4 * 7/8 + 1/4 * 1/8) * 2.
    "robust": (
        2 * (0.75 * math.log(4 / 3) - 0.25 * math.log(4)),
        2 * (0.75 * math.log(8) - 0.25 * math.log(8 / 7)),
        -3 / 4 / 4,
        -11 / 8 / 4,
    ),
    # Pair 1 stands at σ = 1 - ε, the smallest loss; slope of pair 2: 3/4 * 7/8 - 1/4 * 1/8 = 5/8.
    "cdpo": (
        0.75 * math.log(4 / 3) + 0.25 * math.log(4),
        0.75 * math.log(8) + 0.25 * math.log(8 / 7),
        0.0,
        -5 / 8 / 4,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_by_hand(variant: Any) -> None:
    first, second, first_slope, second_slope = BY_HAND[variant]
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    smoothing = 0.25 if variant in ("robust", "cdpo") else 0.0
    loss, _ = dpo_loss(
        chosen,
        rejected,
        REF_CHOSEN,
        REF_REJECTED,
        beta=0.5,
        variant=variant,
        label_smoothing=smoothing,
    )
    assert loss.item() == pytest.approx((first + second) / 2, abs=2e-6)
    expected = torch.tensor([[first_slope] * 3, [second_slope] * 3], dtype=torch.float64)
    assert_close(gradient_of(loss, chosen), expected, rtol=0, atol=1e-6)
    assert_close(gradient_of(loss, rejected), -expected, rtol=0, atol=1e-6)


def test_metrics_by_hand() -> None:
    loss, metrics = example_loss()
    expected = {
        "loss": (math.log(4 / 3) + math.log(8)) / 2,
        "logps/chosen": (-3.5 - 9.0) / 2,
        "logps/rejected": (-6.5 - 2.5) / 2,
        "rewards/chosen": 0.5 * (LN3 - 3 * LN7) / 2,
        "rewards/rejected": 0.5 * (-LN3 - LN7) / 2,
        "rewards/margins": (LN3 - LN7) / 2,
        "rewards/accuracies": 0.5,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    assert metrics["loss"].item() == loss.item()


def test_metrics_carry_no_gradient() -> None:
    policy = CHOSEN.clone().requires_grad_()
    loss, metrics = dpo_loss(policy, REJECTED, REF_CHOSEN, REF_REJECTED, likelihood_coef=1.0)
    assert loss.requires_grad
    assert len(metrics) == 8
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("variant", "label_smoothing", "value"),
    [
        ("sigmoid", 0.0, LN2),
        ("ipo", 0.0, 25.0),  # (1 / 0.2)²
        ("hinge", 0.0, 1.0),
        ("robust", 0.1, LN2),  # ((1 - ε) ln 2 - ε ln 2) / (1 - 2ε)
        ("cdpo", 0.1, LN2),
    ],
)
def test_values_where_the_policy_prefers_neither(
    variant: Any, label_smoothing: float, value: float
) -> None:
    settings = {"beta": 0.1, "variant": variant, "label_smoothing": label_smoothing}
    assert loss_of(0.0, **settings) == pytest.approx(value)
    assert loss_of(1.5, 1.5, **settings) == pytest.approx(value)
    assert loss_of(1.5, 0.0, **settings) < value - 0.03


def test_accuracy_counts_the_chosen_strictly_above_the_rejected() -> None:
    reference = torch.tensor([-10.0])
    for ratios in product([-2.0, -1.0, 0.0, 1.0, 2.0], repeat=2):
        chosen, rejected = (torch.full((1, 4), (ratio - 10) / 4) for ratio in ratios)
        _, metrics = dpo_loss(chosen, rejected, reference, reference)
        assert metrics["rewards/accuracies"].item() == (ratios[0] > ratios[1]), ratios


# The reference


@pytest.mark.parametrize("attached", [True, False])
def test_policy_that_is_its_reference_has_loss_ln_2_and_still_learns(attached: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (-10 * torch.rand(4, 576, generator=generator) for _ in range(2))
    chosen.requires_grad_()
    reference = sum_logprobs(chosen)
    # One that is attached to the policy by mistake must not cancel the gradient.
    reference = reference if attached else reference.detach()
    loss, metrics = dpo_loss(chosen, rejected, reference, sum_logprobs(rejected))
    assert loss.item() == torch.tensor(LN2).item()
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert metrics[f"rewards/{name}"].item() == 0
    # -β σ(0) / B = -0.1 / 2 / 4.
    assert_close(gradient_of(loss, chosen), torch.full((4, 576), -0.0125))


def test_reference_gets_no_gradient() -> None:
    reference = REF_CHOSEN.clone().requires_grad_()
    loss, _ = dpo_loss(CHOSEN, REJECTED, reference, REF_REJECTED)
    assert not loss.requires_grad


def test_moved_policy_has_a_margin_over_its_reference() -> None:
    policy = CHOSEN.clone()
    policy[0, 1] += 0.5
    _, metrics = dpo_loss(policy, REJECTED, CHOSEN.sum(1), REJECTED.sum(1), beta=0.2)
    # One of two pairs gains 0.5 nats.
    assert metrics["rewards/margins"].item() == pytest.approx(0.2 * 0.5 / 2)
    assert metrics["rewards/rejected"].item() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_difference_of_the_log_ratios_counts(variant: Any) -> None:
    # A sigmoid of its own for each image would see a shift that both share.
    settings = {"variant": variant, "label_smoothing": 0.2 if variant in ("robust", "cdpo") else 0}
    loss = loss_of(2.0, -1.0, **settings)
    assert loss_of(7.0, 4.0, **settings) == pytest.approx(loss)
    assert abs(loss_of(2.0, -2.0, **settings) - loss) > 0.01
    assert abs(loss_of(3.0, -1.0, **settings) - loss) > 0.01
    assert loss_of(-1.0, 2.0, **settings) > loss + 0.1  # a swapped pair


def test_beta_scales_policy_and_reference_alike() -> None:
    # β Δ is what counts: twice the log-ratio at half of beta.
    assert loss_of(3.0, beta=0.2) == pytest.approx(loss_of(6.0, beta=0.1))
    assert loss_of(3.0, beta=0.2) == pytest.approx(math.log(1 + math.exp(-0.6)))


def test_ipo_asks_for_a_margin_per_token() -> None:
    # The smallest loss at Δ = T / (2β): 4 tokens, β = 0.1: 20 nats.
    assert loss_of(20.0, variant="ipo") == pytest.approx(0.0)
    assert loss_of(18.0, variant="ipo") == pytest.approx(0.25)  # half a nat per token short
    assert loss_of(22.0, variant="ipo") == pytest.approx(0.25)


# Label smoothing


@pytest.mark.parametrize("share", [0.1, 0.3, 0.49])
@pytest.mark.parametrize("gap", [-30.0, -1.0, 0.0, 4.0, 30.0])
def test_robust_loss_under_flipped_labels_is_the_loss_of_the_true_ones(
    gap: float, share: float
) -> None:
    def mean_over_labels(variant: str) -> float:
        kept = loss_of(gap, variant=variant, label_smoothing=share)
        return (1 - share) * kept + share * loss_of(
            0.0, gap, variant=variant, label_smoothing=share
        )

    assert mean_over_labels("robust") == pytest.approx(loss_of(gap))
    if gap:
        assert abs(mean_over_labels("cdpo") - loss_of(gap)) > 1e-4


def test_smoothing_of_zero_is_the_plain_sigmoid() -> None:
    for variant in ("robust", "cdpo"):
        assert example_loss(variant=variant)[0].item() == example_loss()[0].item()


# Likelihood of the chosen image


def test_likelihood_term_by_hand() -> None:
    chosen = CHOSEN.clone().requires_grad_()
    rejected = REJECTED.clone().requires_grad_()
    arguments = (chosen, rejected, REF_CHOSEN, REF_REJECTED)
    plain, watched = dpo_loss(*arguments)
    loss, metrics = dpo_loss(*arguments, likelihood_coef=0.6)
    # Means over tokens -3.5 / 3 and -9 / 3: the mean over pairs is 12.5 / 6.
    assert metrics["likelihood_loss"].item() == pytest.approx(12.5 / 6)
    assert loss.item() == pytest.approx(plain.item() + 0.6 * 12.5 / 6)
    assert metrics["loss"].item() == loss.item()
    assert "likelihood_loss" not in watched
    added = gradient_of(loss, chosen) - gradient_of(plain, chosen)
    assert_close(added, torch.full_like(CHOSEN, -0.6 / 6))
    assert_close(gradient_of(loss, rejected), gradient_of(plain, rejected))


# Numbers


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("far", [-1e5, 1e5])
def test_far_margins_stay_finite(variant: Any, far: float) -> None:
    chosen = torch.full((2, 4), far / 4, requires_grad=True)
    zero = torch.zeros(2)
    smoothing = 0.1 if variant in ("robust", "cdpo") else 0.0
    loss, metrics = dpo_loss(
        chosen, torch.zeros(2, 4), zero, zero, variant=variant, label_smoothing=smoothing
    )
    assert all(value.isfinite() for value in metrics.values())
    assert gradient_of(loss, chosen).isfinite().all()


def test_far_below_the_reference_the_loss_is_linear_and_far_above_zero() -> None:
    assert loss_of(-1e5) == pytest.approx(1e4)
    assert loss_of(1e5) == 0


def test_half_precision_log_probs_are_summed_in_float32() -> None:
    chosen = torch.full((1, 576), -7.0, dtype=torch.bfloat16)  # bfloat16 has 4032 = 576 * 7, not
    rejected = torch.cat([chosen[:, 1:], torch.full((1, 1), -8.0).bfloat16()], dim=1)  # 4033
    reference = torch.tensor([-4032.0])
    _, metrics = dpo_loss(chosen, rejected, reference, reference, beta=1.0)
    assert metrics["rewards/margins"].item() == 1.0
    assert metrics["loss"].dtype == torch.float32
    assert example_loss()[0].dtype == torch.float64


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4]])
def test_micro_batches_add_up_to_the_batch(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = -torch.rand(2, 6, 3, generator=generator, dtype=torch.float64)
    sums = -3 * torch.rand(2, 6, generator=generator, dtype=torch.float64)
    whole = dpo_loss(*tokens, *sums, likelihood_coef=0.1)[1]
    averaged = dict.fromkeys(whole, 0.0)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        metrics = dpo_loss(*tokens[:, part], *sums[:, part], likelihood_coef=0.1)[1]
        for name, value in metrics.items():
            averaged[name] += value.item() * size / 6
        start += size
    assert averaged == pytest.approx({name: value.item() for name, value in whole.items()})
    assert 0 < averaged["rewards/accuracies"] < 1


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, r"expected beta above 0, got 0\.0"),
        ({"beta": -0.1}, "expected beta above 0, got -0.1"),
        ({"beta": math.nan}, "expected beta above 0, got nan"),
        ({"variant": "dpo"}, r"expected variant to be one of \('sigmoid', .*, got 'dpo'"),
        ({"variant": "robust", "label_smoothing": 0.5}, r"below 0\.5, got 0\.5; where half"),
        ({"variant": "cdpo", "label_smoothing": -0.1}, r"below 0\.5, got -0\.1"),
        ({"label_smoothing": 0.1}, "label_smoothing 0 for sigmoid, got 0.1; set variant to one of"),
        ({"variant": "ipo", "label_smoothing": 0.1}, "label_smoothing 0 for ipo, got 0.1"),
        ({"variant": "hinge", "label_smoothing": 0.1}, "label_smoothing 0 for hinge, got 0.1"),
        ({"likelihood_coef": -1.0}, r"likelihood_coef of 0 or more, got -1\.0"),
    ],
)
def test_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, **settings)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chosen of shape \[pairs, tokens\], got \[2\]; pass the"):
        dpo_loss(CHOSEN.sum(1), REJECTED.sum(1), REF_CHOSEN, REF_REJECTED)
    with pytest.raises(ValueError, match=r"expected rejected of shape \[2, 3\], got \[1, 3\]"):
        dpo_loss(CHOSEN, REJECTED[:1], REF_CHOSEN, REF_REJECTED)
    with pytest.raises(ValueError, match=r"expected ref_chosen of shape \[2\], got \[2, 3\]"):
        dpo_loss(CHOSEN, REJECTED, CHOSEN, REF_REJECTED)
    with pytest.raises(ValueError, match=r"expected ref_rejected of shape \[2\], got \[1\]"):
        dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_sums_too_coarse_for_a_margin_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"ref_chosen in float32 or float64, got torch\..*float16"):
        dpo_loss(CHOSEN, REJECTED, REF_CHOSEN.to(dtype), REF_REJECTED)
