"""A run folder read into a record, against files written out by hand."""

import json
import math

import numpy as np
import pytest

from cotgen_pl.study.folders import read_record

PROMPTS = [("a red circle", "color"), ("two cats", "count"), ("three cats", "count")]
TOTALS = [[1.0, 0.5], [0.0, None], [1.0, 1.0]]  # None: no verdict


def write_suite(folder, name="near", domain="id", totals=TOTALS, file=None, **more):
    rows = [
        {
            "index": index,
            "prompt": text,
            "category": category,
            "copy": copy,
            "seed": 10 * index + copy,
            "total": totals[index][copy],
            "parts": {"graded": totals[index][copy], "strict": float(totals[index][copy] == 1)},
            "others": {"watched/narrow": 0.1 * copy, "trained": 0.3},
            "details": {"failed": []},
        }
        for index, (text, category) in enumerate(PROMPTS)
        for copy in range(2)
    ]
    path = folder / "evaluation" / f"{file or name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [{"name": name} for name in ("color[template]", "count", "mean")]
    content = {"suite": name, "domain": domain, "table": table, "verdicts": rows[::-1]}
    path.write_text(json.dumps(more | content))


def write_metrics(folder, rows):
    lines = [f"r,{step},{metric},{value!r}" for step, metric, value in rows]
    (folder / "metrics.csv").write_text("\n".join(["run,step,metric,value", *lines]) + "\n")


def test_verdicts_are_tables_of_prompts_and_copies(tmp_path):
    write_suite(tmp_path)
    suite = read_record(tmp_path, "main/grpo", 3).suites["near"]
    assert suite.prompts == [text for text, _ in PROMPTS]
    np.testing.assert_equal(suite.graded, [[1.0, 0.5], [0.0, math.nan], [1.0, 1.0]])
    np.testing.assert_equal(suite.strict, [[1, 0], [0, 0], [1, 1]])
    np.testing.assert_equal(suite.watched["narrow"], [[0, 0.1]] * 3)
    assert list(suite.watched) == ["narrow"]
    assert suite.details[0] == [{"failed": []}] * 2
    assert [suite.name_of(own) for own in suite.categories] == ["color[template]", *["count"] * 2]


def test_means_leave_out_missing_verdicts(tmp_path):
    write_suite(tmp_path)
    record = read_record(tmp_path, "main/grpo", 3)
    suite = record.suites["near"]
    assert suite.mean("color") == pytest.approx(0.75)
    assert suite.mean("count") == pytest.approx(2 / 3)  # of 0, 1 and 1
    assert suite.mean() == record.domain_mean("id") == pytest.approx((0.75 + 2 / 3) / 2)
    assert suite.mean(kind="strict") == pytest.approx((0.5 + 0.5) / 2)
    np.testing.assert_allclose(suite.prompt_means(), [0.75, 0.0, 1.0])
    np.testing.assert_allclose(suite.weights(), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(suite.weights("count"), [0.0, 0.5, 0.5])


def test_verdicts_of_other_weights_are_not_read(tmp_path):
    write_suite(tmp_path)
    write_suite(tmp_path, totals=[[0.0, 0.0]] * 3, file="near-0123abcd")
    assert list(read_record(tmp_path, "r", 0).suites) == ["near"]
    assert read_record(tmp_path, "r", 0).suites["near"].mean("color") == 0.75


def test_curves_are_against_images(tmp_path):
    write_suite(tmp_path)
    rows = [(0, "val/id/mean", 0.5), (1, "perf/images_sampled", 8.0), (1, "perf/training_s", 1.0)]
    rows += [(2, "perf/images_sampled", 16.0), (2, "val/id/mean", 0.75), (2, "val/kl_to_base", 0.1)]
    write_metrics(tmp_path, rows)
    record = read_record(tmp_path, "r", 0)
    curve = record.metrics["val/id/mean"]
    assert curve.images.tolist() == [0, 16]
    assert curve.values.tolist() == [0.5, 0.75]
    assert (record.costs.images, record.costs.seconds, record.costs.kl_to_base) == (16, 1, 0.1)
    assert math.isnan(record.costs.sequences)


PRINTED = """
id/near/mean                                   0.549
id/near/diversity                              0.297
ood/far/diversity                              0.245
"""


def test_the_bases_diversity_is_that_of_its_verdicts_or_the_one_that_was_printed(tmp_path):
    write_suite(tmp_path, diversity=0.29651)
    write_suite(tmp_path, "far", "ood")
    assert list(read_record(tmp_path, "base", 0).metrics) == ["val/id/near/diversity"]
    (tmp_path / "log.txt").write_text(PRINTED)
    metrics = read_record(tmp_path, "base", 0).metrics
    assert {name: curve.values.tolist() for name, curve in metrics.items()} == {
        "val/id/near/diversity": [0.29651],
        "val/ood/far/diversity": [0.245],
    }


def test_what_a_run_logged_is_not_taken_from_what_it_printed(tmp_path):
    write_suite(tmp_path)
    (tmp_path / "log.txt").write_text(PRINTED)
    write_metrics(tmp_path, [(2, "val/id/mean", 0.75)])
    assert list(read_record(tmp_path, "r", 0).metrics) == ["val/id/mean"]


def test_versions_of_the_base_are_those_of_its_verdicts(tmp_path):
    write_suite(tmp_path, variant={"versions": {"cotgen_pl": "0.1", "torch": "2.14"}})
    assert read_record(tmp_path, "base", 0).found == {"cotgen_pl": "0.1", "torch": "2.14"}
    (tmp_path / "run.json").write_text(json.dumps({"commit": "0123abc"}))
    assert read_record(tmp_path, "r", 0).found == {"commit": "0123abc"}


def test_folder_without_verdicts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="let the run finish"):
        read_record(tmp_path, "r", 0)
