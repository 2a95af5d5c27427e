"""A whole report of a made-up study: what it says, and that it says no more than its folders."""

import html
import json
import math
import re
import shutil
import subprocess
from itertools import pairwise

import pytest

from cotgen_pl.study.claims import Claim, Found
from cotgen_pl.study.definition import read_study
from cotgen_pl.study.report import check_shown, write_report
from cotgen_pl.study.sections import claim_blocks, missing_blocks
from cotgen_pl.study.statistics import Interval, judge_claim
from tests.study.made_up import make_study, read_all, study_file

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
# Chromium's windows are 500 pixels wide at least, so the page itself is made as narrow as a phone.
MEASURE = """
<style>html { width: WIDTHpx; }</style>
<script>
addEventListener("load", () => {
  const all = selector => [...document.querySelectorAll(selector)];
  const box = element => element.getBoundingClientRect();
  const texts = all("th, td, p, li, h1, h2, h3, figcaption, pre");
  const blocks = all("section > *").map(box);
  document.title = JSON.stringify({
    beside: all("body *").filter(e => !e.closest(".scroll *, pre") && box(e).right > WIDTH).length,
    wide: document.body.scrollWidth - document.body.clientWidth,
    cut: texts.filter(e => e.tagName != "PRE" && e.scrollWidth > e.clientWidth + 1).length,
    overlapping: blocks.filter((b, i) => i && b.top < blocks[i - 1].bottom - 1).length,
    blank: [...document.images].filter(e => !e.naturalWidth || e.width < 90).length,
    images: document.images.length,
    tables: all(".scroll table").length,
  });
});
</script>
"""


def claim(name, **changes):
    entries = {"test": "difference", "group": "main", "domain": "id", "of": {}}
    return Claim(name=name, says=f"{name} is so", **entries | changes)


@pytest.fixture(scope="module")
def report(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    own = Found(claim("A"), "seen", {"difference": Interval(0.05, 0.01, 0.09)}, 6)
    write_report(records, [own], folder)
    return folder


def test_page_and_markdown_tell_the_same(report):
    page, text = (report / "report.html").read_text(), (report / "report.md").read_text()
    titles = re.findall(r"<h[23]>(.*?)</h", page)
    assert titles == re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    assert titles[:2] == ["In short", "Rewards and algorithms"]
    assert page.count("<tr>") == len(re.findall(r"^\| (?!---)", text, re.MULTILINE))
    assert page.count("<img ") == text.count("![") + text.count("<img ")


def test_markdown_names_files_that_are_there(report):
    named = set(re.findall(r"(?:figures|pictures)/[\w.-]+", (report / "report.md").read_text()))
    there = {
        f"{p.parent.name}/{p.name}" for f in ("figures", "pictures") for p in (report / f).iterdir()
    }
    assert named == there
    assert len(list((report / "tables").glob("*.csv"))) >= 8


def test_commit_configs_and_commands_stand_in_it(report):
    text = (report / "report.md").read_text()
    assert "commit: 0123abc" in text
    assert "python tools/main.py fit --config configs/dpo.yaml --reward exact" in text
    assert "Nothing: all runs of the study are finished" in text


def test_names_of_columns_are_unique(report):
    tables = sorted((report / "tables").glob("*.csv"))
    assert len(tables) >= 8
    for path in tables:
        columns = path.read_text().splitlines()[0].split(",")
        assert len(set(columns)) == len(columns), path.name
    text = (report / "report.md").read_text().splitlines()
    heads = [line.split(" | ") for line, below in pairwise(text) if below.startswith("| ---")]
    assert len(heads) >= 8
    assert all(len(set(head)) == len(head) for head in heads)


def test_same_records_give_the_same_files(report, records, tmp_path):
    own = Found(claim("A"), "seen", {"difference": Interval(0.05, 0.01, 0.09)}, 6)
    write_report(records, [own], tmp_path)
    files = [path for path in report.rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        assert (tmp_path / path.relative_to(report)).read_bytes() == path.read_bytes()


def test_run_folder_that_is_gone_takes_its_rows_along(tmp_path):
    study = make_study(tmp_path / "runs", seeds=(0,))
    write_report(read_all(study), [], tmp_path / "report")
    whole = {path.name for path in (tmp_path / "report").rglob("*.*")}
    assert "main-narrow-dpo-0-near-0.png" in whole
    shutil.rmtree(tmp_path / "runs/main/narrow-dpo")
    shutil.rmtree(tmp_path / "runs/rounds")
    write_report(read_all(study), [], tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    rows = [line for line in text.splitlines() if "narrow | dpo" in line]
    assert not rows
    assert "| main/narrow-dpo | Rewards and algorithms (main) | 0 |" in text
    left = {path.name for path in (tmp_path / "report").rglob("*.*")}
    assert left - whole == {"missing-runs.csv"}
    assert {"main-narrow-dpo-0-near-0.png", "rounds-id.svg", "rounds.csv"} <= whole - left
    assert "narrow,dpo" not in (tmp_path / "report/tables/results-near.csv").read_text()


def test_what_half_of_a_gain_took_is_a_table_like_others(tmp_path):
    entry = {"group": "rounds", "kind": "half_gain", "axis": "rounds", "gain": 0.15}
    study = make_study(tmp_path / "runs", tables={"halves": entry}, figures={})
    write_report(read_all(study), [], tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "### Rounds needed for half of the final gain" in text
    assert "| dpo | in domain | 2 | at most 1<br>seeds: at most 1; at most 1 |" in text
    seconds = (tmp_path / "report/tables/halves-seconds.csv").read_text()
    assert "grpo,in domain,2,not reached" in seconds.replace('"', "")


def test_study_without_a_finished_run_has_a_report(tmp_path):
    study = read_study(study_file(tmp_path))
    write_report(read_all(study), [], tmp_path / "report")
    assert "0 of 26 runs are finished" in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"group": "main", "kind": "bars"}, "expected kind to be one of suites"),
        ({"group": "main"}, "got None"),
        ({"group": "main", "kind": "suites", "domain": "id"}, r"got unknown \['domain'\]"),
        ({"group": "main", "kind": "metrics"}, r"missing \['metrics', 'title'\]"),
        (
            {"group": "main", "kind": "rewards", "marks": [{"labels": {"reward": "exat"}}]},
            r"expected axes and levels of group main \(.*\), got reward 'exat'",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, entry, message):
    study = read_study(study_file(tmp_path, tables={"mine": entry}))
    with pytest.raises(ValueError, match=f"mine: .*{message}"):
        check_shown(study)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"group": "rounds", "kind": "levels", "axis": "round"}, "mine: .* group rounds .* round;"),
        ({"group": "rounds", "kind": "best_of_n"}, "mine: .* got reward;"),
        ({"group": "rounds", "kind": "uplift"}, "group rounds: expected an axis 'reward'"),
        ({"group": "rounds", "kind": "comparison", "labels": {"rounds": 2}}, "mine: .* rounds 2;"),
        ({"group": "main", "kind": "curves", "against": ["image"]}, "expected against to be one"),
    ],
)
def test_charts_of_axes_that_a_group_does_not_have_are_refused(tmp_path, entry, message):
    study = read_study(study_file(tmp_path, figures={"mine": entry}))
    with pytest.raises(ValueError, match=message):
        check_shown(study)


