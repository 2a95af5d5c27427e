"""Two processes on the CPU do what one does: same pictures, same update, same scores."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cotgen_pl.pairs.sets import PairSet
from tests.test_resumed_rounds import settings_of as rounds_settings
from tests.toys import write_prompts

pytestmark = pytest.mark.slow
STRATEGIES = ("configs/strategies/ddp.yaml", "configs/strategies/fsdp.yaml")
SECONDS = 600  # far more than it takes: a collective call that one process misses would hang


def piece(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def settings_of(tiny_janus: Path, folder: Path, **model: Any) -> dict[str, Any]:
    """Three rollouts of four groups in float64, with all that is shared between processes."""
    files = [vars(write_prompts(folder)) | {"category": "all"}]
    suite = {"files": files, "reward": piece("tests.toys.Brightness")}
    suites = [suite | {"name": "a", "domain": "id"}, suite | {"name": "b", "domain": "ood"}]
    grpo = {
        "policy": piece("cotgen_pl.policies.janus.JanusPolicy", path=str(tiny_janus)),
        "reward": piece("tests.toys.Brightness"),
        "optimizer": piece("torch.optim.SGD", lr=0.5, momentum=0.9, weight_decay=0.0),
        "guidance": 2.0,
        "images_budget": 48,
        "images_per_update": 16,
        "micro_batch_size": 4,
        "updates_per_rollout": 2,
        "kl_coef": 0.1,
        "advantage_scale": "batch",
    }
    grpo["policy"]["init_args"]["dtype"] = "float64"
    return {
        "trainer": {
            "accelerator": "cpu",
            "plugins": [piece("lightning.pytorch.plugins.DoublePrecision")],
            "enable_progress_bar": False,
            "callbacks": [
                piece(
                    "cotgen_pl.callbacks.evaluation.SuiteEvaluation",
                    suites=suites,
                    every_n_updates=2,
                    images_per_prompt=2,
                    final_images_per_prompt=2,
                    leaks="warn",
                ),
                piece("cotgen_pl.callbacks.samples.SampleGrid", files=files),
                piece("cotgen_pl.callbacks.export.HuggingFaceExport"),
                piece(
                    "lightning.pytorch.callbacks.ModelCheckpoint",
                    every_n_train_steps=2,
                    save_last=True,
                ),
                piece("tests.toys.SaveRank"),
            ],
        },
        "model": piece("cotgen_pl.modules.grpo.GRPOModule", **(grpo | model)),
        "data": piece("cotgen_pl.data.prompts.PromptData", files=files),
    }


def run(
    repository: Path, settings: dict[str, Any], folder: Path, strategy: str | None = None
) -> None:
    """On one process, or on two with a strategy."""
    processes = 1 if strategy is None else 2
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "tools/main.py", "fit", "--config", str(config)]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.devices", str(processes)]
    command += ["--trainer.strategy", strategy or "auto"]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def read_metrics(folder: Path) -> dict[tuple[int, str], float]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    kept = {(int(step), name): float(value) for _, step, name, value in rows}
    assert len(kept) == len(rows)
    return {key: value for key, value in kept.items() if not key[1].startswith("perf/")} | {
        key: value for key, value in kept.items() if key[1] == "perf/images_sampled"
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dead_groups", ["keep", "resample"])
def test_two_processes_do_what_one_does(tiny_janus, repository, tmp_path, dead_groups, strategy):
    model: dict[str, Any] = {"dead_groups": dead_groups}
    if dead_groups == "resample":  # and some groups have to be drawn again, on one process only
        model |= {"reward": piece("tests.toys.OftenEqual"), "images_budget": 130}
    settings = settings_of(tiny_janus, tmp_path, **model)
    one, two = tmp_path / "one", tmp_path / "two"
    run(repository, settings, one)
    run(repository, settings, two, strategy)
    alone = torch.load(one / "rank0.pt", weights_only=True)
    ranks = [torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    # Each process has its half of the prompts; together they draw what one draws.
    assert torch.equal(torch.cat([rank["tokens"] for rank in ranks], 1), alone["tokens"])
    assert not torch.equal(ranks[0]["tokens"], ranks[1]["tokens"])
    for name, weight in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=0, atol=1e-9)
    metrics, expected = read_metrics(two), read_metrics(one)
    assert metrics.keys() == expected.keys()
    assert len(metrics) > 80
    for key, value in metrics.items():
        # The mean of two halves' deviations is not the deviation of the whole.
        if not (key[1].startswith("train/rewards/") and key[1].endswith("/std")):
            assert value == pytest.approx(expected[key], abs=1e-6), key
    if dead_groups == "resample":
        # Two of four groups are dead and are drawn five times: 48 images per rollout of 16.
        assert [metrics[step, "perf/images_sampled"] for step in (1, 2, 3)] == [48, 96, 144]
    assert (two / "exported/model.safetensors").exists()
    named = yaml.safe_load((two / "config.yaml").read_text())["trainer"]["strategy"]
    piece_of = yaml.safe_load((repository / strategy).read_text())
    assert named["class_path"] == piece_of["class_path"]  # by itself, not by path
    assert len(list((two / "samples").iterdir())) == len(list((one / "samples").iterdir()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_go_through_the_rounds_of_one(tiny_janus, repository, tmp_path, strategy):
    """Pairs are drawn in unequal parts: three shards on two processes."""
    settings = rounds_settings(tiny_janus, tmp_path)
    del settings["trainer"]["precision"]
    settings["trainer"]["plugins"] = [piece("lightning.pytorch.plugins.DoublePrecision")]
    settings["trainer"]["callbacks"].append(piece("tests.toys.SaveWeights"))
    one, two = tmp_path / "one", tmp_path / "two"
    run(repository, settings, one)
    run(repository, settings, two, strategy)
    [alone, *ranks] = [
        torch.load(folder / f"rank{rank}.pt", weights_only=True)
        for folder, rank in ((one, 0), (two, 0), (two, 1))
    ]
    for rank in ranks:
        for name, weight in alone.items():
            torch.testing.assert_close(rank[name], weight, rtol=0, atol=1e-9)
    for folder in one.glob("rounds/*/pairs"):
        pairs = [PairSet(place) for place in (folder, two / folder.relative_to(one))]
        rows = [pair_set.batch(range(len(pair_set))) for pair_set in pairs]
        assert torch.equal(rows[0].chosen, rows[1].chosen)
        assert torch.equal(rows[0].rejected, rows[1].rejected)
    metrics, expected = read_metrics(two), read_metrics(one)
    assert metrics.keys() == expected.keys()
    for key in metrics:
        if key[1].startswith(("train/", "val/pairs/")):  # the suites' reward has noise of its own
            assert metrics[key] == pytest.approx(expected[key], abs=1e-6), key
