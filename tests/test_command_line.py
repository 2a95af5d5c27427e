"""The command line: runs, resumed runs, validation, and what it says to mistakes."""

import copy
import csv
import json
import re
import resource
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cotgen_pl.origin import find_commit
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.sharded_checkpoints import load_parts
from tests.toys import write_prompts
from tools import build_shapes
from tools.main import CommandLine, SaveRunConfig, main

BUDGET, PER_UPDATE = 48, 8  # six rollouts
CLOCK = {"perf/images_per_s", "perf/peak_memory_gb"}  # with perf/*_s, what two equal runs differ in
INTERRUPTIONS = {"perf/images_redrawn"}  # what a run that was interrupted differs in
CALLBACKS = "lightning.pytorch.callbacks"


def piece(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def settings_of(tiny_janus: Path, folder: Path) -> dict[str, Any]:
    """Six rollouts of two updates, evaluated at every second one, checkpoint at 2, 4 and 6."""
    files = [vars(write_prompts(folder)) | {"category": "all"}]
    suite = {"files": files, "reward": piece("tests.toys.Brightness")}
    evaluation = piece(
        "cotgen_pl.callbacks.evaluation.SuiteEvaluation",
        suites=[suite | {"name": "a", "domain": "id"}, suite | {"name": "b", "domain": "ood"}],
        every_n_updates=2,
        leaks="warn",  # files of a run hold what it trains on
    )
    checkpoint = {"every_n_train_steps": 4}  # optimizer steps: two rollouts
    return {
        "seed_everything": 3,
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [
                evaluation,
                piece("cotgen_pl.callbacks.samples.SampleGrid", files=files, every_n_updates=2),
                piece("cotgen_pl.callbacks.export.HuggingFaceExport"),
                piece(f"{CALLBACKS}.ModelCheckpoint", save_last=True, save_top_k=-1, **checkpoint),
                piece(
                    f"{CALLBACKS}.ModelCheckpoint",
                    filename="best",
                    monitor="val/ood/mean",
                    mode="max",
                    **checkpoint,
                ),
            ],
        },
        "model": piece(
            "cotgen_pl.modules.grpo.GRPOModule",
            policy=piece("cotgen_pl.policies.janus.JanusPolicy", path=str(tiny_janus)),
            reward=piece("tests.toys.NoisyBrightness"),
            optimizer=piece("torch.optim.SGD", lr=0.5, momentum=0.9, weight_decay=0.0),
            lr_scheduler=piece("torch.optim.lr_scheduler.StepLR", step_size=3, gamma=0.5),
            guidance=2.0,
            images_budget=BUDGET,
            images_per_update=PER_UPDATE,
            updates_per_rollout=2,
            kl_coef=0.1,
        ),
        "data": piece("cotgen_pl.data.prompts.PromptData", files=files),
    }


def fit(settings: dict[str, Any], folder: Path, *arguments: str) -> Path:
    """Run `fit` into a folder and give it back."""
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(config), "--trainer.default_root_dir", str(folder), *arguments])
    return folder


