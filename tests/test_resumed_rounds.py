"""Runs in rounds through the command line: killed anywhere, they end as if nothing had been."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cotgen_pl.callbacks.rounds import IterativeRounds
from cotgen_pl.modules.base import PolicyModule
from tests.test_command_line import (
    CALLBACKS,
    assert_same,
    fit,
    piece,
    read_checkpoint,
    read_metrics,
)
from tests.toys import write_prompts

GROUP, PROMPTS, ROUNDS, PER_UPDATE, EPOCHS = 4, 6, 2, 2, 2
IMAGES = GROUP * PROMPTS  # in a round: three shards of two prompts, drawn one by one
UPDATES = EPOCHS * PROMPTS // PER_UPDATE  # in a round
LATER = ("start_round", "on_train_end")


def callbacks_of(
    suite_files: list[dict[str, Any]], every: int, **rounds: Any
) -> list[dict[str, Any]]:
    suite = {"files": suite_files, "reward": piece("tests.toys.NoisyBrightness")}
    return [
        piece("cotgen_pl.callbacks.rounds.IterativeRounds", rounds=ROUNDS, **rounds),
        piece(
            "cotgen_pl.callbacks.evaluation.SuiteEvaluation",
            suites=[suite | {"name": "a", "domain": "id"}, suite | {"name": "b", "domain": "ood"}],
            every_n_updates=4,
            images_per_prompt=1,
            final_images_per_prompt=1,
            leaks="warn",
        ),
        piece(
            f"{CALLBACKS}.ModelCheckpoint", save_last=True, save_top_k=1, every_n_train_steps=every
        ),
    ]


def settings_of(tiny_janus: Path, folder: Path, every: int = 3) -> dict[str, Any]:
    """Two rounds of two passes of three updates."""
    files = [vars(write_prompts(folder)) | {"category": "all"}]
    pairs = {"prompts_per_shard": 2, "images_per_batch": GROUP}
    rounds = {"optimizer": "keep", "schedule": "reset", "files": files, "pairs": pairs}
    held_out = piece(
        "cotgen_pl.callbacks.pair_evaluation.PairEvaluation", files=files, every_n_updates=4
    )
    return {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "precision": "64-true",
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [*callbacks_of(files, every, **rounds), held_out],
        },
        "model": piece(
            "cotgen_pl.modules.dpo.DPOModule",
            policy=piece(
                "cotgen_pl.policies.janus.JanusPolicy", path=str(tiny_janus), dtype="float64"
            ),
            reward=piece("tests.toys.NoisyBrightness"),
            optimizer=piece("torch.optim.AdamW", lr=1e-2),
            lr_scheduler=piece("torch.optim.lr_scheduler.StepLR", step_size=2, gamma=0.5),
            guidance=2.0,
            images_budget=ROUNDS * IMAGES,
            group_size=GROUP,
        ),
        "data": piece("cotgen_pl.data.pairs.PairData", pairs_per_update=PER_UPDATE, epochs=EPOCHS),
    }


@pytest.fixture(scope="module")
def run(tiny_janus, tmp_path_factory):
    """The settings, and the folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("rounds")
    settings = settings_of(tiny_janus, folder)
    return settings, fit(settings, folder / "run")


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The rounds' records, without the folder's own name."""
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{n: v for n, v in record.items() if n != "path"} for record in records]


def last_value(folder: Path, metric: str) -> float:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[3]) for row in csv.reader(file) if row[2] == metric][-1]


def assert_same_run(folder: Path, whole: Path, redrawn: int = 0) -> None:
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert [path.name for path in sorted((folder / "checkpoints").glob("last*"))] == ["last.ckpt"]
    assert read_metrics(folder) == read_metrics(whole)
    assert records_of(folder) == records_of(whole)
    assert last_value(folder, "perf/images_sampled") == ROUNDS * IMAGES
    assert last_value(folder, "perf/images_redrawn") == redrawn
    for path in whole.glob("rounds/*/pairs/data/*.parquet"):
        assert (folder / path.relative_to(whole)).read_bytes() == path.read_bytes()


def die(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the machine went down")


def die_after_drawing(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die when this many images have been drawn for training, before they are written."""
    count = PolicyModule.count_drawn

    def count_and_die(self: PolicyModule, number: int) -> None:
        count(self, number)
        if self._read_drawn() == images:
            die()

    monkeypatch.setattr(PolicyModule, "count_drawn", count_and_die)


