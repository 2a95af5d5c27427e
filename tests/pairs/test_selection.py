"""Pairs of images by enumeration of every small group."""

import math
from collections import Counter
from itertools import product
from typing import Any, get_args

import pytest
import torch

from cotgen_pl.losses import dead_groups
from cotgen_pl.pairs.selection import PairRule, Selection, select_pairs

NAN = float("nan")
RULES = get_args(PairRule)


def pairs(selection: Selection) -> list[tuple[int, int]]:
    return list(zip(selection.chosen, selection.rejected, strict=True))


def pairs_of_group(scores: list[float], seed: int = 0, **settings: Any) -> list[tuple[int, int]]:
    """Pairs of one group."""
    selection = select_pairs(torch.tensor(scores), len(scores), seeds=[seed], **settings)
    assert sum(selection.dropped.values()) == (not selection.chosen)
    return pairs(selection)


def pairs_over_seeds(scores: list[float], **settings: Any) -> Counter[tuple[int, int]]:
    """How often each single pair comes out under 400 seeds."""
    found = Counter()
    for seed in range(400):
        [pair] = pairs_of_group(scores, seed, **settings)
        found[pair] += 1
    return found


# Which pairs


def test_best_against_worst_with_rows_of_the_whole_batch() -> None:
    scores = torch.tensor([0.5, 0.1, 0.9, 3.0, 1.0, 2.0])
    selection = select_pairs(scores, 3, seeds=[0, 1])
    assert pairs(selection) == [(2, 1), (3, 4)]
    assert selection.dropped == {"missing": 0, "equal": 0, "margin": 0}


def test_best_against_a_random_lower_one() -> None:
    found = pairs_over_seeds([1.0, 4.0, 2.0, 3.0], rule="best_random")
    assert found.keys() == {(1, 0), (1, 2), (1, 3)}
    assert min(found.values()) > 100  # of 133 expected
    # Only 1.0 and 2.0 are lower by 1.5.
    found = pairs_over_seeds([1.0, 4.0, 2.0, 3.0], rule="best_random", margin=1.5)
    assert found.keys() == {(1, 0), (1, 2)}


def test_all_pairs_with_a_difference() -> None:
    scores = [1.0, 3.0, NAN, 1.0, 2.0]
    every = pairs_of_group(scores, rule="all_pairs")
    assert sorted(every) == [(1, 0), (1, 3), (1, 4), (4, 0), (4, 3)]
    assert sorted(pairs_of_group(scores, rule="all_pairs", margin=1.5)) == [(1, 0), (1, 3)]


