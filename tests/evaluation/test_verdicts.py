"""Thorough evaluations that are killed and go on: same table, same files, nothing drawn twice."""

import csv
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from cotgen_pl.callbacks.evaluation import Suite, SuiteEvaluation
from cotgen_pl.checkpoints import hash_weights
from cotgen_pl.data.prompts import PromptFile
from cotgen_pl.evaluation.verdicts import (
    JudgedBatch,
    VerdictStore,
    as_plain,
    describe_judge,
    digest,
)
from cotgen_pl.interfaces import Reward, Scores
from cotgen_pl.rewards.ensemble import Ensemble
from tests.toys import Brightness, make_grpo, make_trainer

NEAR = (("a red circle", "color"), ("two cats", "count"), ("cats", "count"), ("blue", "color"))
FAR = (("square", "any"), ("a blue circle", "any"), ("circle", "any"))
FAIL_AT = "TEST_FAILS_AT_BATCH"


class Fallible(Reward):
    """Brightness and noise, with details; fails at a batch that the environment names."""

    def __init__(self) -> None:
        super().__init__()
        self.judged: list[str] = []
        self.batches = 0

    def score(self, images, prompts):
        self.batches += 1
        if os.environ.get(FAIL_AT) == str(self.batches):
            raise RuntimeError("the machine went down")
        self.judged += [prompt.text for prompt in prompts]
        values = images.mean((1, 2, 3)).float()
        values = values.masked_fill(torch.tensor([p.text == "cats" for p in prompts]), math.nan)
        details = [{"level": value, "box": (1, 2)} for value in values.tolist()]
        strict = (values > 0.5).float().masked_fill(values.isnan(), math.nan)
        return Scores(values, {"level": values, "strict": strict}, {"level": 1.0}, details)


class Drawn(Reward):
    """From torch's own random state."""

    def score(self, images, prompts):
        return Scores.single("drawn", torch.rand(len(images)))


def write_rows(folder: Path, name: str, rows) -> PromptFile:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "category": c}) for text, c in rows))
    return PromptFile(str(path), "jsonl")


def evaluation_of(folder: Path, reward: Reward, **arguments) -> SuiteEvaluation:
    """Four batches of three images of the first suite; four and two images of the second one."""
    suites = [
        Suite("near", "id", [write_rows(folder, "near", NEAR)], reward),
        Suite("far", "ood", [write_rows(folder, "far", FAR)], reward, final_images_per_prompt=2),
    ]
    settings = {"images_per_prompt": 1, "final_images_per_prompt": 3, "batch_size": 4}
    return SuiteEvaluation(suites, **(settings | {"kl_images": 0, "leaks": "warn"} | arguments))


@pytest.fixture
def module(tiny_janus):
    """A module that is loaded and has learnt, as far as an evaluation can tell."""
    module = make_grpo(tiny_janus)
    module.configure_model()
    module.rollouts = 1
    return module