def test_the_run_is_as_planned(run):
    _, folder = run
    steps = [int(step) for step, metric, _ in read_metrics(folder) if metric == "train/loss"]
    assert steps == list(range(1, ROUNDS * UPDATES + 1))
    sampled = [float(v) for _, metric, v in read_metrics(folder) if metric == "perf/images_sampled"]
    assert sampled == [IMAGES] * UPDATES + [2 * IMAGES] * UPDATES
    assert last_value(folder, "perf/images_redrawn") == 0
    assert len(list(folder.glob("rounds/1/pairs/data/*.parquet"))) == 3


@pytest.mark.parametrize(
    ("drawn", "redrawn"),
    [
        (GROUP, GROUP),  # nothing is finished yet
        pytest.param(3 * GROUP, GROUP, marks=pytest.mark.slow),  # the first shard is
        (IMAGES + 4 * GROUP, 2 * GROUP),  # the next round's first is; its second is not written
    ],
)
def test_killed_while_drawing_pairs(run, tmp_path, monkeypatch, drawn, redrawn):
    settings, whole = run
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_after_drawing(drawn, patch)
        with pytest.raises(RuntimeError, match="the machine went down"):
            fit(settings, folder)
    fit(settings, folder, "--ckpt_path", "last")
    assert_same_run(folder, whole, redrawn)


@pytest.mark.parametrize("place", ["evaluation.SuiteEvaluation", "pair_evaluation.PairEvaluation"])
def test_killed_before_the_first_update(run, tmp_path, monkeypatch, place):
    """While the start is scored, and when the held-out pairs are drawn."""
    settings, whole = run
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(f"cotgen_pl.callbacks.{place}.observe", die)
        with pytest.raises(RuntimeError, match="the machine went down"):
            fit(settings, folder)
    fit(settings, folder, "--ckpt_path", "last")
    assert_same_run(folder, whole)
    states = [
        torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (folder, whole)
    ]
    [first, expected] = [
        [state["first"] for name, state in s["callbacks"].items() if "SuiteEvaluation" in name]
        for s in states
    ]
    assert first == expected and first[0]


@pytest.mark.slow
def test_killed_again_and_again(run, tmp_path, monkeypatch):
    """Twice in the first drawing, and twice in the second."""
    settings, whole = run
    folder, resume = tmp_path / "run", []
    for drawn in (GROUP, 4 * GROUP, IMAGES + 4 * GROUP, IMAGES + 7 * GROUP):
        with monkeypatch.context() as patch:
            die_after_drawing(drawn, patch)
            with pytest.raises(RuntimeError, match="the machine went down"):
                fit(settings, folder, *resume)
        resume = ["--ckpt_path", "last"]
    fit(settings, folder, *resume)
    # Each time, the batches of a shard that was not written.
    assert_same_run(folder, whole, (1 + 1 + 2 + 1) * GROUP)


def with_stop(settings: dict[str, Any], update: int) -> dict[str, Any]:
    changed = copy.deepcopy(settings)
    changed["trainer"]["callbacks"].append(piece("tests.toys.StopAt", rollout=update))
    return changed