OPPOSITE, ABSENT = Interval(-0.04, -0.06, -0.02), Interval(0.0, -0.01, 0.01)
PRESENT, OPEN = Interval(0.05, 0.01, 0.09), Interval(0.05, -0.01, 0.11)


def found(name, interval, **changes):
    return Found(claim(name, **changes), judge_claim(interval), {"x": interval}, 6)


def test_contradictions_of_the_paper_are_stated():
    opposite, absent = found("A", OPPOSITE, paper=True), found("B", ABSENT, paper=True)
    told, heading, points, table = claim_blocks([opposite, absent, found("C", OPPOSITE)])
    assert told == "Of 3 claims: 3 not seen."
    assert heading == "2 of the paper's 2 claims are contradicted here:"
    assert points.points == [
        "The paper: A is so. Here the opposite is found: -0.040 (-0.060 to -0.020).",
        "The paper: B is so. Here it is not seen: +0.000 (-0.010 to +0.010).",
    ]
    assert [row[-1] for row in table.rows] == ["the paper", "the paper", "ours"]


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        (Interval(-0.02, -0.03, -0.01), "the opposite is found"),
        (Interval(-0.01, -0.015, -0.005), "it is not seen"),  # smaller than the smallest effect
        (Interval(-0.04, -0.09, 0.01), "it is not seen"),
    ],
)
def test_the_opposite_is_found_where_the_negative_would_be_seen(interval, told):
    _, _, points, _ = claim_blocks([found("A", interval, paper=True)])
    assert f"Here {told}: " in points.points[0]


def test_what_the_paper_says_and_is_not_decided_is_always_listed():
    mixed = [
        found("A", OPPOSITE, paper=True),
        found("B", OPEN, paper=True),
        Found(claim("C", paper=True), None),
        found("D", OPEN),
        found("E", PRESENT, paper=True),
    ]
    _, heading, _, undecided, points, _ = claim_blocks(mixed)
    assert heading == "1 of the paper's 4 claims is contradicted here:"
    assert undecided == "Not decided, 2 of the paper's 4 claims:"
    assert points.points == [
        "The paper: B is so. Here unclear: +0.050 (-0.010 to +0.110).",
        "The paper: C is so. Here not tested.",
    ]