def run(module, folder: Path, prompts: Path, reward: Reward | None = None, **arguments):
    """Evaluate in a run folder; gives the evaluation and its metrics."""
    module.trainer = make_trainer(folder)
    evaluation = evaluation_of(prompts, reward or Fallible(), **arguments)
    return evaluation, evaluation.evaluate(module, thoroughly=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def unfinished(folder: Path) -> list[Path]:
    return sorted((folder / "evaluation/unfinished").glob("*.jsonl"))


@pytest.fixture
def whole(module, tmp_path):
    """An evaluation that nothing interrupts: metrics, tables and files."""
    evaluation, metrics = run(module, tmp_path / "whole", tmp_path, watched={"drawn": Drawn()})
    return metrics, evaluation.tables, files_of(tmp_path / "whole")


# Killed and resumed -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, 7))
def test_an_evaluation_killed_at_any_batch_goes_on(module, whole, tmp_path, monkeypatch, at):
    folder, first, second = tmp_path / "cut", Fallible(), Fallible()
    monkeypatch.setenv(FAIL_AT, str(at))
    with pytest.raises(RuntimeError, match="the machine went down"):
        run(module, folder, tmp_path, first, watched={"drawn": Drawn()})
    monkeypatch.delenv(FAIL_AT)
    evaluation, metrics = run(module, folder, tmp_path, second, watched={"drawn": Drawn()})
    assert {n: repr(v) for n, v in metrics.items()} == {n: repr(v) for n, v in whole[0].items()}
    assert evaluation.tables == whole[1]
    assert files_of(folder) == whole[2]
    expected = [text for text, _ in NEAR for _ in range(3)] + [t for t, _ in FAR for _ in range(2)]
    assert first.judged + second.judged == expected
    assert len(first.judged) == [0, 3, 6, 9, 12, 16][at - 1]


def test_an_evaluation_killed_behind_its_last_batch_draws_nothing_again(
    module, whole, tmp_path, monkeypatch
):
    folder, again = tmp_path / "cut", Fallible()
    with monkeypatch.context() as patch:
        patch.setattr(SuiteEvaluation, "_watched_means", None)
        with pytest.raises(TypeError):
            run(module, folder, tmp_path, watched={"drawn": Drawn()})
    run(module, folder, tmp_path, again, watched={"drawn": Drawn()})
    assert again.judged == []
    assert files_of(folder) == whole[2]


@pytest.mark.parametrize("lost", [1, 40])
def test_a_line_that_is_half_written_is_dropped_and_its_batch_drawn_again(
    module, whole, tmp_path, monkeypatch, lost
):
    folder, again = tmp_path / "cut", Fallible()
    monkeypatch.setenv(FAIL_AT, "3")
    with pytest.raises(RuntimeError):
        run(module, folder, tmp_path, watched={"drawn": Drawn()})
    monkeypatch.delenv(FAIL_AT)
    [path] = unfinished(folder)
    os.truncate(path, path.stat().st_size - lost)
    run(module, folder, tmp_path, again, watched={"drawn": Drawn()})
    assert files_of(folder) == whole[2]
    # Where the line's end alone is missing, nothing is.
    assert len(again.judged) == {1: 12, 40: 15}[lost]


def test_a_first_line_that_is_half_written_is_begun_again(module, whole, tmp_path, monkeypatch):
    folder = tmp_path / "cut"
    monkeypatch.setenv(FAIL_AT, "2")
    with pytest.raises(RuntimeError):
        run(module, folder, tmp_path, watched={"drawn": Drawn()})
    monkeypatch.delenv(FAIL_AT)
    os.truncate(unfinished(folder)[0], 30)
    run(module, folder, tmp_path, watched={"drawn": Drawn()})
    assert files_of(folder) == whole[2]


def change_weights(module) -> None:
    with torch.no_grad():
        next(iter(module._trained().values())).add_(0.1)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (change_weights, "policy"),
        (lambda module: setattr(module, "seed", 5), "sampling"),
        (lambda module: setattr(module, "guidance", 2.0), "sampling"),
    ],
)
def test_verdicts_of_another_evaluation_do_not_count(
    module, tmp_path, monkeypatch, caplog, change, differs
):
    folder, again = tmp_path / "run", Fallible()
    monkeypatch.setenv(FAIL_AT, "3")
    with pytest.raises(RuntimeError):
        run(module, folder, tmp_path)
    monkeypatch.delenv(FAIL_AT)
    [left] = unfinished(folder)
    change(module)
    with caplog.at_level(logging.INFO):
        run(module, folder, tmp_path, again)
    assert len(again.judged) == 18  # all of it
    note = (
        f"suite near: {left} is of an unfinished evaluation with other {differs}; this one begins"
    )
    assert note in caplog.text
    assert unfinished(folder) == [left]  # someone may still go on with it


def test_other_prompts_and_rewards_do_not_count_either(tmp_path):
    variants = [
        {"suite": "near", "prompts": prompts, "rewards": {"own": rewards}}
        for prompts in (1, 2)
        for rewards in ({"class_path": "A"}, {"class_path": "B"})
    ]
    assert len({digest(variant) for variant in variants}) == 4
    batch = JudgedBatch([0], {"own": {"total": torch.ones(1, 1)}}, torch.ones(1), None)
    VerdictStore(tmp_path, variants[0], 0).append(batch)
    stores = [VerdictStore(tmp_path, variant, 0) for variant in variants]
    assert [len(store.read()) for store in stores] == [1, 0, 0, 0]
    named = [list(store.others().values()) for store in stores]
    assert named == [[], [["rewards"]], [["prompts"]], [["prompts", "rewards"]]]


def test_a_damaged_file_is_named(module, tmp_path, monkeypatch):
    monkeypatch.setenv(FAIL_AT, "3")
    with pytest.raises(RuntimeError):
        run(module, tmp_path, tmp_path)
    [path] = unfinished(tmp_path)
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, second[:-9], *rest]) + "\n")
    with pytest.raises(ValueError, match=rf"{path}:2: expected a JSON object"):
        run(module, tmp_path, tmp_path)


