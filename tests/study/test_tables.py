"""Tables of a made-up study, against numbers that are known beforehand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from cotgen_pl.study.entries import Entry, Spread, compare
from cotgen_pl.study.folders import Curve, Records
from cotgen_pl.study.tables import (
    MEASURED,
    costs,
    domains,
    metrics,
    rewards,
    shifts,
    suites,
    uplifts,
)

DEVIATION = 0.01 / math.sqrt(2)  # of two seeds that lie 0.01 apart


def table_of(tables, name):
    [found] = [table for table in tables if table.name == name]
    return found


def entry_of(table, column, *labels):
    [row] = [row for row in table.rows if tuple(row[: len(labels)]) == labels]
    return row[list(table.columns).index(column)]


def test_spread_leaves_out_what_is_not_known():
    assert Spread.of([]).text() == "-"
    assert Spread.of([0.5, math.nan]).text() == "0.500 ± ?"
    assert Spread.of([0.5, 0.7]).text("+.2f") == "+0.60 ± 0.14"


def test_gains_of_fewer_seeds_say_so():
    lines = compare({0: 0.6, 1: 0.8}, {0: 0.5}).lines()
    assert lines == ["0.700 ± 0.141", "+0.100 ± ? (1 of 2 seeds)", "+20.0 ± ? % (1 of 2 seeds)"]


def test_gain_over_a_base_of_zero_has_no_percentage():
    assert compare({0: 0.5}, {0: 0.0}).lines() == ["0.500 ± ?", "+0.500 ± ?"]


def test_each_suite_has_a_table_with_all_categories(records, main):
    near, far = suites(records, main, "results")
    assert (near.name, far.name) == ("results-near", "results-far")
    assert "in domain" in near.title and "out of domain" in far.title
    labels = ["reward", "algorithm", "seeds", "mean", "strict mean"]
    assert near.columns == [*labels, "color", "shape"]
    assert far.columns == [*labels, "counting", "position[other]"]
    assert len(near.rows) == 10


def test_scores_have_gain_deviation_and_seeds(records, main):
    near, _ = suites(records, main, "results")
    entry = entry_of(near, "shape", "exact", "dpo")
    assert entry.score.mean == pytest.approx(0.755)
    assert entry.score.deviation == pytest.approx(DEVIATION)
    assert entry.difference.mean == pytest.approx(0.255)
    assert entry.relative.mean == pytest.approx(0.51)
    assert entry.score.seeds == entry.difference.seeds == 2
    assert entry_of(near, "seeds", "exact", "dpo") == 2
    assert entry_of(near, "mean", "base").difference is None
    assert entry_of(near, "mean", "broad", "best of 4").difference.mean == pytest.approx(0.1)


def test_a_run_that_is_gone_has_no_row(records, main):
    kept = {p: r for p, r in records.records.items() if p[0] != "main/narrow-dpo"}
    rows = suites(Records(records.study, kept, ()), main, "results")[0].rows
    assert ["narrow", "grpo"] in [row[:2] for row in rows]
    assert ["narrow", "dpo"] not in [row[:2] for row in rows]


def test_named_means_and_stars(records, main):
    mark = {"labels": {"reward": "exact"}, "domain": "id", "note": "its own metric"}
    means = {"near": {"colors alone": ["color"]}}
    near, far = suites(records, main, "results", means=means, marks=[mark])
    assert entry_of(near, "colors alone", "exact *", "dpo") == entry_of(
        near, "color", "exact *", "dpo"
    )
    assert near.note.endswith("* its own metric")
    assert entry_of(far, "mean", "exact", "dpo")
    assert "*" not in far.note


def test_a_mean_over_a_category_that_is_not_there_is_not_known(records, main):
    means = {"near": {"two": ["color", "shape"], "three": ["color", "shape", "complex"]}}
    near, _ = suites(records, main, "results", means=means)
    assert near.columns[5:] == ["two", "color", "shape"]
    assert near.note.endswith("Not known of any row: three.")


def test_a_mean_over_a_category_without_any_verdict_is_not_known(records, main):
    found = {}
    for place, record in records.records.items():
        near = record.suites["near"]
        unread = np.where(np.array(near.categories)[:, None] == "color", math.nan, near.graded)
        suites_of = record.suites | {"near": replace(near, graded=unread)}
        found[place] = replace(record, suites=suites_of)
    means = {"near": {"both": ["color", "shape"]}}
    near, _ = suites(replace(records, records=found), main, "results", means=means)
    assert near.columns[3:] == ["strict mean", "shape"]


def test_domains_stand_beside_images_and_divergence(records):
    [table] = domains(records, records.study.groups["rounds"], "rounds")
    assert "controlled" in table.title
    assert entry_of(table, "images sampled", "2", "grpo").lines() == ["128 ± 0"]
    assert entry_of(table, "KL to the base", "2", "grpo").score.mean == pytest.approx(0.2)
    assert entry_of(table, "out of domain", "2", "grpo").difference.mean == pytest.approx(0.155)
    assert entry_of(table, "in domain, strict", "base").score.mean == pytest.approx(0.5)


def test_rewards_stand_with_what_they_choose_and_teach(records, main):
    [table] = rewards(records, main, "rewards")
    assert [row[0] for row in table.rows] == ["exact", "narrow", "broad"]
    assert entry_of(table, "best of 4, out of domain", "narrow").score.mean == pytest.approx(0)
    assert entry_of(table, "best of 4, out of domain", "broad").score.mean == pytest.approx(0.1)
    assert entry_of(table, "dpo, out of domain", "broad").score.mean == pytest.approx(-0.025)


def test_a_reward_that_trains_on_its_own_test_metric_is_marked(records, main):
    mark = {"labels": {"reward": "exact"}, "domain": "id", "note": "its own metric"}
    [table] = rewards(records, main, "rewards", marks=[mark])
    assert [row[0] for row in table.rows] == ["exact *", "narrow", "broad"]
    assert table.note.endswith("* in domain: its own metric")


def test_costs_are_the_last_that_was_logged(records, main):
    [table] = costs(records, main, "costs")
    assert "peak memory, GB" not in table.columns
    assert table.note.endswith("Not known of any row: peak memory, GB.")
    found = {column: entry_of(table, column, "exact", "dpo") for column in table.columns[3:]}
    assert found["sequences back-propagated"].lines() == ["256 ± 0"]
    assert found["seconds"].score.mean == 30
    assert found["gain per minute, in domain"].score.mean == pytest.approx(2 * 0.255)


def test_any_logged_number_has_a_table(records, main):
    [table] = metrics(
        records, main, "kl", "How far", {"divergence": "val/kl_to_base", "no": "val/none"}
    )
    assert table.columns == ["reward", "algorithm", "seeds", "divergence"]
    assert table.title == "How far: Rewards and algorithms"
    assert isinstance(table.rows[0][3], Entry)
    assert table.rows[0][0] == "exact"  # nothing is logged of the base


def with_diversity(record, value):
    one = np.ones(1)
    return replace(record, metrics=record.metrics | {DIVERSITY: Curve(one, one, value * one)})


DIVERSITY = "val/id/near/diversity"


def test_what_the_base_has_too_is_compared_with_it(records, main):
    found = {
        place: with_diversity(record, 0.3 if place[0] == "base" else 0.2)
        for place, record in records.records.items()
    }
    records = replace(records, records=found)
    [table] = metrics(records, main, "variety", "Variety", {"in domain": DIVERSITY})
    assert [row[:2] for row in table.rows][:2] == [["base", ""], ["exact", "dpo"]]
    assert entry_of(table, "in domain", "base").lines() == ["0.300 ± 0.000"]
    assert entry_of(table, "in domain", "exact", "dpo").difference.mean == pytest.approx(-0.1)


def with_shift(record):
    """The record with a suite that is the one in domain, less 0.05 for who was trained."""
    near = record.suites["near"]
    loss = 0 if record.run == "base" else 0.05
    moved = replace(near, suite="wording", domain="shift", graded=near.graded - loss)
    return replace(record, suites=record.suites | {"wording": moved})


@pytest.fixture
def shifted(records):
    found = {place: with_shift(record) for place, record in records.records.items()}
    return replace(records, records=found)


def test_shifts_stand_beside_what_they_cost(shifted, main):
    [table] = shifts(shifted, main, "shifts")
    assert table.columns[2:] == [
        "seeds",
        "in domain",
        *("out of domain", "cost, out of domain"),
        *("shift of wording", "cost, shift of wording"),
    ]
    assert len(table.rows) == 3 + 6  # best of four by each reward, and the runs
    exact = ("exact", "dpo")
    assert entry_of(table, "in domain", *exact).score.mean == pytest.approx(0.255)
    assert entry_of(table, "shift of wording", *exact).score.mean == pytest.approx(0.205)
    cost = entry_of(table, "cost, shift of wording", *exact).score
    assert cost.mean == pytest.approx(0.05) and cost.seeds == 2
    assert entry_of(table, "cost, out of domain", *exact).score.mean == pytest.approx(0.25)
    chosen = entry_of(table, "cost, shift of wording", "broad", "best of 4").score
    assert chosen.mean == pytest.approx(0)


def test_scorers_that_only_watched_have_an_uplift_on_every_suite(shifted, main):
    main = replace(main, axes=main.axes | {"reward": ("exact", "broad")})
    [table] = uplifts(shifted, main, "best_of_4")
    assert table.columns == [
        *("chosen by", "seeds"),
        *("near, in domain", "far, out of domain", "wording, shift"),
    ]
    assert [row[0] for row in table.rows] == ["none: the base", "exact", "broad", "narrow"]
    assert entry_of(table, "wording, shift", "broad").difference.mean == pytest.approx(0.1)
    assert entry_of(table, "wording, shift", "narrow").difference.mean == pytest.approx(0)


def test_numbers_of_fewer_seeds_than_their_row_say_so(records, main):
    kept = {p: r for p, r in records.records.items() if p != ("main/broad-dpo", 1)}
    [table] = rewards(replace(records, records=kept), main, "rewards")
    assert entry_of(table, "seeds", "broad") == 2
    assert entry_of(table, "dpo, in domain", "broad").lines() == ["+0.220 ± ? (1 of 2 seeds)"]
    assert entry_of(table, "grpo, in domain", "broad").lines() == ["+0.125 ± 0.007"]


def test_columns_that_the_machine_decides_are_named(records, main):
    [table] = costs(records, main, "costs")
    measured = [column for column in table.columns if column.startswith(MEASURED)]
    assert measured == [
        "seconds",
        "gain per minute, in domain",
        "gain per minute, out of domain",
    ]