@pytest.mark.parametrize(
    ("update", "rollouts"),
    [
        # In the first pass: the last checkpoint is from before the drawing.
        pytest.param(2, 0, marks=pytest.mark.slow),
        (5, 3),  # in the second pass: it is from between the two
        (9, 6),  # in the second round: it is from before its drawing
    ],
)
def test_killed_in_a_pass(run, tmp_path, update, rollouts):
    settings, whole = run
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(with_stop(settings, update), folder)
    assert read_checkpoint(folder)["progress"]["rollouts"] == rollouts
    fit(settings, folder, "--ckpt_path", "last")
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    "place", ["finish_round", *(pytest.param(n, marks=pytest.mark.slow) for n in LATER)]
)
def test_killed_between_two_rounds_or_at_the_end(run, tmp_path, monkeypatch, place):
    """Before a round's end is scored, after it, and when the last one's would be."""
    settings, whole = run
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(IterativeRounds, place, die)
        with pytest.raises(RuntimeError, match="the machine went down"):
            fit(settings, folder)
    fit(settings, folder, "--ckpt_path", "last")
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_killed_where_the_last_checkpoint_is_from_within_a_pass(run, tiny_janus, tmp_path):
    settings = settings_of(tiny_janus, tmp_path, every=4)
    folder, whole = tmp_path / "run", tmp_path / "whole" / "run"
    whole.parent.mkdir()
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(with_stop(settings, 6), folder)
    assert read_checkpoint(folder)["progress"]["rollouts"] == 4
    fit(settings, folder, "--ckpt_path", "last")
    assert read_metrics(folder) == read_metrics(fit(settings, whole))


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["live", "stored"])
def test_adapters_go_on_beside_those_of_the_round_s_start(tiny_janus, tmp_path, reference):
    """Killed in the second round, whose reference is neither the base model nor the policy."""
    settings = settings_of(tiny_janus, tmp_path, every=2)
    model = settings["model"]["init_args"]
    model["policy"]["init_args"]["lora"] = {"rank": 2, "alpha": 16}
    model["reference_logps"] = reference
    folder, whole = tmp_path / "run", fit(settings, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(with_stop(settings, 10), folder)
    assert read_checkpoint(folder)["progress"]["rollouts"] == 8
    fit(settings, folder, "--ckpt_path", "last")
    assert_same_run(folder, whole)


# GRPO -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, pytest.param({"rank": 2}, marks=pytest.mark.slow)])
def test_grpo_goes_on_behind_a_round_with_the_reference_of_its_start(tiny_janus, tmp_path, lora):
    """Three rollouts in a round; the last checkpoint is one behind its start."""
    files = [vars(write_prompts(tmp_path)) | {"category": "all"}]
    policy = {"path": str(tiny_janus), "dtype": "float64", "lora": lora}
    settings = settings_of(tiny_janus, tmp_path)
    settings["trainer"]["callbacks"] = callbacks_of(files, 4, optimizer="reset", schedule="reset")
    settings["model"] = piece(
        "cotgen_pl.modules.grpo.GRPOModule",
        policy=piece("cotgen_pl.policies.janus.JanusPolicy", **policy),
        reward=piece("tests.toys.NoisyBrightness"),
        optimizer=piece("torch.optim.AdamW", lr=1e-2),
        lr_scheduler=piece("torch.optim.lr_scheduler.StepLR", step_size=2, gamma=0.5),
        images_budget=48,
        images_per_update=8,
        group_size=4,
        kl_coef=0.1,
    )
    settings["data"] = piece("cotgen_pl.data.prompts.PromptData", files=files)
    whole = fit(settings, tmp_path / "whole")
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(with_stop(settings, 6), folder)
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["progress"]["rollouts"] == 4
    assert checkpoint["reference"].keys() == {
        name.removeprefix("policy.") for name in checkpoint["state_dict"]
    }
    fit(settings, folder, "--ckpt_path", "last")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)
    assert records_of(folder) == records_of(whole)
    assert last_value(folder, "perf/images_sampled") == 48
    assert last_value(folder, "perf/images_redrawn") == 8  # the fifth rollout
    divergences = [float(v) for _, metric, v in read_metrics(whole) if metric == "train/kl"]
    assert len(divergences) == 6
    assert divergences[0] == divergences[3] == 0 and min(divergences[1], divergences[4]) > 0