def read_metrics(folder: Path) -> list[tuple[str, ...]]:
    """Step, metric and value of all rows that equal runs share, in the file's order."""
    with (folder / "metrics.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["run", "step", "metric", "value"]
    assert {run for run, *_ in rows} == {folder.name}
    kept = [rest for _, *rest in rows if rest[1] not in INTERRUPTIONS]
    return [tuple(rest) for rest in kept if not depends_on_the_clock(rest[1])]


def depends_on_the_clock(metric: str) -> bool:
    return metric in CLOCK or (metric.startswith("perf/") and metric.endswith("_s"))


def read_checkpoint(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    path = folder / "checkpoints" / name
    content = load_parts(path, None) if path.is_dir() else torch.load(path, weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "progress", "random_state")
    return {key: content[key] for key in kept} | {"global_step": content["global_step"]}


def assert_same(one: Any, two: Any, place: str = "") -> None:
    """Bit for bit, through nested dicts and lists."""
    assert type(one) is type(two), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), place
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), place
        for key in one:
            assert_same(one[key], two[key], f"{place}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), place
        for number, (left, right) in enumerate(zip(one, two, strict=True)):
            assert_same(left, right, f"{place}/{number}")
    else:
        assert one == two, place


@pytest.fixture(scope="module")
def run(tiny_janus, tmp_path_factory):
    """The settings, and the folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("command_line")
    settings = settings_of(tiny_janus, folder)
    return settings, fit(settings, folder / "run")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file gets more bytes than this while the context lasts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("plugin", [None, "AsyncCheckpointIO"])
def test_checkpoints_are_written_whole_unless_a_run_names_a_way_of_its_own(
    tiny_janus, tmp_path, plugin
):
    settings = settings_of(tiny_janus, tmp_path)
    if plugin:
        settings["trainer"]["plugins"] = piece(f"lightning.pytorch.plugins.io.{plugin}")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    arguments = ["fit", "--config", str(config)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CommandLine, "_run_subcommand", lambda self, subcommand: None)
        trainer = main(arguments).trainer
    assert type(trainer.strategy.checkpoint_io).__name__ == (plugin or "WholeCheckpoints")


@pytest.mark.parametrize("logger", [True, False])
def test_a_disk_that_fills_up_in_training_costs_nothing_but_time(
    run, repository, tmp_path, monkeypatch, logger
):
    """TensorBoard's file is the first that has no room; without it, metrics.csv."""
    settings, whole = run
    folder, config, limits = tmp_path / "run", tmp_path / "run.yaml", []

    def fill_disk(self, trainer, pl_module, batch, batch_idx):
        if pl_module.rollouts == 3:
            limits.append(resource.getrlimit(resource.RLIMIT_FSIZE))
            size = (folder / "metrics.csv").stat().st_size + 50
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[0][1]))

    trainer = settings["trainer"] | {"logger": logger}
    trainer["callbacks"] = [*trainer["callbacks"], piece("tests.toys.StopAt", rollout=0)]
    config.write_text(yaml.safe_dump(settings | {"trainer": trainer}))
    monkeypatch.setattr("tests.toys.StopAt.on_train_batch_start", fill_disk)
    where = ["--trainer.default_root_dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["main.py", "fit", "--config", str(config), *where])
    try:
        with pytest.raises(SystemExit) as refusal:
            runpy.run_path(str(repository / "tools/main.py"), run_name="__main__")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits[0])
    what = "the files of a run" if logger else f"{folder / 'metrics.csv'}"
    assert str(refusal.value.code).startswith(f"error: expected room for {what}, got: ")
    assert str(refusal.value.code).endswith("free some room, and go on with --ckpt_path last")
    fit(settings, folder, "--ckpt_path", "last")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)


def test_a_full_disk_keeps_what_a_run_says_of_itself(run, tmp_path, monkeypatch):
    settings, whole = run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    names = ("config.yaml", "run.json", "metrics.csv", "checkpoints/last.ckpt")
    before = {name: (folder / name).read_bytes() for name in names}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    resume = ["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.logger", "false"]
    resume += ["--trainer.default_root_dir", str(folder)]
    write = SaveRunConfig.on_train_start
    for size, name in ((100, "run.json"), (1500, "config.yaml")):

        def write_on_a_full_disk(*arguments: Any, size: int = size) -> None:
            with little_room(size):
                write(*arguments)

        monkeypatch.setattr(SaveRunConfig, "on_train_start", write_on_a_full_disk)
        with pytest.raises(ValueError, match=f"room for .*{name}, got: "):
            main(resume)
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert not list(folder.glob(".*"))


# A run ------------------------------------------------------------------------------------------


EXPECTED_METRICS = {
    "train/reward",
    "train/reward_std",
    "train/rewards/noisy/mean",
    "train/rewards/noisy/std",
    "train/frac_reward_zero_std",
    "train/frac_no_verdict",
    "train/kl",
    "train/entropy",
    "train/clip_ratio/low_mean",
    "train/clip_ratio/low_min",
    "train/clip_ratio/high_mean",
    "train/clip_ratio/high_max",
    "train/clip_ratio/region_mean",
    "train/sampling/sampling_logp_difference/mean",
    "train/sampling/sampling_logp_difference/max",
    "train/sampling/importance_sampling_ratio/min",
    "train/sampling/importance_sampling_ratio/mean",
    "train/sampling/importance_sampling_ratio/max",
    "train/grad_norm",
    "train/learning_rate",
    "train/policy_loss",
    "train/loss",
    "perf/rollout_s",
    "perf/reward_s",
    "perf/reference_s",
    "perf/replay_s",
    "perf/update_s",
    "perf/images_per_s",
    "perf/images_sampled",
    "perf/peak_memory_gb",
}
EXPECTED_SCORES = {
    "val/id/a/all",
    "val/id/a/mean",
    "val/id/mean",
    "val/ood/b/all",
    "val/ood/b/mean",
    "val/ood/mean",
    "val/gap",
    "val/kl_to_base",
}