def test_a_control_that_fails_stands_beside_the_contradictions():
    failing = found("R", PRESENT, control=True, post_hoc=True)
    holding, unknown = found("S", ABSENT, control=True), found("T", OPEN, control=True)
    against = found("A", OPPOSITE, paper=True)
    _, heading, points, table = claim_blocks([against, failing, holding, unknown])
    assert heading == (
        "1 of the paper's 1 claims is contradicted here; "
        "1 of 3 controls fails, 1 could not be decided:"
    )
    assert [point[:13] for point in points.points] == ["The paper: A ", "Control fails"]
    assert "Control fails: R is so. Here +0.050 (+0.010 to +0.090)." in points.points[1]
    assert [row[-1] for row in table.rows] == [
        "the paper",
        "ours, a control, added after the runs",
        *["ours, a control"] * 2,
    ]
    _, heading, _ = claim_blocks([holding])
    assert heading == "0 of 1 controls fail, 0 could not be decided."


def test_only_what_contradicts_is_told():
    steps = {
        "broad: best of 4 less grpo": Interval(0.2, 0.1, 0.3),
        "broad: grpo less dpo": Interval(-0.1, -0.2, -0.05),
        "narrow: grpo less dpo": Interval(0.0, -0.01, 0.01),
    }
    _, _, points, _ = claim_blocks([Found(claim("A", paper=True), "not seen", steps, 6)])
    assert points.points == [
        "The paper: A is so. Here the opposite is found in 1 of 3 comparisons: broad: grpo less "
        "dpo: -0.100 (-0.200 to -0.050)."
    ]
    del steps["broad: grpo less dpo"]
    _, _, points, _ = claim_blocks([Found(claim("A", paper=True), "not seen", steps, 6)])
    assert "it is not seen in 1 of 2 comparisons: narrow: grpo less dpo: +0.000" in points.points[0]


def test_what_has_no_number_says_why():
    nothing = Interval(float("nan"), -0.08, -0.07)
    why = "no final gain to halve: grpo"
    own = Found(claim("A"), judge_claim(nothing), {"efficiency": nothing}, 3, why)
    assert claim_blocks([own])[-1].rows[0][1:3] == ["unclear", ("no number", why)]


def test_units_and_undefined_resamples_stand_behind_the_numbers():
    interval = Interval(0.3, 0.1, 0.5, undefined=0.081)
    words = {"test": "efficiency", "over": "images"}
    own = Found(claim("A", **words), judge_claim(interval), {"efficiency": interval}, 3)
    assert claim_blocks([own])[-1].rows[0][1:3] == [
        "unclear",
        (
            "+0.300 (+0.100 to +0.500) of the largest number of images, 8.1% of the resamples "
            "have no number",
        ),
    ]


def test_claims_that_are_not_tested_contradict_nothing():
    told, said, _, points, table = claim_blocks([Found(claim("A", paper=True), None)])
    assert told == "Of 1 claims: 1 not tested."
    assert said == "0 of the paper's 1 claims are contradicted here."
    assert points.points == ["The paper: A is so. Here not tested."]
    assert table.rows[0][1:] == ["not tested", ("-",), 0, "the paper"]


def test_pictures_without_a_verdict_are_counted(tmp_path):
    study = make_study(tmp_path, seeds=(0,))
    path = tmp_path / "main/exact-grpo/seed_0/evaluation/far.json"
    path.write_text(re.sub(r'"total": [\d.]+', '"total": null', path.read_text(), count=3))
    _, points = missing_blocks(read_all(study))
    assert points.points == ["`main/exact-grpo`, seed 0, far: 3 of 16"]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overlaps_or_is_cut_in_a_browser(report, tmp_path, width):
    measure = MEASURE.replace("WIDTH", str(width))
    page = (report / "report.html").read_text().replace("</body>", f"{measure}</body>")
    (tmp_path / "page.html").write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [CHROMIUM, *flags, "--window-size=1300,2000", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    [title] = re.findall(r"<title>(.*?)</title>", done.stdout)
    found = json.loads(html.unescape(title))
    assert found.pop("images") == page.count("<img ") > 40
    assert found.pop("tables") == page.count("<table>") > 8
    assert found == {"beside": 0, "wide": 0, "cut": 0, "overlapping": 0, "blank": 0}


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        (Interval(0.05, 0.01, 0.09), "+0.050 (+0.010 to +0.090)"),
        (Interval(0.05, 0.01, 0.09, 0.12), "+0.050 (+0.010 to +0.090), 12.0% of the resamples"),
        (Interval(0.05, 0.01, 0.09, 0.0004), "+0.090), less than 0.1% of the resamples have no n"),
        (Interval(math.nan, 0.01, 0.09, 0.0004), "no number"),
    ],
)
def test_what_has_no_number_in_some_resamples_says_so(interval, told):
    table = claim_blocks([found("A", interval)])[-1]
    (line,) = table.rows[0][2]
    assert told in line
    assert ("resamples" in line) == ("resamples" in told)
