"""What half of a gain and a fixed gain took, on levels whose gains are known."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cotgen_pl.study.claims import Claim, judge
from cotgen_pl.study.definition import BASE, Cell, Group, Run, Study
from cotgen_pl.study.efficiency import check_half_gain, half_gain
from cotgen_pl.study.folders import Costs, Record, Records, SuiteVerdicts

SEEDS = (0, 1, 2)
START = 0.5
PROMPTS, COPIES = 12, 4
NOISE = np.random.default_rng(0).normal(0, 0.01, (3, PROMPTS, COPIES))
SECONDS = {"100": 10.0, "200": 20.0, "400": 50.0}


def record_of(run, seed, level, seconds=math.nan) -> Record:
    suites = {
        domain: SuiteVerdicts(
            domain, domain, list(range(PROMPTS)), ["p"] * PROMPTS, ["a"] * PROMPTS,
            level + NOISE[seed], None, {}, [[]] * PROMPTS,
        )
        for domain in ("id", "ood")
    }  # fmt: skip
    costs = replace(Costs(*[math.nan] * 6), seconds=seconds)
    return Record(Path(run), run, seed, suites, {}, costs, {}, {})


def records_of(gains, axis="images", noise=0.0) -> Records:
    """A group with the gains of each algorithm at the levels of `SECONDS`.

    Args:
        gains: By algorithm.
        axis: What the levels are of.
        noise: A gain's difference from seed to seed.
    """
    labels = [{"algorithm": a, axis: level} for a in gains for level in SECONDS]
    cells = tuple(Cell(own, "-".join(own.values()), SEEDS) for own in labels)
    axes = {"algorithm": tuple(gains), axis: tuple(SECONDS)}
    group = Group("levels", "Levels", "growing", "main", axes, cells)
    runs = {name: Run(name, "", {}, SEEDS) for name in (BASE, *(c.run for c in cells))}
    found = {(BASE, seed): record_of(BASE, seed, START) for seed in SEEDS}
    for algorithm, own in gains.items():
        for gain, (level, seconds) in zip(own, SECONDS.items(), strict=True):
            for seed in SEEDS:
                shift = noise * (seed - 1)
                name = f"{algorithm}-{level}"
                found[name, seed] = record_of(name, seed, START + gain + shift, seconds)
    return Records(Study("s", "s", Path("s"), runs, {"levels": group}), found, ())


def judged(gains, **changes):
    claim = Claim(
        "c", "", "efficiency", "levels", "id", {"algorithm": "dpo"}, {"algorithm": "grpo"}, "images"
    )
    return judge(claim, records_of(gains, **changes))


LATE = [0.0, 0.1, 0.3]  # half at 250
EARLY = [0.2, 0.3, 0.3]  # half before 100
MIDDLE = [0.1, 0.3, 0.3]  # half at 125


def test_what_is_saved_is_a_part_of_the_largest_number():
    found = judged({"dpo": MIDDLE, "grpo": LATE})
    interval = found.intervals["efficiency"]
    assert (found.finding, found.reason) == ("seen", "")
    assert interval.mean == pytest.approx((250 - 125) / 400)
    turned = judged({"dpo": LATE, "grpo": MIDDLE})
    assert turned.finding == "not seen"
    assert turned.intervals["efficiency"].mean == pytest.approx(-(250 - 125) / 400)


def test_two_crossings_before_the_first_level_decide_nothing():
    found = judged({"dpo": EARLY, "grpo": [0.25, 0.3, 0.3]})
    assert found.finding == "unclear"
    assert math.isnan(found.intervals["efficiency"].mean)
    assert found.reason == (
        "of both, half of the gain came before the first measured level (at most 100): which was "
        "earlier is not known"
    )


def test_one_crossing_before_the_first_level_counts_as_any_number_up_to_it():
    found = judged({"dpo": EARLY, "grpo": LATE})
    interval = found.intervals["efficiency"]
    assert found.finding == "seen"
    assert interval.mean == pytest.approx((250 - 100) / 400)
    assert interval.low <= (250 - 100) / 400 + 1e-9
    assert interval.high >= 250 / 400 - 1e-9
    assert found.reason.startswith("of dpo, half of the gain came before the first measured level")
    # 110 less 100 is below the smallest effect, but 110 less 0 is not.
    near = judged({"dpo": EARLY, "grpo": [0.14, 0.24, 0.3]})
    assert near.intervals["efficiency"].mean == pytest.approx(10 / 400)
    near = judged({"dpo": EARLY, "grpo": [0.147, 0.207, 0.3]})
    assert near.intervals["efficiency"].mean == pytest.approx(5 / 400)
    assert near.finding == "unclear"
    turned = judged({"dpo": [0.147, 0.207, 0.3], "grpo": EARLY})
    assert turned.finding == "not seen"


def test_where_nothing_is_gained_there_is_nothing_to_halve():
    found = judged({"dpo": MIDDLE, "grpo": [0.1, 0.0, -0.1]})
    assert found.finding == "unclear"
    assert found.reason == "no final gain to halve: grpo"
    assert found.intervals["efficiency"].undefined == 1


def test_gains_that_some_resamples_do_not_have_are_unclear():
    gains = {"dpo": MIDDLE, "grpo": [-0.2, 0.0, 0.01]}
    found = judged(gains, noise=0.03)
    interval = found.intervals["efficiency"]
    assert interval.mean > 0.02 and interval.low > 0
    assert 0.05 < interval.undefined < 1
    assert found.finding == "unclear"
    assert judged(gains).finding == "seen"


def tables_of(records, **changes):
    words = {"axis": "images", "gain": 0.15} | changes
    return half_gain(records, records.study.groups["levels"], "half", **words)


def test_numbers_stand_by_algorithm_and_domain_with_each_seed():
    halves, _ = tables_of(records_of({"dpo": MIDDLE, "grpo": LATE}))
    assert halves.title == "Images needed for half of the final gain"
    assert halves.columns == ["algorithm", "domain", "seeds", "images"]
    assert halves.rows[0] == ["dpo", "in domain", 3, ("125", "seeds: 125; 125; 125")]
    assert [row[3][0] for row in halves.rows] == ["125", "125", "250", "250"]
    halves, _ = tables_of(records_of({"dpo": EARLY, "grpo": [0.1, 0.0, -0.1]}))
    told = ("at most 100", "seeds: at most 100; at most 100; at most 100")
    assert halves.rows[1] == ["dpo", "out of domain", 3, told]
    assert halves.rows[2][3][0] == "no gain"


def test_prompts_stand_beside_images():
    records = records_of({"dpo": MIDDLE, "grpo": LATE})
    prompts = records_of({"dpo": LATE, "grpo": MIDDLE}, axis="prompts").study.groups["levels"]
    more = Records(
        replace(
            records.study, groups=records.study.groups | {"data": replace(prompts, name="data")}
        ),
        records.records,
        (),
    )
    halves, _ = tables_of(more, more={"prompts": "data"})
    assert halves.title == "Images and prompts needed for half of the final gain"
    assert [row[3:] for row in halves.rows[:1]] == [[("125", "seeds: 125; 125; 125")] * 2]
    halves, _ = tables_of(records, more={"prompts": "data"})  # a group that is left out
    assert halves.rows[0][4] == "-"


def test_seconds_until_a_gain_lie_between_those_of_the_levels():
    _, seconds = tables_of(records_of({"dpo": [0.1, 0.2, 0.3], "grpo": [0.0, 0.05, 0.1]}))
    assert seconds.name == "half-seconds"
    assert seconds.columns[3:] == ["seconds until +0.150", "seconds of the levels"]
    assert seconds.rows[0][3:] == [("15", "seeds: 15; 15; 15"), "10, 20, 50"]
    assert seconds.rows[2][3][0] == "not reached"
    _, seconds = tables_of(records_of({"dpo": EARLY}))
    assert seconds.rows[0][3][0] == "at most 10"


def test_runs_that_logged_no_seconds_say_so():
    records = records_of({"dpo": LATE})
    record = records.records["dpo-200", 1]
    unlogged = replace(record, costs=replace(record.costs, seconds=math.nan))
    found = {**records.records, ("dpo-200", 1): unlogged}
    _, seconds = tables_of(Records(records.study, found, ()))
    assert seconds.rows[0][3] == ("seconds not logged", "seeds: 28; seconds not logged; 28")


def test_a_level_without_a_seed_takes_that_seed_out():
    records = records_of({"dpo": MIDDLE})
    kept = {p: r for p, r in records.records.items() if p != ("dpo-400", 1)}
    halves, _ = tables_of(Records(records.study, kept, ()))
    assert halves.rows[0][2:] == [2, ("125", "seeds: 125; 125")]
    kept = {p: r for p, r in kept.items() if p[0] != "dpo-400"}
    assert tables_of(Records(records.study, kept, ())) == []


def test_levels_must_be_numbers():
    groups = records_of({"dpo": LATE}).study.groups
    entry = {"group": "levels", "axis": "images", "gain": 0.05, "more": {"prompts": "elsewhere"}}
    check_half_gain("mine", entry, groups)
    with pytest.raises(ValueError, match="group levels: expected an axis algorithm whose levels"):
        check_half_gain("mine", entry | {"axis": "algorithm"}, groups)
    with pytest.raises(ValueError, match="mine: expected a gain above 0, got 0"):
        check_half_gain("mine", entry | {"gain": 0}, groups)