def test_all_metrics_reach_the_file_and_tensorboard(run):
    _, folder = run
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    keys = [(int(step), metric) for _, step, metric, _ in rows]
    assert len(keys) == len(set(keys))
    steps = range(1, BUDGET // PER_UPDATE + 1)
    assert {(step, metric) for step in steps for metric in EXPECTED_METRICS} <= set(keys)
    assert {(step, metric) for step in (0, 2, 4, 6) for metric in EXPECTED_SCORES} <= set(keys)
    values = {(int(step), metric): float(value) for _, step, metric, value in rows}
    assert [values[step, "perf/images_sampled"] for step in steps] == [8, 16, 24, 32, 40, 48]
    assert all(values[step, "perf/peak_memory_gb"] > 0.05 for step in steps)
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) >= EXPECTED_METRICS | EXPECTED_SCORES
    scalars = {event.step: event.value for event in events.Scalars("train/reward")}
    assert scalars == pytest.approx({s: values[s, "train/reward"] for s in steps}, rel=1e-6)
    pictures = events.Images("samples")
    assert [picture.step for picture in pictures] == [0, 2, 4, 6]
    assert pictures[0].width > 4 * 144


def test_the_run_folder_has_all_that_a_run_leaves(run):
    _, folder = run
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {"config.yaml", "run.json", "metrics.csv", "samples/000006.png"}
    expected |= {"exported/model.safetensors"}
    checkpoints = {"last.ckpt", "best.ckpt", *(f"epoch=0-step={n}.ckpt" for n in (2, 4, 6))}
    assert found >= expected | {f"checkpoints/{name}" for name in checkpoints}
    assert any("tfevents" in name for name in found)
    told = json.loads((folder / "run.json").read_text())
    assert told["commit"] == find_commit()
    policy = told["policy"]
    assert policy["template"] == "<|User|>: {prompt}\n\n<|Assistant|>:"


def test_the_manual_names_all_that_lies_in_a_run_folder(run, repository):
    page = (repository / "docs" / "runs.md").read_text()
    section = page[page.index("## What a run leaves") : page.index("## Going on")]
    named = tuple(name.rstrip("/.") for name in re.findall(r"^\| `([^`]+)` \|", section, re.M))
    assert len(named) >= 7
    found = [path.name for path in run[1].iterdir()]
    assert [name for name in found if not name.startswith(named)] == []


