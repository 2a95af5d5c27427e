"""What finished runs say of claims, on records made up so that the answer is known."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cotgen_pl.study.arms import best_of_score
from cotgen_pl.study.claims import Claim, judge
from cotgen_pl.study.definition import BASE, Cell, Group, Run, Study
from cotgen_pl.study.folders import Costs, Record, Records, SuiteVerdicts

SEEDS = (0, 1, 2, 3)
REWARDS = ("exact", "broad", "narrow")
LEVELS = {"base": 0.5, "grpo": 0.6, "dpo": 0.55}
NOISE = np.random.default_rng(0).normal(
    0, 0.01, (4, 24, 4)
)  # of seed, prompt and copy, in all runs


def suite_of(level, seed, watched=None) -> SuiteVerdicts:
    graded = level + NOISE[seed]
    prompts = [f"prompt {number}" for number in range(24)]
    return SuiteVerdicts(
        "far", "ood", list(range(24)), prompts, ["a"] * 12 + ["b"] * 12, graded, None,
        {name: values(graded) for name, values in (watched or {}).items()}, [[]] * 24,
    )  # fmt: skip


def record_of(run, level, seed, watched=None) -> Record:
    nothing = Costs(*[math.nan] * 6)
    suite = suite_of(level, seed, watched)
    return Record(Path(run), run, seed, {"far": suite}, {}, nothing, {}, {})


def records_of(levels, watched=None, seeds=SEEDS) -> Records:
    """A group over algorithm and reward; `levels` has each cell's mean score."""
    cells = tuple(Cell({"algorithm": a, "reward": r}, f"main/{a}-{r}", SEEDS) for a, r in levels)
    axes = {"algorithm": ("grpo", "dpo"), "reward": REWARDS}
    group = Group("main", "main", "controlled", "main", axes, cells)
    lower = tuple(Cell(c.labels, f"lower/{c.labels['algorithm']}", SEEDS) for c in cells)
    groups = {"main": group, "lower": replace(group, name="lower", cells=lower)}
    runs = {BASE: Run(BASE, "", {}, SEEDS)} | {c.run: Run(c.run, "", {}, SEEDS) for c in cells}
    study = Study("s", "s", Path("s"), runs, groups, judge="exact")
    found = {(BASE, s): record_of(BASE, LEVELS["base"], s, watched) for s in SEEDS}
    for (algorithm, reward), level in levels.items():
        name = f"main/{algorithm}-{reward}"
        found |= {(name, seed): record_of(name, level, seed) for seed in seeds}
        name = f"lower/{algorithm}"
        found |= {(name, seed): record_of(name, level - 0.1, seed) for seed in seeds}
    return Records(study, found, ())


def claim_of(**changes) -> Claim:
    settings = {"name": "c", "says": "", "test": "difference", "group": "main", "domain": "ood"}
    return Claim(**(settings | {"of": {"algorithm": "grpo"}} | changes))


ALL = {(a, r): LEVELS[a] for a in ("grpo", "dpo") for r in REWARDS}
DPO = {"algorithm": "dpo"}


def test_differences_are_paired_and_have_both_answers():
    records = records_of(ALL)
    found = judge(claim_of(minus=DPO), records)
    interval = found.intervals["difference"]
    assert (found.finding, found.seeds) == ("seen", 4)
    assert interval.mean == pytest.approx(0.05)
    assert interval.high - interval.low < 1e-9  # the noise is the same in both
    assert judge(claim_of(of=DPO, minus={"algorithm": "grpo"}), records).finding == "not seen"
    assert judge(claim_of(), records).intervals["difference"].mean == pytest.approx(0.1)


def test_claims_are_not_tested_on_too_few_seeds():
    found = judge(claim_of(minus=DPO), records_of(ALL, seeds=SEEDS[:2]))
    assert (found.finding, found.seeds) == (None, 2)


def test_best_of_n_is_the_expected_best_by_the_watched_reward():
    suite = suite_of(0.5, 0, {"broad": lambda graded: graded, "blind": np.zeros_like})
    np.testing.assert_allclose(best_of_score("broad", "exact", 4)(suite), suite.graded.max(1))
    np.testing.assert_allclose(best_of_score("blind", "exact", 4)(suite), suite.graded.mean(1))
    np.testing.assert_allclose(best_of_score("exact", "exact", 4)(suite), suite.graded.max(1))
    assert np.isnan(best_of_score("unwatched", "exact", 4)(suite)).all()