def test_evaluations_in_the_middle_of_a_run_write_nothing(module, tmp_path):
    module.trainer = make_trainer(tmp_path / "run")
    evaluation_of(tmp_path, Fallible()).evaluate(module, thoroughly=False)
    assert files_of(tmp_path / "run") == {}


def test_the_start_of_a_run_leaves_no_files(module, tmp_path):
    module.rollouts = 0
    run(module, tmp_path / "run", tmp_path)
    assert files_of(tmp_path / "run") == {}


def test_the_bar_is_shown_where_the_trainer_has_one(module, tmp_path, capsys):
    run(module, tmp_path / "quiet", tmp_path)
    assert "suite near" not in capsys.readouterr().err
    module.trainer = make_trainer(tmp_path / "shown", enable_progress_bar=True)
    evaluation_of(tmp_path, Fallible()).evaluate(module, thoroughly=True)
    shown = capsys.readouterr().err
    assert "suite near" in shown and "0/12" in shown and "suite far" in shown


# What is written --------------------------------------------------------------------------------


def test_files_have_every_picture_s_verdict_and_the_exact_variant(module, whole, tmp_path):
    metrics, _, files = whole
    found = json.loads(files["evaluation/near.json"])
    assert sorted(files) == [
        f"evaluation/{n}.{kind}" for n in ("far", "near") for kind in ("csv", "json")
    ]
    assert (
        len(found["verdicts"]) == 12
        and len(json.loads(files["evaluation/far.json"])["verdicts"]) == 6
    )
    seeds = module.noise_seeds(evaluation_of(tmp_path, Fallible()).prompts["near"], 3, "evaluation")
    assert [record["seed"] for record in found["verdicts"]] == seeds
    named = [(record["prompt"], record["category"]) for record in found["verdicts"]]
    assert named == [row for row in NEAR for _ in range(3)]
    assert [record["copy"] for record in found["verdicts"]] == [0, 1, 2] * 4
    color = [r["total"] for r in found["verdicts"] if r["category"] == "color"]
    assert sum(color) / 6 == pytest.approx(metrics["val/id/near/color"], abs=1e-12)
    assert found["diversity"] == metrics["val/id/near/diversity"] > 0
    first, cats = found["verdicts"][0], found["verdicts"][6]
    assert first["details"] == {"level": first["total"], "box": [1, 2]}
    assert first["parts"] == {"level": first["total"], "strict": float(first["total"] > 0.5)}
    assert 0 <= first["others"]["watched/drawn"] < 1
    assert cats["total"] is None and cats["details"] == {"level": None, "box": [1, 2]}
    variant = found["variant"]
    assert variant["policy"]["weights"] == hash_weights(module.policy)
    assert variant["rewards"]["own"]["class_path"].endswith("test_verdicts.Fallible")
    assert variant["sampling"]["images_per_prompt"] == 3
    installed = torch.__version__.partition("+")[0]
    assert variant["versions"]["torch"].partition("+")[0] == installed


def test_the_csv_has_the_same_numbers(whole):
    rows = list(csv.DictReader(whole[2]["evaluation/near.csv"].decode().splitlines()))
    records = json.loads(whole[2]["evaluation/near.json"])["verdicts"]
    assert len(rows) == 12
    for row, record in zip(rows, records, strict=True):
        total = None if row["total"] == "" else float(row["total"])
        assert (row["prompt"], int(row["seed"]), total) == (
            record["prompt"],
            record["seed"],
            record["total"],
        )
        assert json.loads(row["details"]) == record["details"]
        assert float(row["watched/drawn"]) == record["others"]["watched/drawn"]


def test_results_of_other_weights_are_kept_under_their_own_name(module, tmp_path):
    folder = tmp_path / "run"
    run(module, folder, tmp_path)
    before = (folder / "evaluation/near.json").read_bytes()
    name = f"near-{json.loads(before)['digest']}"
    run(module, folder, tmp_path)  # the same takes the same place
    assert len(files_of(folder)) == 4
    change_weights(module)
    run(module, folder, tmp_path)
    assert (folder / f"evaluation/{name}.json").read_bytes() == before
    assert len(files_of(folder)) == 8


