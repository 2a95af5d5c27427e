"""A study of two runs on the Shapes world from one command."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cotgen_pl.study.definition import read_study
from cotgen_pl.study.progress import read_records, run_state
from cotgen_pl.study.tables import MEASURED
from tools.study import run_study

PROMPTS = "cotgen_pl/shapes/assets/prompts"
SETTINGS = "configs/studies/settings"
CHECKPOINT = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 1, "save_top_k": 0, "save_last": True},
}


@pytest.fixture
def workplace(repository, monkeypatch):
    monkeypatch.chdir(repository)


def evaluation_of(folder: Path) -> dict:
    suites = []
    for name, domain, source in (("near", "id", "id_development"), ("far", "ood", "ood_geneval")):
        path = folder / f"{name}.jsonl"
        lines = Path(f"{PROMPTS}/{source}.jsonl").read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:3]))
        oracle: dict = {"class_path": "cotgen_pl.rewards.shapes_oracle.ShapesOracle"}
        oracle["init_args"] = {"rules": "geneval" if domain == "ood" else "compbench"}
        files = [{"path": str(path), "format": "jsonl"}]
        suites.append({"name": name, "domain": domain, "files": files, "reward": oracle})
    settings = {"suites": suites, "every_n_updates": 2, "final_images_per_prompt": 2}
    settings |= {"scores_start": False, "pictures_per_category": 1}
    return {"class_path": "cotgen_pl.callbacks.evaluation.SuiteEvaluation", "init_args": settings}


def write_study(folder: Path, **overrides) -> Path:
    """GRPO and DPO with four updates each, and the base; one seed."""
    evaluation = evaluation_of(folder)
    rounds = {
        "class_path": "cotgen_pl.callbacks.rounds.IterativeRounds",
        "init_args": {"files": [{"path": f"{PROMPTS}/train.jsonl", "format": "jsonl"}]},
    }
    grpo = {"model.init_args.images_per_update": 16, "trainer.callbacks": [evaluation, CHECKPOINT]}
    dpo = {
        "data.init_args.pairs_per_update": 2,
        "trainer.callbacks": [evaluation, CHECKPOINT, rounds],
    }
    content = {
        "name": "tiny",
        "title": "Tiny",
        "folder": str(folder / "study"),
        "seeds": [0],
        "base": {
            "config": f"{SETTINGS}/base.yaml",
            "overrides": {"trainer.callbacks": [evaluation]},
        },
        "groups": {
            "main": {
                "title": "Two runs",
                "comparison": "controlled",
                "priority": "main",
                "overrides": {"model.init_args.images_budget": 64} | overrides,
                "axes": {
                    "algorithm": {
                        "grpo": {"config": f"{SETTINGS}/grpo.yaml", "overrides": grpo},
                        "dpo": {"config": f"{SETTINGS}/dpo.yaml", "overrides": dpo},
                    }
                },
            }
        },
    }
    content["tables"] = {
        "results": {"group": "main", "kind": "suites", "deviation": False},
        "costs": {"group": "main", "kind": "costs", "deviation": False},
    }
    content["figures"] = {
        "curves": {"group": "main", "kind": "curves"},
        "pictures": {"group": "main", "kind": "pictures"},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def but_seconds(folder: Path) -> list[str]:
    """The rows of a run's metrics that two equal runs share."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    clock = ("_s,", "images_per_s", "peak_memory_gb", "images_redrawn")
    return [line for line in lines if not any(name in line for name in clock)]


def numbers_of(report: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each of a report's tables but for columns that the machine decides."""
    return {
        path.name: [row for row in csv.DictReader(file) if not is_measured(row)]
        for path in sorted((report / "tables").glob("*.csv"))
        for file in [path.read_text().splitlines()]
    }


def is_measured(row: dict[str, str]) -> bool:
    return row.get("column", "").startswith(MEASURED)


def verdicts_of(folder: Path) -> dict[str, list]:
    paths = sorted((folder / "evaluation").glob("*.json"))
    return {path.name: json.loads(path.read_text())["verdicts"] for path in paths}


def test_an_override_that_the_config_does_not_have_is_named(workplace, tmp_path):
    path = write_study(tmp_path, **{"model.init_args.group_sise": 4})
    with pytest.raises(ValueError, match=r"run main/grpo: expected overrides .*group_sise"):
        run_study([str(path)])
    assert not (tmp_path / "study").exists()


def test_a_missing_config_is_named(workplace, tmp_path):
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("settings/dpo.yaml", "settings/nothing.yaml"))
    with pytest.raises(ValueError, match=r"run main/dpo: expected a config at .*nothing\.yaml"):
        run_study([str(path)])


