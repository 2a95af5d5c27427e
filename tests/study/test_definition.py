"""A study's file: what it makes of axes, and the mistakes that are named before anything runs."""

from pathlib import Path

import pytest
import yaml

from cotgen_pl.study.checks import check_claims, check_study
from cotgen_pl.study.claims import read_claims
from cotgen_pl.study.definition import read_study

ALGORITHMS = {"grpo": {"config": "g.yaml"}, "dpo": {"config": "d.yaml"}}
CALLBACKS = [
    {"init_args": {"save_last": True}},
    {"init_args": {"suites": [{"name": "near", "domain": "id"}]}},
]


def study_of(folder: Path, **changes) -> Path:
    content = {
        "name": "tiny",
        "title": "Tiny",
        "folder": "runs/tiny",
        "seeds": [0, 1, 2],
        "base": {"config": "b.yaml"},
        "groups": {
            "main": {
                "title": "main",
                "priority": "main",
                "comparison": "controlled",
                "axes": {"algorithm": ALGORITHMS, "size": {4: {}, 8: {"overrides": {"a": 8}}}},
            },
            "other": {"title": "other", "num_seeds": 2, "axes": {"algorithm": ALGORITHMS}},
        },
        "tables": {"one": {"group": "main"}},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def settings_of(study, budgets=None):
    return {
        name: {
            "trainer": {"callbacks": CALLBACKS},
            "model": {"init_args": {"images_budget": (budgets or {}).get(name, 64)}},
        }
        for name in study.runs
    }


def test_runs_are_all_combinations_and_groups_share_equal_ones(tmp_path):
    study = read_study(study_of(tmp_path))
    assert list(study.runs) == ["base", "main/grpo-4", "main/grpo-8", "main/dpo-4", "main/dpo-8"]
    assert study.groups["other"].cell(algorithm="dpo").run == "main/dpo-4"
    assert study.groups["other"].cell(algorithm="dpo").seeds == (0, 1)
    assert study.runs["main/grpo-8"].overrides == {"a": 8}
    assert len(list(study.seeded_runs())) == 15
    assert study.run_folder("main/grpo-8", 2) == Path("runs/tiny/main/grpo-8/seed_2")


def test_a_level_may_say_something_for_one_level_of_another_axis(tmp_path):
    where = {"overrides": {"x": "{folder}/p"}, "where": {"dpo": {"overrides": {"y": 2}}}}
    axes = {"algorithm": ALGORITHMS, "data": {64: where}}
    study = read_study(study_of(tmp_path, groups={"g": {"title": "g", "axes": axes}}, tables={}))
    assert study.runs["g/grpo-64"].overrides == {"x": "runs/tiny/p"}
    assert study.runs["g/dpo-64"].overrides == {"x": "runs/tiny/p", "y": 2}


def test_quick_is_one_seed_of_the_main_groups(tmp_path):
    study = read_study(study_of(tmp_path), quick=True)
    assert list(study.groups) == ["main"]
    assert {run.seeds for run in study.runs.values()} == {(0,)}


def test_runs_come_behind_what_they_start_from(tmp_path):
    levels = {
        "second": {"config": "g.yaml", "starts_from": "g/first"},
        "first": {"config": "d.yaml"},
    }
    groups = {"g": {"title": "g", "axes": {"stage": levels}}}
    study = read_study(study_of(tmp_path, groups=groups, tables={}))
    assert list(study.runs) == ["base", "g/first", "g/second"]
    levels["first"] = {"config": "d.yaml", "starts_from": "g/second"}
    with pytest.raises(ValueError, match="starts_from to name a run of this study"):
        read_study(study_of(tmp_path, groups=groups, tables={}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown .'sedes'."),
        ({"tables": {"one": {"group": "mian"}}}, "expected a group among main, other"),
        (
            {"tables": {"one": {"group": "main", "more": {"n": "mian"}}}},
            "among main, other, got 'm",
        ),
        ({"groups": {"g": {"title": "g", "axes": {"a": {"x": {}}}}}, "tables": {}}, "a config for"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_study(study_of(tmp_path, **changes))


def test_a_shared_run_has_the_same_name_whichever_groups_are_asked_for(tmp_path):
    whole, part = read_study(study_of(tmp_path)), read_study(study_of(tmp_path), only=["other"])
    assert part.groups.keys() == {"other"}
    shared = [c.run for c in part.groups["other"].cells if c.run.startswith("main/")]
    assert shared and [c.run for c in part.groups["other"].cells] == [
        c.run for c in whole.groups["other"].cells
    ]
    asked_for = {cell.run: cell.seeds for cell in part.groups["other"].cells}
    assert {name: run.seeds for name, run in part.runs.items() if name != "base"} == asked_for


def test_what_a_run_starts_from_comes_along(tmp_path):
    content = yaml.safe_load(study_of(tmp_path).read_text())
    first = content["groups"]["main"]
    started = {"starts_from": "main/dpo-4", "overrides": {"model.init_args.group_size": 2}}
    content["groups"]["later"] = first | {"axes": {"algorithm": {"dpo": started}}, "num_seeds": 1}
    content["groups"]["later"]["config"] = "run.yaml"
    path = tmp_path / "chained.yaml"
    path.write_text(yaml.safe_dump(content))
    study = read_study(path, only=["later"])
    assert study.groups.keys() == {"later"}
    assert list(study.runs) == ["base", "main/dpo-4", "later/dpo"]
    assert study.runs["main/dpo-4"].seeds == study.runs["later/dpo"].seeds


def test_unknown_groups_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected groups among main, other"):
        read_study(study_of(tmp_path), only=["nothing"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a YAML file at nowhere\.yaml"):
        read_study("nowhere.yaml")


def test_a_controlled_comparison_has_equal_budgets(tmp_path):
    study = read_study(study_of(tmp_path))
    check_study(study, settings_of(study), [])
    with pytest.raises(ValueError, match="group main: expected equal budgets"):
        check_study(study, settings_of(study, {"main/dpo-4": 128}), [])


def test_a_deviation_needs_two_seeds(tmp_path):
    groups = {"main": {"title": "main", "axes": {"algorithm": ALGORITHMS}}}
    study = read_study(study_of(tmp_path, seeds=[0], groups=groups))
    with pytest.raises(ValueError, match="2 seeds or more for the deviation in table one"):
        check_study(study, settings_of(study), [])
    check_study(study, settings_of(study), [], deviates=False)


def claims_of(folder: Path, **changes) -> list:
    claim = {"says": "s", "test": "difference", "group": "other", "domain": "id"}
    claim |= {"of": {"algorithm": "dpo"}, "minus": {"algorithm": "grpo"}}
    path = folder / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": {"one": claim | changes}}))
    return read_claims(str(path))


def test_a_claims_test_needs_its_seeds_and_places(tmp_path):
    study = read_study(study_of(tmp_path))
    with pytest.raises(ValueError, match="3 seeds or more for the test of claim one"):
        check_study(study, settings_of(study), claims_of(tmp_path))
    check_study(study, settings_of(study), claims_of(tmp_path, seeds=2))
    with pytest.raises(ValueError, match="claim one: expected places"):
        check_study(study, settings_of(study), claims_of(tmp_path, of={"algorithm": "ppo"}))


def test_a_claim_about_two_groups_needs_seeds_and_places_of_both(tmp_path):
    study = read_study(study_of(tmp_path))
    places = {"group": "main", "minus_group": "other", "of": {"algorithm": "dpo", "size": "4"}}
    claims = claims_of(tmp_path, **places)
    with pytest.raises(ValueError, match="group other: expected 3 seeds or more for the test of"):
        check_study(study, settings_of(study), claims)
    claims = claims_of(tmp_path, **places, seeds=2, minus={"size": "8"})
    with pytest.raises(ValueError, match="claim one: expected places and an axis of group other"):
        check_study(study, settings_of(study), claims)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": "othre"}, "claim one: expected a group among main, other, got 'othre'"),
        ({"minus_group": "othre"}, "claim one: expected a group among main, other, got 'othre'"),
        ({"domain": "odo"}, "claim one: expected a domain among id, ood, shift, got 'odo'"),
        ({"of": {"algorithm": "ppo"}}, "claim one: expected places"),
        ({"over": "sizes"}, "claim one: expected places and an axis .* over sizes;"),
        ({"test": "correlation"}, "claim one: expected over beside test: correlation"),
        (
            {"test": "spread", "over": "algorithm", "minus": "base"},
            "claim one: expected minus beside test: spread",
        ),
        ({"test": "order"}, "claim one: expected an axis reward beside test: order of group other"),
        (
            {"test": "efficiency", "over": "algorithm", "minus": {"algorithm": "grpo"}},
            "group other: expected an axis algorithm whose levels are numbers",
        ),
    ],
)
def test_claims_about_what_a_study_does_not_have_are_refused(tmp_path, changes, message):
    study = read_study(study_of(tmp_path))
    check_claims(study, claims_of(tmp_path))
    with pytest.raises(ValueError, match=message):
        check_claims(study, claims_of(tmp_path, **changes))


def test_a_claim_needs_a_suite_of_its_domain(tmp_path):
    study = read_study(study_of(tmp_path))
    claims = claims_of(tmp_path, domain="ood", seeds=2)
    with pytest.raises(ValueError, match=r"claim one: expected a domain of .* run base \(id\)"):
        check_study(study, settings_of(study), claims)


@pytest.mark.parametrize("number", [0, 4, "two"])
def test_a_group_has_as_many_seeds_as_it_says(tmp_path, number):
    groups = {"g": {"title": "g", "axes": {"algorithm": ALGORITHMS}, "num_seeds": number}}
    path = study_of(tmp_path, groups=groups, tables={})
    with pytest.raises(ValueError, match=f"group g: expected num_seeds from 1 to .* got {number}"):
        read_study(path)
    with pytest.raises(ValueError, match="expected num_seeds"):
        read_study(path, quick=True)


def test_a_claim_about_choosing_needs_rewards_that_look_at_the_base(tmp_path):
    axes = {"algorithm": ALGORITHMS, "reward": {"exact": {}, "broad": {}}}
    groups = {"other": {"title": "other", "axes": axes}}
    study = read_study(study_of(tmp_path, groups=groups, tables={}, judge="exact"))
    claims = claims_of(tmp_path, test="order")
    settings = settings_of(study)
    with pytest.raises(ValueError, match=r"each reward among .* got \['broad'\] beside them"):
        check_study(study, settings, claims)
    watching = [*CALLBACKS, {"init_args": {"watched": {"broad": "b.yaml"}}}]
    settings["base"]["trainer"]["callbacks"] = watching
    check_study(study, settings, claims)


def test_a_choice_is_by_a_suite_that_its_runs_score(tmp_path):
    rule = {"groups": ["main"], "suite": "near"}
    study = read_study(study_of(tmp_path, choose=rule))
    check_study(study, settings_of(study), [])
    study = read_study(study_of(tmp_path, choose=rule | {"suite": "nera"}))
    with pytest.raises(ValueError, match=r"choose: expected a suite of run main/grpo-4, out of"):
        check_study(study, settings_of(study), [])


def test_runs_that_cannot_go_on_are_refused(tmp_path):
    study = read_study(study_of(tmp_path))
    settings = settings_of(study)
    settings["main/grpo-4"]["trainer"]["callbacks"] = CALLBACKS[1:]
    with pytest.raises(ValueError, match="run main/grpo-4: expected a ModelCheckpoint"):
        check_study(study, settings, [])


@pytest.mark.parametrize("name", ["shapes", "janus_pro"])
def test_shipped_claims_fit_the_shipped_studies(name, repository):
    study = read_study(repository / f"configs/studies/{name}.yaml")
    claims = read_claims(str(repository / "configs/studies/claims.yaml"))
    assert len(study.runs) >= 50
    assert len(claims) >= 30
    check_claims(study, claims)
    for claim in claims:
        assert "{" not in claim.says + claim.domain