def test_the_saved_configuration_runs_again_and_gives_the_same_metrics(run, tmp_path, capsys):
    """Same run twice, and from the file that has everything inlined."""
    _, folder = run
    again = tmp_path / "run"
    config = ["--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(again)]
    before = snapshot(folder)
    main(["fit", *config])
    assert snapshot(folder) == before
    assert read_metrics(again) == read_metrics(folder)
    assert_same(read_checkpoint(again), read_checkpoint(folder))
    printed = capsys.readouterr().out
    assert f"run folder: {again}" in printed
    assert f"tensorboard --logdir {again}" in printed
    assert f"exported model: {again / 'exported'}" in printed
    assert "kl_to_base" in printed and "start     end   change" in printed


def test_a_folder_that_holds_a_run_is_refused(run, monkeypatch):
    settings, folder = run
    monkeypatch.setattr(JanusPolicy, "load", None)
    before = snapshot(folder)
    with pytest.raises(ValueError, match="holds a run already; go on with it by --ckpt_path last"):
        fit(settings, folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv"])
def test_one_file_of_a_run_is_enough_to_refuse_its_folder(run, tmp_path, monkeypatch, name):
    settings, whole = run
    monkeypatch.setattr(JanusPolicy, "load", None)
    (tmp_path / "run").mkdir()
    shutil.copy(whole / name, tmp_path / "run" / name)
    with pytest.raises(ValueError, match="holds a run already"):
        fit(settings, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_a_logger_of_the_user_stands_beside_the_metrics_file(run, tmp_path, several):
    settings, whole = run
    logger = piece("lightning.pytorch.loggers.CSVLogger", save_dir=str(tmp_path / "other"))
    trainer = settings["trainer"] | {"logger": [logger] if several else logger}
    folder = fit(settings | {"trainer": trainer}, tmp_path / "run")
    assert read_metrics(folder) == read_metrics(whole)
    assert list((tmp_path / "other").rglob("metrics.csv"))
    assert (folder / "checkpoints/last.ckpt").exists()
    assert (folder / "config.yaml").exists()
    assert not list((tmp_path / "other").rglob("*.ckpt"))


# Resumed runs -----------------------------------------------------------------------------------


def test_a_run_that_broke_down_goes_on_bit_for_bit(run, tmp_path, capsys):
    settings, whole = run
    folder = tmp_path / "run"
    stop = piece("tests.toys.StopAt", rollout=4)  # one rollout behind the last checkpoint
    trainer = settings["trainer"]
    broken = {**settings, "trainer": {**trainer, "callbacks": [*trainer["callbacks"], stop]}}
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(broken, folder)
    assert {step for step, *_ in read_metrics(folder)} == {"0", "1", "2", "3"}
    assert read_checkpoint(folder)["progress"]["rollouts"] == 2
    capsys.readouterr()
    fit(settings, folder, "--ckpt_path", "last")
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] is None
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)
    assert (folder / "samples/000006.png").read_bytes() == (
        whole / "samples/000006.png"
    ).read_bytes()
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "id/a/all" in line]
    start = {(step, metric): value for step, metric, value in read_metrics(whole)}
    first, last = (float(start[step, "val/id/a/all"]) for step in ("0", "6"))
    assert table == [["id/a/all", f"{first:.3f}", f"{last:.3f}", f"{last - first:+.3f}"]]


@pytest.mark.parametrize("name", ["epoch=0-step=4.ckpt", "best.ckpt"])
def test_any_checkpoint_of_a_run_goes_on_bit_for_bit(run, tmp_path, name):
    settings, whole = run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    fit(settings, folder, "--ckpt_path", str(folder / "checkpoints" / name))
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)


def with_rising_scores(settings: dict[str, Any]) -> dict[str, Any]:
    """The same, but each evaluation scores higher than the one before."""
    changed = copy.deepcopy(settings)
    for suite in changed["trainer"]["callbacks"][0]["init_args"]["suites"]:
        suite["reward"] = piece("tests.toys.Rising")
    return changed


@pytest.mark.parametrize(
    ("arguments", "timers"),
    [
        (["--trainer.max_steps", "5"], []),  # each rollout has two optimizer steps
        (["--model.init_args.images_budget", "24"], []),
        ([], [piece("tests.toys.OutOfTime", rollouts=3)]),
    ],
)
def test_the_end_is_saved_and_scored_whatever_brings_it(run, tmp_path, arguments, timers):
    """The third rollout ends between two checkpoints and two evaluations."""
    settings = with_rising_scores(run[0])
    settings["trainer"]["callbacks"] += timers
    folder = fit(settings, tmp_path / "run", *arguments)
    for name in ("last.ckpt", "best.ckpt"):
        assert read_checkpoint(folder, name)["progress"]["rollouts"] == 3
    scored = [step for step, metric, _ in read_metrics(folder) if metric == "val/ood/mean"]
    assert scored == ["0", "2", "3"]
    assert (folder / "samples/000003.png").exists()


def test_a_run_that_stopped_between_two_checkpoints_goes_on_bit_for_bit(run, tmp_path):
    settings = copy.deepcopy(run[0])  # without the reward whose noise one more picture grid shifts
    settings["model"]["init_args"]["reward"] = piece("tests.toys.Brightness")
    whole = fit(settings, tmp_path / "whole")
    folder = fit(settings, tmp_path / "run", "--trainer.max_steps", "5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(settings, folder, "--ckpt_path", "last")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    behind = [row for row in read_metrics(folder) if row[0] > "3"]
    assert behind == [row for row in read_metrics(whole) if row[0] > "3"]
    advice = ("workers", "IterableDataset", "resuming", "training_step", "eval mode", "treespec")
    messages = [str(warning.message) for warning in caught]
    assert not [text for text in messages if any(word in text for word in advice)]


def test_going_on_with_a_finished_run_changes_no_number(run, tmp_path):
    settings, whole = run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    fit(settings, folder, "--ckpt_path", "last")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)


