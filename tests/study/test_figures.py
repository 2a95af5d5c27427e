"""Charts of a made-up study: what they are drawn from, and that they are drawn alike each time."""

import re
from dataclasses import replace

import numpy as np
import pytest

from cotgen_pl.study import figures
from cotgen_pl.study.folders import Curve

MEAN, KL = "val/id/mean", "val/kl_to_base"


def run_with(record, updates, images, values):
    """The record with another course; its divergence is a hundredth of the update."""
    places = np.array(updates, dtype=float)
    curve = Curve(places, np.array(images, dtype=float), np.array(values))
    return replace(record, metrics={MEAN: curve, KL: replace(curve, values=places / 100)})


@pytest.fixture
def record(records):
    return records.records["main/exact-dpo", 0]


def test_course_is_the_mean_over_seeds(record):
    runs = [run_with(record, [0, 4], [0, 8], [0.5, end]) for end in (0.6, 0.8)]
    course = figures.course_of(runs, MEAN, "images")
    assert course.place.tolist() == [0, 8]
    np.testing.assert_allclose(course.mean, [0.5, 0.7])
    np.testing.assert_allclose(course.deviation, [0, 0.2 / np.sqrt(2)])


def test_ends_are_taken_together(record):
    long = run_with(record, [0, 4, 8, 9], [0, 16, 32, 36], [0.5, 0.6, 0.7, 0.8])
    short = run_with(record, [0, 4, 7], [0, 16, 28], [0.5, 0.6, 0.6])
    course = figures.course_of([long, short], MEAN, "images")
    assert course.place.tolist() == [0, 16, 32]
    np.testing.assert_allclose(course.mean, [0.5, 0.6, 0.7])


def test_images_that_are_drawn_at_once_have_one_point(record):
    run = run_with(record, [0, 4, 8], [0, 64, 64], [0.5, 0.6, 0.7])
    assert figures.course_of([run], MEAN, "images").mean.tolist() == [0.5, 0.7]
    assert figures.course_of([run], MEAN, "kl_to_base").place.tolist() == [0, 0.04, 0.08]


def test_run_that_did_not_score_its_start_begins_at_the_base(records, main, record):
    run = run_with(record, [4, 8], [32, 64], [0.6, 0.7])
    started = figures._with_start(run, records.base(0)).metrics[MEAN]
    assert started.updates.tolist() == [0, 4, 8]
    assert started.images.tolist() == [0, 32, 64]
    np.testing.assert_allclose(started.values, [0.5, 0.6, 0.7])


def test_curves_have_both_domains_against_images_and_divergence(records, main):
    [shown] = figures.curves(records, main, "curves")
    assert [panel.name for panel in shown.panels] == [f"curves-{n}" for n in (1, 2, 3, 4)]
    first, second, third, _ = (panel.alt for panel in shown.panels)
    assert first.startswith("in domain against images sampled")
    assert second.startswith("in domain against KL")
    assert third.startswith("out of domain against images")
    assert "exact, dpo 0.755" in first


def test_levels_have_a_panel_for_each_domain(records):
    [shown] = figures.levels(records, records.study.groups["rounds"], "rounds", axis="rounds")
    near, far = shown.panels
    assert "2, grpo +0.105" in near.alt
    assert "2, dpo -0.045" in far.alt


def test_uplift_has_a_point_for_each_reward(records, main):
    [shown] = figures.uplift(records, main, "uplift")
    assert [panel.name for panel in shown.panels] == ["uplift-dpo", "uplift-grpo"]
    assert "broad, dpo +0.100, -0.025" in shown.panels[0].alt


def test_summary_has_runs_and_best_of_four(records, main):
    [panel] = figures.summary(records, main, "summary")[0].panels
    assert "exact, dpo +0.255, +0.005" in panel.alt
    assert "narrow, best of 4 +0.000, +0.000" in panel.alt
    assert "base" not in panel.alt


def test_best_of_n_ends_at_all_pictures(records, main):
    [shown] = figures.best_of_n(records, main, "best")
    assert "of 4 the choice by exact 0.600, narrow 0.500, broad 0.600" in shown.panels[0].alt


def test_same_records_give_the_same_bytes(records, main):
    first, second = (figures.summary(records, main, "summary")[0].panels[0] for _ in range(2))
    assert first.svg == second.svg
    assert not re.search(r"<dc:date>|font-family|<text", first.svg)


def test_captions_tell_the_number_of_seeds(records, main):
    kept = {p: r for p, r in records.records.items() if p != ("main/broad-dpo", 1)}
    fewer = replace(records, records=kept)
    shown = (figures.summary, figures.curves, figures.uplift, figures.best_of_n)
    for draw in shown:
        [whole] = draw(records, main, "chart")
        assert whole.caption.endswith("the sample deviation over 2 seeds.")
    [part] = figures.summary(fewer, main, "chart")
    assert part.caption.endswith("over 1 to 2 seeds.")
    one = {place: record for place, record in kept.items() if place[1] == 0}
    [single] = figures.levels(
        replace(records, records=one), records.study.groups["rounds"], "chart", axis="rounds"
    )
    assert single.caption.endswith("one seed, so no bars and bands.")
