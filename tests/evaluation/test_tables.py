"""The tables of a thorough evaluation, on numbers that are made up."""

import math
import warnings

import pytest
import torch

from cotgen_pl.evaluation.suites import OWN, JudgedSuite, Suite
from cotgen_pl.evaluation.tables import format_tables, suite_rows, warn_of_equal
from cotgen_pl.interfaces import Prompt
from cotgen_pl.monitors import mean_error

NAN = math.nan


def judged(name: str, domain: str, rows: dict[str, list[list[float]]], *, strict: bool = False):
    """A suite whose scores stand by category, a list of pictures' scores for each prompt."""
    prompts = [
        Prompt(f"prompt {number}", category=category, index=number)
        for number, category in enumerate(c for c, scores in rows.items() for _ in scores)
    ]
    total = torch.tensor([line for scores in rows.values() for line in scores]).double()
    parts = {"total": total, "score": total} | ({"strict": total} if strict else {})
    return JudgedSuite(Suite(name, domain, []), prompts, {OWN: parts}, torch.zeros(len(prompts)))


GENEVAL = {
    "counting": [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]],
    "color_attr": [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]],
}
COMPBENCH = {"color": [[0.25, 0.75], [0.5, 1.0]], "shape": [[0.5, 0.5], [0.25, NAN], [NAN, NAN]]}

TABLES = """\
compbench, in domain, images of each prompt: 2
        score     95 %  prompts  no verdict
color  0.6250  ±0.2450        2           0
shape  0.4167  ±0.2178        3           3
mean   0.5208  ±0.1639        5           3

geneval, out of domain, images of each prompt: 4
             score     95 %  prompts  images right  prompts right
counting    0.4167  ±0.5889        3        41.67%         66.67%
color_attr  0.2500  ±0.4900        2        25.00%         50.00%
mean        0.3333  ±0.3831        5        35.00%         60.00%

means over suites
                score     95 %
in domain      0.5208  ±0.1639
out of domain  0.3333  ±0.3831
gap            0.1875  ±0.4166"""


def test_tables_are_those_of_the_papers():
    """Means over categories, GenEval's shares over all pictures and prompts at once."""
    suites = [
        judged("compbench", "id", COMPBENCH),
        judged("geneval", "ood", GENEVAL, strict=True),
        judged("wording", "shift", {"": [[0.0], [1.0]]}),
    ]
    shift = """\
wording, shift, images of each prompt: 1
        score     95 %  prompts
other  0.5000  ±0.9800        2
mean   0.5000  ±0.9800        2"""
    tables, means = TABLES.rsplit("\n\n", 1)
    assert format_tables(suites) == "\n\n".join([tables, shift, means])


def test_one_domain_alone_has_no_gap():
    lines = format_tables([judged("geneval", "ood", GENEVAL)]).splitlines()
    assert lines[-1].split() == ["out", "of", "domain", "0.3333", "±0.3831"]


def test_suites_that_enter_no_mean_have_no_table_of_means():
    table = format_tables([judged("wording", "shift", {"a": [[0.0], [1.0]]})])
    assert table.splitlines()[-1].split()[0] == "mean"


def test_a_part_of_one_category_alone_has_its_own_mean():
    suite = judged("compbench", "id", {"color": [[0.25, 0.75]], "shape": [[0.5, 1.0]]})
    suite.verdicts[OWN]["color"] = torch.tensor([[0.25, 0.75], [NAN, NAN]]).double()
    assert suite.metrics()["val/id/compbench/parts/color"] == 0.5


def test_the_interval_by_hand():
    """Prompts' means 0.25, 0 and 1: mean 5/12, sample deviation sqrt(13/48)."""
    row, *_, mean = suite_rows(judged("geneval", "ood", GENEVAL))
    squares = [(value - 5 / 12) ** 2 for value in (0.25, 0.0, 1.0)]
    error = math.sqrt(sum(squares) / 2) / math.sqrt(3)
    assert error == pytest.approx(math.sqrt(13 / 48 / 3))
    assert row.half_width == pytest.approx(1.96 * error)
    other = math.sqrt(2 * 0.25**2) / math.sqrt(2)  # means 0 and 0.5 around 0.25
    assert mean.half_width == pytest.approx(1.96 * math.sqrt(error**2 + other**2) / 2)


def test_more_pictures_of_the_same_prompts_make_no_narrower_interval():
    few, many = ({"a": [[0.0] * copies, [1.0] * copies]} for copies in (1, 10))
    widths = [suite_rows(judged("s", "id", rows))[0].half_width for rows in (few, many)]
    assert widths[0] == widths[1] == pytest.approx(1.96 * math.sqrt(0.5) / math.sqrt(2))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """40 prompts that are right with a chance of their own, 4 pictures each."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        chances = torch.rand(40, 1, generator=generator)
        scores = (torch.rand(40, 4, generator=generator) < chances).double()
        hits += abs(scores.mean().item() - 0.5) < 1.96 * mean_error(scores)
    assert 0.92 < hits / 400 < 0.975


def test_a_prompt_counts_by_its_verdicts():
    """Of sums s and numbers n: m = 1.25 / 3, then (1 - 2 m)² and (0.25 - m)², doubled, over 3."""
    mean = 1.25 / 3
    expected = math.sqrt(2 * ((1 - 2 * mean) ** 2 + (0.25 - mean) ** 2)) / 3
    scores = torch.tensor([[0.5, 0.5], [0.25, NAN], [NAN, NAN]])
    assert mean_error(scores) == pytest.approx(expected)


def test_a_category_of_one_prompt_has_no_interval():
    row, mean = suite_rows(judged("s", "id", {"a": [[0.5, 1.0]]}))
    assert math.isnan(row.half_width) and math.isnan(mean.half_width)
    assert "±?" in format_tables([judged("s", "id", {"a": [[0.5, 1.0]]})])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            [[0.5, 0.5], [0.5, NAN]],
            "suite s: expected scores that differ, got 0.5 for all 3 pictures with",
        ),
        ([[NAN, NAN], [NAN, NAN]], "suite s: expected scores that differ, got no verdict on all 4"),
    ],
)
def test_equal_scores_are_told(scores, message):
    with pytest.warns(UserWarning, match=message) as caught:
        warn_of_equal(judged("s", "id", {"a": scores}))
    assert len(caught) == 1


@pytest.mark.parametrize("scores", [[[0.5, 0.5], [0.5, 0.75]], [[0.5]]])
def test_scores_that_differ_and_single_ones_are_not(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_equal(judged("s", "id", {"a": scores}))