def test_uplift_and_gain_are_correlated_over_scorers():
    watched = {"broad": lambda g: g + np.roll(g, 1, 1), "narrow": lambda g: -g}
    order = {("grpo", "exact"): 0.7, ("grpo", "broad"): 0.6, ("grpo", "narrow"): 0.5}
    claim = claim_of(test="correlation", over="reward")
    assert judge(claim, records_of(order, watched)).finding == "seen"
    turned = dict(zip(order, [0.5, 0.6, 0.7], strict=True))
    assert judge(claim, records_of(turned, watched)).intervals["correlation"].mean == -1


def test_spread_over_rewards_is_compared():
    levels = ALL | {("dpo", "exact"): 0.8, ("dpo", "narrow"): 0.3}
    claim = claim_of(test="spread", over="reward", of=DPO, minus={"algorithm": "grpo"})
    found = judge(claim, records_of(levels))
    assert found.finding == "seen"
    assert found.intervals["spread"].mean == pytest.approx(np.std([0.8, 0.55, 0.3], ddof=1))


def test_an_order_is_seen_where_each_step_is():
    low = {(a, r): LEVELS[a] - 0.2 for a, r in ALL}  # best of 4 by anything is above
    watched = {"broad": lambda graded: graded, "narrow": lambda graded: -graded}
    found = judge(claim_of(test="order", minus=DPO), records_of(low, watched))
    assert found.finding == "seen"
    assert len(found.intervals) == 6
    assert list(found.intervals)[:2] == ["exact: best of 4 less grpo", "exact: grpo less dpo"]
    found = judge(claim_of(test="order", minus=DPO), records_of(ALL, watched))
    assert found.finding == "not seen"


def test_another_group_is_compared_place_by_place():
    grpo = {"algorithm": "grpo"}
    found = judge(claim_of(minus_group="lower", minus=grpo), records_of(ALL))
    assert found.intervals["difference"].mean == pytest.approx(0.1)
    assert judge(claim_of(minus=grpo), records_of(ALL)).intervals["difference"].mean == 0
    assert judge(claim_of(minus_group="none", minus=grpo), records_of(ALL)).finding is None


def test_another_group_is_for_differences_of_places():
    groups = records_of(ALL).study.groups
    wrong = claim_of(minus_group="lower", minus=DPO, test="order")
    with pytest.raises(ValueError, match="claim c: expected minus_group beside test: difference"):
        wrong.check(groups["main"], groups["lower"])
    with pytest.raises(ValueError, match="and minus: base; leave it out"):
        claim_of(minus_group="lower").check(groups["main"], groups["lower"])
    absent = claim_of(minus_group="lower", minus={"algorithm": "ppo"})
    with pytest.raises(ValueError, match="expected places and an axis of group lower"):
        absent.check(groups["main"], groups["lower"])


def spread_of(noise, levels=(0.6, 0.4)):
    """How far two runs lie apart, each of 4 seeds with 24 prompts that have noise of their own."""
    records = records_of({("dpo", "exact"): levels[0], ("dpo", "broad"): levels[1]} | {
        ("grpo", reward): 0.5 for reward in ("exact", "broad")
    })  # fmt: skip
    for seed in SEEDS:
        suite = records.records["main/dpo-exact", seed].suites["far"]
        suite.graded[:] = levels[0] + noise[seed]
    claim = claim_of(test="spread", over="reward", of=DPO, minus={"algorithm": "grpo"})
    return judge(claim, records).intervals["spread"]


def test_prompts_count_as_chance_in_every_test():
    """Noise of prompts that is alike in all seeds has an interval of its own."""
    quiet = spread_of(NOISE)
    noise = np.random.default_rng(1).normal(0, 0.1, (24, 1))
    loud = spread_of(np.tile(noise - noise.reshape(2, 12).mean(1).repeat(12)[:, None], (4, 1, 4)))
    assert loud.mean == pytest.approx(quiet.mean, abs=0.01)
    assert loud.high - loud.low > quiet.high - quiet.low + 0.02
