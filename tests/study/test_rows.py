"""What a group compares: the base, its best of four by each reward, the trained policies."""

import math
from dataclasses import replace

import numpy as np
import pytest

from cotgen_pl.study.folders import Records
from cotgen_pl.study.rows import axis_beside_reward, best_suite, domain_score, rows_of, suite_score


def test_rows_are_base_best_of_four_and_runs(records, main):
    rows = rows_of(records, main)
    assert [row.kind for row in rows] == ["base"] + 3 * ["best"] + 6 * ["trained"]
    assert rows[0].labels == {"reward": "base", "algorithm": ""}
    assert rows[1].labels == {"reward": "exact", "algorithm": "best of 4"}
    assert rows[-1].title == "broad, grpo"
    assert sorted(rows[-1].records) == [0, 1]


def test_best_of_four_is_as_good_as_the_reward_chooses(records, main):
    rows = {row.labels["reward"]: row for row in rows_of(records, main)[1:4]}
    scores = {reward: domain_score(row.records[0], "id") for reward, row in rows.items()}
    assert scores == pytest.approx({"exact": 0.6, "broad": 0.6, "narrow": 0.5})
    assert suite_score(rows["broad"].records[0], "near", ["color"], "strict") == 1


def test_reward_that_did_not_look_has_no_best_of_four(records, main):
    records = replace(records, study=replace(records.study, judge=None))
    rows = rows_of(records, main)
    assert [row.labels["reward"] for row in rows if row.kind == "best"] == ["narrow", "broad"]


def test_best_of_four_needs_four_pictures(records):
    suite = records.base(0).suites["near"]
    few = replace(suite, graded=suite.graded[:, :3], strict=None)
    assert np.isnan(best_suite(few, few.graded, 4).graded).all()
    assert best_suite(few, None, 2).strict is None


def test_scores_that_are_not_there_are_missing(records):
    base = records.base(0)
    assert math.isnan(suite_score(base, "elsewhere"))
    assert math.isnan(suite_score(base, "near", ["no such category"]))
    assert math.isnan(domain_score(base, "shift"))


def test_without_a_base_there_is_no_row_for_it(records, main):
    trained = {place: record for place, record in records.records.items() if place[0] != "base"}
    rows = rows_of(Records(records.study, trained, ()), main)
    assert {row.kind for row in rows} == {"trained"}


def test_group_without_rewards_is_not_shown_by_them(records):
    with pytest.raises(ValueError, match="expected an axis 'reward' and one more"):
        axis_beside_reward(records.study.groups["rounds"])