@pytest.mark.parametrize("subcommand", ["fit", "validate", "predict"])
@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("last", r"expected last.ckpt in .*run/checkpoints for --ckpt_path last, got none; name"),
        ("FOLDER/step.ckpt", r"expected a checkpoint at .*run/step.ckpt, got none; name a file"),
    ],
)
def test_a_missing_checkpoint_is_refused(
    run, tmp_path, monkeypatch, subcommand, checkpoint, message
):
    settings, whole = run
    monkeypatch.setattr(JanusPolicy, "load", None)
    folder, config = tmp_path / "run", tmp_path / "run.yaml"
    folder.mkdir()
    shutil.copy(whole / "metrics.csv", folder)
    config.write_text(yaml.safe_dump(settings))
    before = snapshot(folder)
    arguments = ["--config", str(config), "--trainer.default_root_dir", str(folder)]
    with pytest.raises(ValueError, match=message):
        main([subcommand, *arguments, "--ckpt_path", checkpoint.replace("FOLDER", str(folder))])
    assert snapshot(folder) == before


@pytest.mark.parametrize("checkpoint", [None, "last.ckpt"])
def test_a_build_without_a_checkpoint_starts_afresh(tmp_path, monkeypatch, checkpoint):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    folder = tmp_path / "base"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.csv").write_text("run,step,metric,value\n")
    if checkpoint:
        (folder / "checkpoints" / checkpoint).write_text("")
    build_shapes.fine_tune(tmp_path / "vq", folder, 1e-3, 10, 0.0, 0)
    assert folder.exists() == bool(checkpoint)
    assert ("--ckpt_path" in commands[0]) == bool(checkpoint)


def test_a_run_that_broke_down_before_its_first_interval_goes_on_bit_for_bit(run, tmp_path):
    settings, whole = run
    folder = tmp_path / "run"
    stop = piece("tests.toys.StopAt", rollout=2)
    trainer = settings["trainer"]
    broken = {**settings, "trainer": {**trainer, "callbacks": [*trainer["callbacks"], stop]}}
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(broken, folder)
    assert read_checkpoint(folder)["progress"]["rollouts"] == 0
    fit(settings, folder, "--ckpt_path", "last")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)


