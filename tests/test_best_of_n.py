"""The order-statistic estimator against all subsets, one by one."""

from itertools import combinations

import pytest
import torch

from cotgen_pl.best_of_n import best_of_n_curve

NAN = float("nan")


def by_all_subsets(judge, chosen_by, n):
    """The mean over subsets of the judge's mean over those that are chosen with equal right."""
    means = []
    for subset in combinations(range(len(judge)), n):
        scores = [chosen_by[i] for i in subset]
        known = [score for score in scores if score == score]
        best = [i for i in subset if not known or chosen_by[i] == max(known)]
        means.append(sum(judge[i] for i in best) / len(best))
    return sum(means) / len(means)


@pytest.mark.parametrize(
    "chosen_by",
    [
        [0.3, 0.1, 0.5, 0.4, 0.2],
        [0.3, 0.3, 0.5, 0.5, 0.2],
        [0.3, NAN, 0.5, NAN, 0.2],
        [NAN, NAN, NAN, NAN, 0.2],
        [1.0] * 5,
        [-float("inf"), 0.0, 1.0, 1.0, float("inf")],
    ],
)
def test_equals_the_mean_over_all_subsets(chosen_by):
    judge = [0.0, 1.0, 0.25, 0.75, 0.5]
    curve = best_of_n_curve(torch.tensor([judge]), torch.tensor([chosen_by]))
    expected = [by_all_subsets(judge, chosen_by, n) for n in range(1, 6)]
    assert curve[0].tolist() == pytest.approx(expected)


def test_a_missing_verdict_never_wins_over_a_given_one():
    curve = best_of_n_curve(torch.tensor([[5.0, 1.0]]), torch.tensor([[NAN, -9.0]]))
    assert curve.tolist() == [[3.0, 1.0]]


def test_pictures_without_a_judgement_are_left_out_of_the_mean():
    judge, chosen_by = torch.tensor([[NAN, 1.0, 0.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    # Of two: the unjudged one wins two subsets of three, which say nothing.
    curve = best_of_n_curve(judge, chosen_by)[0].tolist()
    assert curve == pytest.approx([0.5, 1.0, NAN], nan_ok=True)


def test_prompts_are_apart_and_the_judge_is_the_ceiling():
    judge, other = torch.rand(20, 16), torch.rand(20, 16)
    own, by_other = best_of_n_curve(judge, judge), best_of_n_curve(judge, other)
    assert torch.allclose(own[:, -1], judge.double().amax(1))
    assert (own.diff(dim=1) >= 0).all() and (own >= by_other - 1e-12).all()
    assert torch.allclose(by_other[:, 0], judge.double().mean(1))
    assert torch.equal(best_of_n_curve(judge[3:4], other[3:4]), by_other[3:4])


def test_tables_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"got \[2, 3\] and \[2, 4\]; score the same pictures"):
        best_of_n_curve(torch.zeros(2, 3), torch.zeros(2, 4))