def test_a_misspelt_group_of_a_claim_is_named_whatever_is_to_run(workplace, tmp_path):
    claim = {"says": "s", "test": "difference", "group": "mian", "domain": "id"}
    claim |= {"of": {"algorithm": "dpo"}, "minus": {"algorithm": "grpo"}}
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": {"one": claim}}))
    path = write_study(tmp_path)
    path.write_text(f"{path.read_text()}\nclaims: {tmp_path / 'claims.yaml'}\n")
    for flags in (["--plan"], ["--report"], ["--only", "main"]):
        with pytest.raises(ValueError, match="claim one: expected a group among main, got 'mian'"):
            run_study([str(path), *flags])
    assert not (tmp_path / "study").exists()


def test_a_chart_of_a_group_that_waits_is_checked_too(workplace, tmp_path):
    content = yaml.safe_load(write_study(tmp_path).read_text())
    content["groups"]["later"] = content["groups"]["main"] | {"priority": "extra"}
    content["figures"] = {"wrong": {"group": "later", "kind": "levels", "axis": "algorithms"}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match="wrong: expected axes and levels of group later"):
        run_study([str(path), "--quick"])
    assert not (tmp_path / "study").exists()


def check_report(path: Path) -> None:
    """What the study wrote has both runs, and what it writes without one of them has the other."""
    report = path.parent / "study/report/report.md"
    assert "3 of 3 runs are finished" in report.read_text()
    rows = [line for line in report.read_text().splitlines() if line.startswith("| grpo | 1 | 0.")]
    assert len(rows) == 2  # of two suites
    assert report.read_text().count("<img ") == 3 * 2  # of base and runs, one of each suite
    shutil.rmtree(path.parent / "study/main/grpo")
    assert run_study([str(path), "--report"]) == 0
    text = report.read_text()
    assert "2 of 3 runs are finished" in text and "| main/grpo |" in text
    assert "| grpo | 1 |" not in text and "| dpo | 1 |" in text


@pytest.mark.slow
def test_a_study_runs_is_skipped_when_finished_and_refuses_other_settings(
    workplace, tmp_path, capsys
):
    path = write_study(tmp_path)
    assert run_study([str(path), "--jobs", "2"]) == 0
    records = read_records(read_study(path))
    assert not records.missing
    for name in ("main/grpo", "main/dpo"):
        record = records.records[name, 0]
        assert record.costs.images == 64
        assert record.costs.optimizer_steps > 0 < record.costs.seconds
        assert record.pictures["near"]
    assert records.records["main/grpo", 0].costs.sequences == 64
    capsys.readouterr()
    assert run_study([str(path)]) == 0
    assert "3 of 3 runs are finished" in capsys.readouterr().out
    check_report(path)
    with pytest.raises(ValueError, match=r"config\.yaml: expected the run that the study names"):
        run_study([str(write_study(tmp_path, **{"model.init_args.guidance": 1.5}))])


@pytest.mark.slow
def test_two_studies_of_the_same_seeds_have_the_same_tables(workplace, tmp_path):
    """All numbers but seconds, memory and gain per minute, which are in both."""
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert run_study([str(write_study(tmp_path / name))]) == 0
        report = tmp_path / name / "study/report"
        measured = csv.DictReader((report / "tables/costs.csv").read_text().splitlines())
        assert {row["column"] for row in measured if is_measured(row)} >= {"seconds"}
        found.append(numbers_of(report))
    assert found[0].keys() >= {"results-near.csv", "results-far.csv", "costs.csv", "runs.csv"}
    assert any(row["column"] == "optimizer steps" for row in found[0]["costs.csv"])
    assert found[0] == found[1]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_killed_study_ends_as_an_undisturbed_one(workplace, tmp_path):
    """Killed while its first run trains, which ends with it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert run_study([str(write_study(whole))]) == 0
    path = write_study(killed)
    command = [sys.executable, "tools/study.py", str(path)]
    run = killed / "study/main/grpo/seed_0"
    study = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (run / "checkpoints/last.ckpt").is_file():
        assert study.poll() is None
        time.sleep(0.05)
    study.send_signal(signal.SIGTERM)
    assert study.wait() == 143
    assert run_state(run, "fit") == "unfinished"
    assert run_study([str(path)]) == 0
    for name in ("main/grpo", "main/dpo"):
        one, other = (folder / f"study/{name}/seed_0" for folder in (whole, killed))
        assert but_seconds(one) == but_seconds(other)
        assert verdicts_of(one) == verdicts_of(other)