def expected_pairs(scores: tuple[float, ...], rule: str, margin: float) -> set[tuple[int, int]]:
    """Every pair that a rule may give for a group."""
    valid = [place for place, score in enumerate(scores) if not math.isnan(score)]
    better = {
        (high, low)
        for high, low in product(valid, valid)
        if scores[high] > scores[low] and scores[high] - scores[low] >= margin
    }
    if rule == "all_pairs":
        return better
    tops = {pair for pair in better if scores[pair[0]] == max(scores[place] for place in valid)}
    if rule == "best_random":
        return tops
    return {pair for pair in tops if scores[pair[1]] == min(scores[place] for place in valid)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("margin", [0.0, 1.0, 2.0, 2.5])
def test_every_group_of_three_against_enumeration(rule: Any, margin: float) -> None:
    groups = list(product([NAN, -1.0, 0.0, 1.0, 2.0], repeat=3))
    scores = torch.tensor(groups).flatten()
    drawn: dict[int, set[tuple[int, int]]] = {number: set() for number in range(len(groups))}
    for repeat in range(40):
        seeds = [1000 * repeat + number for number in range(len(groups))]
        selection = select_pairs(scores, 3, rule=rule, margin=margin, seeds=seeds)
        counts = Counter(chosen // 3 for chosen in selection.chosen)
        for chosen, rejected in pairs(selection):
            assert chosen // 3 == rejected // 3
            drawn[chosen // 3].add((chosen % 3, rejected % 3))
        if rule != "all_pairs":
            assert set(counts.values()) == {1}
        assert len(counts) + sum(selection.dropped.values()) == len(groups)
    # Every pair that may come does come: the least likely has 1/3, and 40 draws miss it with 1e-7.
    assert [drawn[number] for number in range(len(groups))] == [
        expected_pairs(group, rule, margin) for group in groups
    ]


# What is dropped


@pytest.mark.parametrize("rule", RULES)
def test_each_dropped_group_is_counted_once_by_its_reason(rule: Any) -> None:
    groups = [
        [NAN, NAN, NAN],  # missing
        [5.0, NAN, NAN],  # missing
        [1.0, 1.0, 1.0],  # equal
        [1.0, NAN, 1.0],  # equal
        [1.0, 1.4, 1.2],  # margin
        [1.0, 1.6, NAN],
        [0.3, 0.3 * (1 + 1e-7), 0.3],  # equal: 0.3 and the next number after it
    ]
    scores = torch.tensor(groups).flatten()
    selection = select_pairs(scores, 3, rule=rule, margin=0.5, seeds=range(7))
    assert pairs(selection) == [(16, 15)]
    assert selection.dropped == {"missing": 2, "equal": 3, "margin": 1}
    dead = int(dead_groups(scores, 3).sum())
    assert selection.dropped["missing"] + selection.dropped["equal"] == dead


def test_difference_of_rounding_makes_no_pair_beside_a_real_one() -> None:
    rounded = torch.tensor(0.3).nextafter(torch.tensor(1.0)).item()
    assert rounded > torch.tensor(0.3).item()
    found = pairs_of_group([0.3, rounded, 0.28], rule="all_pairs")
    assert sorted(found) == [(0, 2), (1, 2)]
    assert pairs_over_seeds([0.3, rounded, 0.28], rule="best_random").keys() == {(1, 2)}


def test_small_differences_of_a_scorer_are_preferences() -> None:
    assert pairs_of_group([0.28, 0.2801]) == [(1, 0)]
    assert pairs_of_group([0.28, 0.2801], margin=0.0002) == []


@pytest.mark.parametrize("rule", RULES)
def test_difference_at_the_margin_is_kept_whatever_float32_makes_of_it(rule: Any) -> None:
    for tenths in range(-10, 10):
        scores = [tenths / 10, (tenths + 1) / 10]  # in float32 some differ by less than 0.1
        assert pairs_of_group(scores, rule=rule, margin=0.1) == [(1, 0)], scores
        assert pairs_of_group(scores, rule=rule, margin=0.10001) == [], scores


# Ties and seeds


def test_ties_of_best_and_worst_are_broken_at_random() -> None:
    found = pairs_over_seeds([2.0, 1.0, 2.0, 1.0])
    assert found.keys() == {(0, 1), (0, 3), (2, 1), (2, 3)}
    assert min(found.values()) > 70  # of 100 expected; deviation 9
    # Missing verdicts shift no odds.
    found = pairs_over_seeds([NAN, 2.0, 1.0, NAN, 2.0])
    assert found.keys() == {(1, 2), (4, 2)}
    assert min(found.values()) > 150  # of 200; deviation 10


def test_without_ties_the_seed_does_not_matter() -> None:
    assert pairs_over_seeds([2.0, 0.0, 1.0]) == {(0, 1): 400}
    assert len({tuple(pairs_of_group([2.0, 2.0, 1.0], s, rule="all_pairs")) for s in range(9)}) == 1


@pytest.mark.parametrize("rule", RULES)
def test_choice_depends_on_the_groups_own_seed_and_not_on_the_batch(rule: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (50, 4), generator=generator).float()
    scores[torch.rand(50, 4, generator=generator) < 0.1] = NAN
    seeds = [7 * number for number in range(50)]
    whole = pairs(select_pairs(scores.flatten(), 4, rule=rule, seeds=seeds))
    assert whole == pairs(select_pairs(scores.flatten(), 4, rule=rule, seeds=seeds))
    alone = [
        (4 * number + chosen, 4 * number + rejected)
        for number in range(50)
        for chosen, rejected in pairs(
            select_pairs(scores[number], 4, rule=rule, seeds=[seeds[number]])
        )
    ]
    assert whole == alone
    assert len(whole) > 30
    if rule != "all_pairs":
        others = select_pairs(scores.flatten(), 4, rule=rule, seeds=[seed + 1 for seed in seeds])
        assert pairs(others) != whole


def test_selection_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    select_pairs(torch.tensor([1.0, 1.0, 0.0]), 3, seeds=[5])
    assert torch.equal(torch.get_rng_state(), before)


def test_scores_are_left_as_they_are() -> None:
    scores = torch.tensor([1.0, NAN, 0.0])
    select_pairs(scores, 3, seeds=[0])
    assert scores[0] == 1 and scores[1].isnan() and scores[2] == 0


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "worst"}, r"expected rule to be one of \('best_worst', .*, got 'worst'"),
        ({"margin": -0.1}, "expected a margin of 0 or more, got -0.1"),
        ({"margin": NAN}, "expected a margin of 0 or more, got nan"),
        ({"seeds": [1]}, "expected 2 seeds, one per prompt, got 1"),
        ({"seeds": range(6)}, "expected 2 seeds, one per prompt, got 6"),
        ({"group_size": 4}, "do not split into groups of 4; set group_size to a divisor of 6"),
        ({"group_size": 1}, "that is at least 2"),
    ],
)
def test_mistakes_are_refused(settings: dict[str, Any], message: str) -> None:
    scores = torch.arange(6.0)
    arguments = {"group_size": 3, "seeds": [1, 2]} | settings
    with pytest.raises(ValueError, match=message):
        select_pairs(scores, **arguments)


def test_scores_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 3\] do not split into groups of 3"):
        select_pairs(torch.zeros(2, 3), 3, seeds=[1, 2])
