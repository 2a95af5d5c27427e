"""The rule by which settings are chosen, on the made-up study."""

import math
from dataclasses import replace

import pytest

from cotgen_pl.study.choice import choose_settings, format_choice
from cotgen_pl.study.folders import Records

RULE = {"groups": ["main"], "suite": "near"}


def with_divergence(records: Records, run: str, nats: float) -> Records:
    """The same but for how far a run's policy has moved."""
    found = {
        place: replace(record, costs=replace(record.costs, kl_to_base=nats))
        for place, record in records.records.items()
        if place[0] == run
    }
    return replace(records, records={**records.records, **found})


def names_of(candidates) -> list[str]:
    return ["-".join(one.cell.labels.values()) for one in candidates]


def test_the_best_score_in_the_suite_that_decides_comes_first(records):
    near = choose_settings(RULE, records)["main"]
    algorithms = [name.split("-")[1] for name in names_of(near)]
    assert names_of(near)[:3] == ["exact-dpo", "broad-dpo", "narrow-dpo"]
    assert algorithms == ["dpo"] * 3 + ["grpo"] * 3
    assert near[0].score == pytest.approx(0.755)  # mean over two seeds, 0.75 and 0.76
    assert near[0].kl_to_base == pytest.approx(0.2)
    far = choose_settings(RULE | {"suite": "far"}, records)["main"]
    assert names_of(far)[0] == "exact-grpo"


def test_of_equal_scores_the_smaller_divergence_comes_first(records):
    rule = {"groups": ["rounds"], "suite": "near"}  # whose runs of one algorithm all score the same
    ordered = choose_settings(rule, records)["rounds"]
    assert names_of(ordered)[:3] == ["1-dpo", "2-dpo", "3-dpo"]
    moved = with_divergence(records, "rounds/3-dpo", 0.1)
    ordered = choose_settings(rule, moved)["rounds"]
    assert names_of(ordered)[:3] == ["3-dpo", "1-dpo", "2-dpo"]


def test_a_higher_score_beats_a_smaller_divergence(records):
    moved = with_divergence(records, "main/narrow-grpo", 0.0)
    assert names_of(choose_settings(RULE, moved)["main"])[0] == "exact-dpo"


def test_a_run_without_a_verdict_is_never_chosen(records):
    found = dict(records.records)
    for seed in (0, 1):
        near = found["main/exact-dpo", seed].suites["near"]
        unread = {"near": replace(near, graded=near.graded * math.nan)}
        found["main/exact-dpo", seed] = replace(found["main/exact-dpo", seed], suites=unread)
    ordered = choose_settings(RULE, replace(records, records=found))["main"]
    assert names_of(ordered)[0] == "broad-dpo"
    assert names_of(ordered)[-1] == "exact-dpo"


def test_nothing_is_chosen_while_a_run_is_missing(records):
    found = {place: r for place, r in records.records.items() if place != ("main/broad-dpo", 1)}
    missing = Records(records.study, found, (("main/broad-dpo", 1),))
    with pytest.raises(ValueError, match=r"got none of \['main/broad-dpo seed 1'\]; run them"):
        choose_settings(RULE, missing)


def test_the_table_has_a_line_for_each_candidate(records):
    lines = format_choice(choose_settings(RULE, records)).splitlines()
    assert lines[0] == "main, the first is chosen"
    assert lines[2].split() == ["reward", "exact,", "algorithm", "dpo", "0.7550", "0.2000"]
    assert len(lines) == 2 + 6