def test_what_a_run_is_stands_in_its_folder_before_its_start_is_scored(run, tmp_path, monkeypatch):
    def die(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("the machine went down")

    monkeypatch.setattr("cotgen_pl.callbacks.evaluation.SuiteEvaluation.observe", die)
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(run[0], tmp_path / "run")
    found = [p.name for p in (tmp_path / "run").rglob("*") if p.is_file() and "tfev" not in p.name]
    assert sorted(found) == ["config.yaml", "last.ckpt", "run.json"]


def test_what_the_data_refuse_leaves_no_run(run, tmp_path, monkeypatch):
    """Once the weights are there: pictures that do not decode are found out as late."""

    def refuse(self):
        raise ValueError("expected other data")

    with monkeypatch.context() as patch:
        patch.setattr("cotgen_pl.data.prompts.PromptData.train_dataloader", refuse)
        with pytest.raises(ValueError, match="expected other data"):
            fit(run[0], tmp_path / "run")
    names = ("config.yaml", "run.json", "metrics.csv", "checkpoints")
    assert not [name for name in names if (tmp_path / "run" / name).exists()]


def test_setup_checks_come_before_the_run_s_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(JanusPolicy, "load", None)
    with pytest.raises(ValueError, match=r"trainer.max_epochs: expected 1"):
        fit(run[0], tmp_path / "run", "--trainer.max_epochs", "2")
    names = ("config.yaml", "run.json", "metrics.csv")
    assert not [name for name in names if (tmp_path / "run" / name).exists()]


# Validation -------------------------------------------------------------------------------------


def but_results(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if "/evaluation/" not in path}


def test_validate_scores_checkpoints_and_exported_folders(run, tmp_path, capsys):
    settings, folder = run
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    before = snapshot(folder)
    exported = str(folder / "exported")
    ends = {
        "checkpoint": ["--ckpt_path", str(folder / "checkpoints/last.ckpt")],
        "last": ["--ckpt_path", "last"],
        "exported": ["--model.init_args.policy.init_args.path", exported],
        "start": [],
    }
    tables = {}
    for name, arguments in ends.items():
        capsys.readouterr()
        main(["validate", "--config", str(config), *arguments])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        tables[name] = {line[0]: line[1] for line in lines if len(line) == 2}
    after = snapshot(folder)
    assert but_results(after) == but_results(before)
    assert set(before.values()) <= set(after.values())  # earlier results under other names
    values = {(s, m): float(v) for s, m, v in read_metrics(folder)}
    scores = {metric for step, metric in values if step == "6" and metric.startswith("val/")}
    assert scores >= EXPECTED_SCORES
    shown = {m for m in scores if not m.endswith("/parts/all")}  # the mean under another name
    expected = {m.removeprefix("val/"): f"{values['6', m]:.3f}" for m in shown}
    assert tables["checkpoint"] == tables["last"] == expected
    assert tables["exported"] == expected | {"kl_to_base": "0.000"}  # it is its own start
    assert tables["start"]["id/mean"] != expected["id/mean"]


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.class_path", "cotgen_pl.modules.grpo.Nothing"],
            "cotgen_pl.modules.grpo.Nothing",
        ),
        (["--model.init_args.group_sise", "4"], "group_sise"),
        (["--model.init_args.group_size", "3"], "does not split into groups of 3; set group_size"),
        (["--model.init_args.guidance", "0.5"], "expected guidance of 1 (none) or more, got 0.5"),
        (["--model.init_args.dead_groups", "drop"], "dead_groups"),
        (["--trainer.max_stepz", "3"], "max_stepz"),
        (["--model.init_args.policy.init_args.path", "./nowhere"], "nowhere, which does not exist"),
        (["--data.init_args.files", "[{path: EMPTY, format: text}]"], "empty.txt"),
    ],
)
def test_mistakes_are_named_before_weights_load(
    run, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(JanusPolicy, "load", None)
    (tmp_path / "empty.txt").write_text("")
    arguments = [text.replace("EMPTY", str(tmp_path / "empty.txt")) for text in arguments]
    with pytest.raises((SystemExit, ValueError)) as refusal:
        fit(run[0], tmp_path / "run", *arguments)
    assert message in capsys.readouterr().err + str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_facts_that_a_reward_cannot_judge_by_are_named_before_weights_load(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(JanusPolicy, "load", None)
    path = tmp_path / "shapeless.jsonl"
    row = {"prompt": "red", "objects": [{"color": "red"}], "relations": []}
    path.write_text(json.dumps(row))
    settings = copy.deepcopy(run[0])
    settings["data"]["init_args"]["files"] = [{"path": str(path), "format": "jsonl"}]
    settings["model"]["init_args"]["reward"] = piece("cotgen_pl.rewards.shapes_oracle.ShapesOracle")
    with pytest.raises(ValueError, match=f"^{path}:1: expected a list under 'objects', each of"):
        fit(settings, tmp_path / "run")


@pytest.mark.slow
def test_a_mistake_is_one_line_in_a_terminal(run, repository, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run[0]))
    command = [sys.executable, str(repository / "tools/main.py"), "fit", "--config", str(config)]
    done = subprocess.run(
        [*command, "--trainer.precision", "bf16-true", "--trainer.default_root_dir", "elsewhere"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: expected trainer.precision to be one of")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.init_args.group_size", "3"], "images_per_update 8 does not split into groups"),
        (["--model.init_args.guidance", "0.5"], "expected guidance of 1 (none) or more, got 0.5"),
        (
            ["--model.init_args.policy.init_args.path", "./nowhere"],
            "expected a folder with a janus checkpoint, got",
        ),
        (
            ["--data.init_args.files", "[{path: missing.txt, format: text}]"],
            "expected a file of prompts at ",
        ),
        (["--data.init_args.files", "[{path: bad.jsonl, format: jsonl}]"], "bad.jsonl:1"),
        (["--ckpt_path", "last"], "expected last.ckpt in"),
    ],
)
def test_a_mistake_in_construction_is_our_sentence_alone(
    run, repository, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{not json")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run[0]))
    folder = ["--trainer.default_root_dir", "elsewhere"]
    monkeypatch.setattr(
        sys, "argv", ["main.py", "fit", "--config", str(config), *folder, *arguments]
    )
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(repository / "tools/main.py"), run_name="__main__")
    said = refusal.value.code
    assert isinstance(said, str)  # which Python prints, and exits with 1
    assert said.startswith(f"error: {message}")
    assert "\n" not in said
    assert "Given value" not in said