class Networked(Reward):
    """A reward that holds a network out of sight, as those that ask one do."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self._held = [nn.Linear(2, 2)]
        nn.init.zeros_(self._held[0].weight)
        nn.init.constant_(self._held[0].bias, bias)

    @property
    def network(self) -> nn.Module:
        return self._held[0]

    def score(self, images, prompts):
        return Scores.single("networked", images.mean((1, 2, 3)))


def test_the_weights_of_judges_are_told_apart_inside_ensembles_too():
    one, other = Networked(0.0), Networked(1.0)
    both = describe_judge(Ensemble({"one": one, "other": other, "plain": Brightness()}))
    hashes = [hash_weights(part.network) for part in (one, other)]
    assert list(both["networks"].values()) == hashes and hashes[0] != hashes[1]
    assert describe_judge(one)["networks"] == {"Networked": hashes[0]}
    assert describe_judge(Brightness())["networks"] == {}


class Chosen(Brightness):
    """Keeps an argument under another name, as GenEval's reward has to."""

    def __init__(self, score: str, batch_size: int = 1) -> None:
        super().__init__()
        self.score_part, self.batch_size = score, batch_size


def test_judges_with_other_settings_are_told_apart_wherever_they_keep_them():
    def told(*arguments) -> str:
        return digest(describe_judge(Ensemble({"one": Chosen(*arguments)})))

    assert told("strict") != told("graded")
    assert told("strict", 1) == told("strict", 2)  # how many at once changes no score


def test_details_of_any_kind_become_json():
    given = {1: (math.nan, math.inf), "tensor": torch.ones(1), "flag": True, "deep": [{"a": None}]}
    plain = as_plain(given)
    assert plain["1"] == [None, "inf"] and plain["flag"] is True and plain["deep"] == [{"a": None}]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


# Several processes ------------------------------------------------------------------------------


def validate(repository: Path, folder: Path, config: Path, processes: int, **environment: str):
    command = [sys.executable, "tools/main.py", "validate", "--config", str(config)]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.devices", str(processes)]
    command += ["--trainer.strategy", "ddp" if processes > 1 else "auto"]
    variables = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        command, cwd=repository, env=variables, capture_output=True, text=True, timeout=240
    )


def read_totals(folder: Path) -> dict[tuple[str, int], float]:
    records = [
        record
        for name in ("near", "far")
        for record in json.loads((folder / f"evaluation/{name}.json").read_text())["verdicts"]
    ]
    return {
        (r["prompt"], r["copy"]): math.nan if r["total"] is None else r["total"] for r in records
    }


@pytest.mark.slow
def test_two_processes_that_are_killed_and_go_on_as_one_or_two_give_what_one_gives(
    repository, tiny_janus, tmp_path
):
    def piece(class_path, **init_args):
        return {"class_path": class_path, "init_args": init_args}

    suites = [
        {"name": name, "domain": domain, "files": [vars(write_rows(tmp_path, name, rows))]}
        | {"reward": piece("tests.evaluation.test_verdicts.Fallible")}
        for name, domain, rows in (("near", "id", NEAR), ("far", "ood", FAR))
    ]
    sizes = {"final_images_per_prompt": 2, "batch_size": 2, "kl_images": 0}
    evaluation = piece("cotgen_pl.callbacks.evaluation.SuiteEvaluation", suites=suites, **sizes)
    policy = piece("cotgen_pl.policies.janus.JanusPolicy", path=str(tiny_janus), dtype="float64")
    model = piece(
        "cotgen_pl.modules.grpo.GRPOModule",
        policy=policy,
        reward=piece("tests.toys.Brightness"),
        images_budget=8,
        images_per_update=8,
        group_size=4,
    )
    trainer = {"accelerator": "cpu", "precision": "64-true", "callbacks": [evaluation]}
    data = piece("cotgen_pl.data.prompts.PromptData", files=suites[0]["files"])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": trainer, "model": model, "data": data}))
    one = validate(repository, tmp_path / "one", config, 1)
    assert one.returncode == 0, one.stderr[-3000:]
    expected = read_totals(tmp_path / "one")
    assert len(expected) == 14
    for processes in (1, 2):
        folder = tmp_path / f"cut{processes}"
        assert validate(repository, folder, config, 2, **{FAIL_AT: "2"}).returncode != 0
        assert unfinished(folder)
        done = validate(repository, folder, config, processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "were judged before an interruption" in done.stderr
        assert read_totals(folder) == pytest.approx(expected, abs=1e-6, nan_ok=True)
        assert not unfinished(folder)
        tables = [run.stdout[run.stdout.index("near, in domain") :] for run in (one, done)]
        assert tables[0] == tables[1]
