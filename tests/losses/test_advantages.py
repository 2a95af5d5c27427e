"""Advantages by hand, dead groups and missing verdicts."""

from typing import Any, get_args

import pytest
import torch
from torch.testing import assert_close

from cotgen_pl import losses
from cotgen_pl.losses import combined_advantages, dead_groups, group_advantages

NAN = float("nan")


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


def test_mistakes_are_refused() -> None:
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
