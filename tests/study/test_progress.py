"""What is finished, by what run folders hold."""

import json

import pytest
import yaml

from cotgen_pl.study.progress import run_state

SETTINGS = {
    "seed_everything": 0,
    "trainer": {
        "default_root_dir": "a",
        "callbacks": [{"class_path": "e", "init_args": {"suites": [{"name": "near"}]}}],
    },
    "model": {"init_args": {"lr": 0.1}},
}


def leave(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(SETTINGS) if name.endswith(".yaml") else json.dumps({}))


def test_training_is_finished_when_it_has_ended_and_is_scored(tmp_path):
    assert run_state(tmp_path, "fit", SETTINGS) == "absent"
    leave(tmp_path, "checkpoints/last.ckpt")
    assert run_state(tmp_path, "fit", SETTINGS) == "unfinished"
    leave(tmp_path, "config.yaml", "evaluation/near.json")
    assert run_state(tmp_path, "fit", SETTINGS) == "unfinished"
    leave(tmp_path, "ended.json")
    assert run_state(tmp_path, "fit", SETTINGS) == "finished"
    (tmp_path / "evaluation/near.json").unlink()
    assert run_state(tmp_path, "fit", SETTINGS) == "unfinished"


def test_scoring_is_finished_when_all_verdicts_are_there(tmp_path):
    assert run_state(tmp_path, "validate", SETTINGS) == "absent"
    leave(tmp_path, "evaluation/validate.yaml")
    assert run_state(tmp_path, "validate", SETTINGS) == "unfinished"
    leave(tmp_path, "evaluation/near.json")
    assert run_state(tmp_path, "validate", SETTINGS) == "finished"


def test_a_folder_of_other_settings_is_an_error_and_another_place_is_not(tmp_path):
    leave(tmp_path, "config.yaml")
    moved = SETTINGS | {"trainer": SETTINGS["trainer"] | {"default_root_dir": "b"}}
    assert run_state(tmp_path, "fit", moved) == "unfinished"
    with pytest.raises(ValueError, match=r"another model.init_args.lr \(expected 0.2, got 0.1\)"):
        run_state(tmp_path, "fit", SETTINGS | {"model": {"init_args": {"lr": 0.2}}})
