"""The alarm on made-up series, and variety, agreement and uplift against sums written out."""

import itertools
import math
import statistics

import pytest
import torch

from cotgen_pl.losses import dead_groups
from cotgen_pl.monitors import (
    Verdicts,
    best_of_uplift,
    diversity,
    paired_change,
    rank_agreement,
    watch_hacking,
)

PROMPTS, COPIES = 50, 2
RISING = [0.1, 0.2, 0.3, 0.4, 0.5]
NAN = math.nan


def evenly(values: torch.Tensor) -> Verdicts:
    return Verdicts(values, torch.full((len(values),), 1 / len(values)))


def series(means: list[float], noise: float = 0.0, seed: int = 0) -> list[torch.Tensor]:
    """Scores [prompts, copies] at each evaluation; the prompts' levels stay, the noise is new."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(PROMPTS, 1, generator=generator, dtype=torch.float64)
    shape = (PROMPTS, COPIES)
    return [
        levels + mean + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
        for mean in means
    ]


def alarms(trained: list[torch.Tensor], **watched: list[torch.Tensor]) -> list[list[str]]:
    course, found = None, []
    for step, values in enumerate(trained):
        now = {name: evenly(scores[step]) for name, scores in watched.items()}
        course, names = watch_hacking(course, evenly(values), now)
        found.append(names)
    return found


# The alarm --------------------------------------------------------------------------------------


def test_a_rise_and_a_fall_give_an_alarm_at_the_second_evaluation():
    found = alarms(series(RISING), judge=series([0.5, 0.6, 0.55, 0.55, 0.59]))
    assert found == [[], [], [], ["judge"], []]


@pytest.mark.parametrize(("fall", "expected"), [(0.019, []), (0.0201, ["judge"]), (0.1, ["judge"])])
def test_a_fall_counts_from_two_hundredths(fall, expected):
    low = 0.6 - fall
    assert alarms(series(RISING), judge=series([0.5, 0.6, low, low, low]))[-1] == expected


def test_a_fall_of_exactly_two_hundredths_counts():
    watched = [torch.full((4, 1), value, dtype=torch.float64) for value in (0.02, 0.0, 0.0)]
    trained = [torch.full((4, 1), value) for value in (0.0, 1.0, 1.0)]
    assert alarms(trained, judge=watched) == [[], [], ["judge"]]


def test_a_single_dip_gives_none():
    assert not any(alarms(series(RISING), judge=series([0.5, 0.3, 0.5, 0.3, 0.5])))


def test_two_scores_that_dip_in_turn_give_none():
    one, other = [0.5, 0.3, 0.5, 0.3, 0.5], [0.5, 0.5, 0.3, 0.5, 0.3]
    assert not any(alarms(series(RISING), one=series(one), other=series(other)))


def test_only_what_fell_is_named():
    level, falling = [0.5] * 5, [0.5, 0.4, 0.3, 0.2, 0.1]
    found = alarms(series(RISING), level=series(level), falling=series(falling))
    assert found == [[], [], ["falling"], ["falling"], ["falling"]]


def test_a_trained_reward_that_does_not_rise_gives_none():
    falling = series([0.5, 0.4, 0.3, 0.2, 0.1])
    for trained in ([0.5] * 5, [0.5, 0.4, 0.3, 0.2, 0.1]):
        assert not any(alarms(series(trained), judge=falling))


def test_the_trained_reward_must_be_up_at_both_evaluations():
    trained = series([0.1, 0.2, 0.1, 0.2, 0.1])
    assert not any(alarms(trained, judge=series([0.5, 0.3, 0.3, 0.3, 0.3])))


def test_the_best_so_far_is_what_a_fall_is_measured_by():
    watched = series([0.5, 0.8, 0.77, 0.76, 0.9])  # above the start all the time
    assert alarms(series(RISING), judge=watched) == [[], [], [], ["judge"], []]


def test_a_rise_within_two_errors_is_none():
    """Paired errors, by hand: changes of 0.1 and 0.3 have mean 0.2 and error 0.1."""
    falling = [torch.full((2, 1), value) for value in (0.5, 0.2, 0.2)]
    start = torch.zeros(2, 1, dtype=torch.float64)
    for spread, expected in ((0.1, []), (0.0999, ["judge"])):
        up = torch.tensor([[0.2 - spread], [0.2 + spread]], dtype=torch.float64)
        assert alarms([start, up, up], judge=falling)[-1] == expected


def test_a_fall_within_two_errors_is_none():
    best = torch.full((2, 1), 0.5, dtype=torch.float64)
    rising = [torch.full((2, 1), value) for value in (0.1, 0.2, 0.3)]
    for spread, expected in ((0.101, []), (0.0999, ["judge"])):
        down = torch.tensor([[0.3 - spread], [0.3 + spread]], dtype=torch.float64)
        assert alarms(rising, judge=[best, down, down])[-1] == expected


def test_noise_gives_none():
    """The error of a mean here is 0.3 sqrt(2) / sqrt(100) = 0.042: falls of 0.02 are everywhere."""
    for seed in range(50):
        trained = series([0.0, 0.5, 0.5, 0.5, 0.5, 0.5], 0.3, 1000 + seed)
        assert not any(alarms(trained, judge=series([0.5] * 6, 0.3, seed))), seed


def test_a_fall_in_noise_is_found():
    watched = series([0.5, 0.5, 0.2, 0.2], 0.3)
    assert alarms(series([0.0, 0.5, 0.5, 0.5], 0.3, 1), judge=watched)[-1] == ["judge"]


def test_missing_verdicts_are_left_out():
    trained, watched = series(RISING), series([0.5, 0.4, 0.3, 0.2, 0.1])
    for step, (row, column) in enumerate(itertools.product(range(2), range(2))):
        trained[step][row, column] = NAN
        watched[step][row, column] = NAN
    assert alarms(trained, judge=watched) == [[], [], ["judge"], ["judge"], ["judge"]]


def test_no_verdicts_give_no_alarm():
    nothing = [torch.full((3, 2), NAN)] * 5
    assert not any(alarms(nothing, judge=series(RISING[::-1])))
    assert not any(alarms(series(RISING), judge=nothing))


def test_what_is_watched_from_later_on_begins_then():
    evaluations = list(zip(series(RISING), series(RISING[::-1]), strict=True))
    course, found = None, []
    for step, (trained, falling) in enumerate(evaluations):
        watched = {"late": evenly(falling)} if step >= 2 else {}
        course, names = watch_hacking(course, evenly(trained), watched)
        found.append(names)
    assert found == [[], [], [], [], ["late"]]


def test_other_prompts_than_before_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 2\] as before, got \[3, 4\]; resume with"):
        paired_change(torch.zeros(3, 2), evenly(torch.zeros(3, 4)))


# Paired changes ---------------------------------------------------------------------------------


def test_change_and_error_are_those_of_the_prompts_means():
    before, after = torch.rand(7, 3).double(), torch.rand(7, 3).double()
    means = [(b - a).mean().item() for a, b in zip(before, after, strict=True)]
    mean, error = paired_change(before, evenly(after))
    assert mean == pytest.approx(statistics.fmean(means))
    assert error == pytest.approx(statistics.stdev(means) / math.sqrt(7))


def test_a_picture_without_a_verdict_has_no_part_in_the_change():
    before, after = torch.tensor([[0.0, 5.0], [1.0, 2.0]]), torch.tensor([[1.0, NAN], [1.0, 3.0]])
    mean, error = paired_change(before, evenly(after))
    assert (mean, error) == pytest.approx((0.75, 0.25))  # prompts change by 1 and by 0.5


def test_weights_are_those_of_the_mean():
    after = Verdicts(torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([0.5, 0.25, 0.25]))
    mean, error = paired_change(torch.zeros(3, 1), after)
    squares = (0.5 * 0.5) ** 2 + 2 * (0.25 * 0.5) ** 2
    assert (mean, error) == pytest.approx((0.5, math.sqrt(3 / 2 * squares)))


def test_one_prompt_has_no_error():
    assert paired_change(torch.zeros(1, 2), evenly(torch.ones(1, 2))) == (1.0, math.inf)


# Variety ----------------------------------------------------------------------------------------


def test_diversity_is_the_mean_over_pairs():
    images = torch.rand(2 * 4, 3, 5, 6)
    expected = []
    for group in images.view(2, 4, 3, 5, 6):
        pairs = itertools.combinations(group, 2)
        expected.append(statistics.fmean((a - b).square().mean().sqrt().item() for a, b in pairs))
    assert diversity(images, 4).tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_pictures_have_no_diversity():
    images = torch.rand(1, 3, 32, 32).repeat(32, 1, 1, 1)  # so many that cdist may use a product
    assert diversity(images, 32).tolist() == [0.0]


def test_diversity_needs_groups():
    for size in (1, 3):
        with pytest.raises(ValueError, match=f"4 images do not split into groups of {size}"):
            diversity(torch.zeros(4, 3, 2, 2), size)


# Two rewards ------------------------------------------------------------------------------------


def kendall(one: list[float], other: list[float]) -> float:
    """tau-b of one group from its pairs."""
    both = list(zip(one, other, strict=True))
    signs = [
        ((a > c) - (a < c), (b > d) - (b < d)) for (a, b), (c, d) in itertools.combinations(both, 2)
    ]
    ordered = sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)
    return sum(x * y for x, y in signs) / math.sqrt(ordered)


def test_agreement_is_kendalls_within_groups():
    one, other = torch.randint(0, 4, (2, 5 * 6)).float()
    groups = zip(one.view(5, 6).tolist(), other.view(5, 6).tolist(), strict=True)
    expected = statistics.fmean(kendall(*group) for group in groups)
    assert rank_agreement(one, other, 6) == pytest.approx(expected)


def test_agreement_of_a_reward_with_itself_and_its_opposite():
    scores = torch.rand(24)
    assert rank_agreement(scores, 100 * scores - 3, 8) == pytest.approx(1)
    assert rank_agreement(scores, -scores, 8) == pytest.approx(-1)


def test_levels_of_groups_do_not_count_as_agreement():
    levels = torch.tensor([0.0, 10.0]).repeat_interleave(2)
    one, other = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert rank_agreement(one + levels, other + levels, 2) == -1


def test_groups_that_one_reward_does_not_order_are_left_out():
    one = torch.tensor([1.0, 2.0, 5.0, 5.0, 1.0, NAN])
    other = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert rank_agreement(one, other, 2) == 1
    assert math.isnan(rank_agreement(one[2:], other[2:], 2))


def test_rounding_is_a_tie():
    rounded = torch.tensor([0.1, 0.1 + 2e-8])
    assert dead_groups(rounded, 2).all()
    assert math.isnan(rank_agreement(rounded, torch.tensor([1.0, 2.0]), 2))
    assert best_of_uplift(torch.tensor([1.0, 2.0]), rounded, 2) == 0


def test_uplift_is_the_chosen_picture_less_the_mean():
    judge, by = torch.rand(2, 6 * 8).double()
    gains = []
    for scores, ranks in zip(judge.view(6, 8), by.view(6, 8), strict=True):
        gains.append((scores[ranks.argmax()] - scores.mean()).item())
    assert best_of_uplift(judge, by, 8) == pytest.approx(statistics.fmean(gains))
    assert best_of_uplift(judge, judge, 8) >= best_of_uplift(judge, by, 8)


def test_among_equal_ones_the_choice_is_a_mean():
    judge = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert best_of_uplift(judge, torch.tensor([1.0, 1.0, 0.0, 0.0]), 4) == 0.25
    assert best_of_uplift(judge, torch.ones(4), 4) == 0


def test_pictures_without_both_verdicts_are_not_chosen():
    judge = torch.tensor([NAN, 1.0, 0.0, 9.0, NAN, 1.0, NAN, 1.0])
    by = torch.tensor([9.0, 2.0, 1.0, NAN, 1.0, NAN, 2.0, NAN])
    assert best_of_uplift(judge, by, 4) == 0.5  # of the second and third; the last four say nothing
    assert math.isnan(best_of_uplift(judge[4:], by[4:], 4))
