"""Whether a run folder is of the run that a study names, by values that are written out by hand."""

import copy
import json

import pytest
import yaml

from cotgen_pl.study.agreement import find_difference, place_of
from cotgen_pl.study.definition import read_study
from cotgen_pl.study.progress import read_records
from cotgen_pl.study.report import write_report
from tests.study.made_up import write_suite

CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "default_root_dir": "elsewhere",
        "callbacks": ["pieces/scores.yaml", {"class_path": "Saves"}],
    },
    "model": {"init_args": {"policy": "pieces/policy.yaml", "lr": 0.1, "kl_coef": 0.0}},
}
SCORES = {"class_path": "Scores", "init_args": {"suites": [{"name": "near"}]}}
SAVED = {
    "seed_everything": 1,
    "trainer": {
        "default_root_dir": "here",
        "callbacks": [
            {"class_path": "Scores", "init_args": {"suites": [{"name": "near", "copies": 8}]}},
            {"class_path": "Saves", "init_args": {"last": True}},
        ],
    },
    "model": {"init_args": {"policy": {"class_path": "Janus", "init_args": {"path": "a"}}}},
}
SAVED["model"]["init_args"] |= {"lr": 0.1, "kl_coef": 0.02, "reward": None}
OVERRIDES = {"model.init_args.kl_coef": 0.02}


@pytest.fixture
def difference(tmp_path, monkeypatch):
    """What `find_difference` says of overrides and a change to what was saved."""
    monkeypatch.chdir(tmp_path)
    pieces = tmp_path / "configs/pieces"
    pieces.mkdir(parents=True)
    (tmp_path / "configs/run.yaml").write_text(yaml.safe_dump(CONFIG))
    (pieces / "scores.yaml").write_text(yaml.safe_dump(SCORES))
    (pieces / "policy.yaml").write_text(yaml.safe_dump({"class_path": "Janus"}))

    def tell(overrides=(), change=lambda saved: None):
        saved = copy.deepcopy(SAVED)
        change(saved)
        study = read_study(write_study(tmp_path, OVERRIDES | dict(overrides)))
        return find_difference(study, study.runs["g/on"], 1, saved)

    return tell


def write_study(folder, overrides):
    level = {"config": "configs/run.yaml", "overrides": overrides}
    content = {"name": "s", "title": "s", "folder": "runs", "seeds": [0, 1]}
    content |= {"base": {"config": "configs/run.yaml"}}
    content |= {"groups": {"g": {"title": "g", "axes": {"kl": {"on": level}}}}}
    content |= {"tables": {"t": {"group": "g", "kind": "domains"}}}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def with_callbacks(*more):
    return lambda saved: saved["trainer"]["callbacks"].extend(more)


def test_what_was_saved_with_all_that_is_said_agrees(difference):
    assert difference() is None


def test_another_value_of_an_override_is_told(difference):
    assert difference({"model.init_args.kl_coef": 0.05}) == (
        "model.init_args.kl_coef is 0.02 there and 0.05 in the study"
    )


def test_another_value_of_the_config_and_of_its_pieces_is_told(difference):
    told = difference(change=lambda saved: saved["model"]["init_args"].update(lr=0.2))
    assert told == "model.init_args.lr is 0.2 there and 0.1 in the study"
    policy = "model.init_args.policy.class_path is 'Emu' there and 'Janus' in the study"
    changed = {"policy": {"class_path": "Emu"}}
    assert difference(change=lambda saved: saved["model"]["init_args"].update(changed)) == policy


def test_what_an_override_sets_is_not_asked_of_the_config(difference):
    assert difference({"model.init_args.lr": "1e-1"}) is None  # text in YAML, a number when read
    assert difference({"model.init_args.lr": "2e-1"}) is not None
    assert difference({"model.init_args.policy": {"init_args": {"path": "a"}}}) is None


def test_pieces_of_an_override_are_read(difference, tmp_path):
    piece = tmp_path / "configs/reward.yaml"
    piece.write_text(yaml.safe_dump({"class_path": "HPS", "init_args": {"size": 2}}))
    said = {"model.init_args.reward": "configs/reward.yaml"}

    def with_size(size):
        reward = {"class_path": "HPS", "init_args": {"size": size, "device": None}}
        return lambda saved: saved["model"]["init_args"].update(reward=reward)

    assert difference(said, with_size(2)) is None
    assert "reward.init_args.size is 3 there and 2 in the study" in difference(said, with_size(3))
    assert "reward is None there and 'configs/reward.yaml'" in difference(said)


def test_a_setting_of_the_last_callback_is_found_there(difference):
    said = {"trainer.callbacks.init_args.last": True}
    assert difference(said) is None
    assert "callbacks.1.init_args.last is True there" in difference(
        {"trainer.callbacks.init_args.last": False}
    )


def test_a_callback_that_is_appended_is_one_more(difference):
    added = {"class_path": "Rounds", "init_args": {"rounds": 2}}
    assert difference({"trainer.callbacks+": added}, with_callbacks(added)) is None
    assert "trainer.callbacks is [" in difference(change=with_callbacks(added))
    other = {"class_path": "Rounds", "init_args": {"rounds": 3}}
    assert "callbacks.2.init_args.rounds is 3 there and 2" in difference(
        {"trainer.callbacks+": added}, with_callbacks(other)
    )
    before = {"trainer.callbacks.init_args.last": False, "trainer.callbacks+": added}
    assert "callbacks.1.init_args.last is True" in difference(before, with_callbacks(added))


def test_another_seed_and_a_config_that_is_gone_are_told(difference, tmp_path):
    assert "seed_everything is 0 there and 1" in difference(
        change=lambda saved: saved.update(seed_everything=0)
    )
    (tmp_path / "configs/run.yaml").unlink()
    assert difference() == "configs/run.yaml is not there"


def test_places_that_are_not_there_are_no_error():
    assert place_of("a.b.c", {"a": {"b": []}}) == ("a", "b", -1, "c")
    assert place_of("x.y+", {}) == ("x", "y")


def test_a_run_of_other_settings_is_in_no_number_and_is_named(difference, tmp_path):
    difference()  # the configs are there
    study = read_study(write_study(tmp_path, OVERRIDES))
    for seed, kl_coef in ((0, 0.05), (1, 0.02)):
        folder = study.run_folder("g/on", seed)
        write_suite(folder, "near", 0.75)
        saved = copy.deepcopy(SAVED) | {"seed_everything": seed}
        saved["model"]["init_args"]["kl_coef"] = kl_coef
        (folder / "config.yaml").write_text(yaml.safe_dump(saved))
        (folder / "ended.json").write_text(json.dumps({}))
    records = read_records(study)
    assert list(records.records) == [("g/on", 1)]
    assert records.refused.keys() == {("g/on", 0)} and ("g/on", 0) in records.missing
    write_report(records, [], tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert (
        "| g/on | 0 | made with other settings: model.init\\_args.kl\\_coef is 0.05 there and 0.02"
    ) in text
    assert "| on | 1 | 0.750 ± ? |" in text
    missing = text.split("Runs that are not here")[-1].split("Runs that were made with other")[0]
    assert "base" in missing and "g/on" not in missing
