"""Drawn pair sets: whose pictures, which pairs, what is said of them, and who can read them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

import cotgen_pl
from cotgen_pl.callbacks.pair_building import PairSettings, build_pairs
from cotgen_pl.checkpoints import hash_weights
from cotgen_pl.data.prompts import read_prompts
from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.modules.dpo import DPOModule
from cotgen_pl.pairs.sets import PairSet
from cotgen_pl.rewards.ensemble import Ensemble
from tests.toys import (
    TEXTS,
    Brightness,
    Fixed,
    NoisyBrightness,
    make_dpo,
    make_trainer,
    write_prompts,
)

GROUP = 4
SMALL = PairSettings(prompts_per_shard=2, images_per_batch=GROUP)
SECONDS = 240  # far more than it takes: a collective call that one process misses would hang


def make_module(tiny_janus: Path, folder: Path, **arguments: Any) -> DPOModule:
    """Ready to draw into a run folder."""
    module = make_dpo(tiny_janus, **({"reward": Brightness()} | arguments))
    module.configure_model()
    make_trainer(folder).strategy.connect(module)
    module.trainer = make_trainer(folder)
    return module


def build(
    module: DPOModule, folder: Path, settings: PairSettings = SMALL, **arguments: Any
) -> PairSet:
    """The set of four prompts, in two shards."""
    file = write_prompts(folder)
    prompts = [Prompt(p.text, index=k, facts=p.facts) for k, p in enumerate(read_prompts(file))]
    arguments = {"files": [file], "stream": "pairs of round 0"} | arguments
    return build_pairs(module, prompts, folder / "pairs", settings, **arguments)


def rows_of(pairs: PairSet) -> pd.DataFrame:
    return pd.read_parquet(pairs.folder / "data")


# Which pairs ------------------------------------------------------------------------------------


def test_pairs_are_the_best_and_the_worst_of_the_policy_s_own_pictures(tiny_janus, tmp_path):
    module = make_module(tiny_janus, tmp_path)
    rows = rows_of(build(module, tmp_path)).set_index("caption")
    prompts = [Prompt(text, index=index) for index, text in enumerate(TEXTS)]
    tokens, _ = module.draw(prompts, GROUP, "pairs of round 0")
    scores = Brightness().score(module.policy.decode(tokens), prompts).total.view(-1, GROUP)
    seeds = module.noise_seeds(prompts, GROUP, "pairs of round 0")
    assert set(rows.index) == set(TEXTS)
    for number, text in enumerate(TEXTS):
        row = rows.loc[text]
        for side, best in enumerate((scores[number].argmax(), scores[number].argmin())):
            image = number * GROUP + int(best)
            assert list(row[f"tokens_{side}"]) == tokens[image].tolist()
            assert row[f"score_{side}"] == pytest.approx(scores[number, best].item(), abs=1e-6)
            assert row[f"seed_{side}"] == seeds[image]
        assert (row["label_0"], row["label_1"]) == (1.0, 0.0)


def test_a_reward_s_own_noise_depends_on_the_shard_alone(tiny_janus, tmp_path):
    """And the run's random state does not depend on what is drawn."""
    sets = []
    for number, folder in enumerate((tmp_path / "one", tmp_path / "two")):
        folder.mkdir()
        torch.manual_seed(number)
        module = make_module(tiny_janus, folder, reward=NoisyBrightness())
        before = torch.get_rng_state()
        sets.append(rows_of(build(module, folder)))
        assert torch.equal(torch.get_rng_state(), before)
    one, two = sets
    assert list(one["score_0"]) == list(two["score_0"])


@pytest.mark.parametrize(("rule", "number"), [("all_pairs", 4 * 6), ("best_random", 4)])
def test_other_rules_are_passed_on(tiny_janus, tmp_path, rule, number):
    module = make_module(tiny_janus, tmp_path, reward=Fixed([0.1, 0.4, 0.3, 0.2]))
    assert len(build(module, tmp_path, PairSettings(rule=rule))) == number


def test_the_margin_is_passed_on(tiny_janus, tmp_path):
    module = make_module(tiny_janus, tmp_path, reward=Fixed([0.1, 0.4, 0.3, 0.2]))
    rows = rows_of(build(module, tmp_path, PairSettings(rule="all_pairs", margin=0.25)))
    assert [(rows["score_0"] - rows["score_1"]).min(), len(rows)] == [pytest.approx(0.3), 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "best"}, "expected rule to be one of"),
        ({"margin": -1.0}, "expected margin of 0 or more, got -1.0"),
        ({"margin": float("nan")}, "expected margin of 0 or more, got nan"),
        ({"prompts_per_shard": 0}, "expected prompts_per_shard of 1 or more"),
        ({"images_per_batch": 0}, "expected images_per_batch of 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PairSettings(**settings)


# Interruptions ----------------------------------------------------------------------------------


class Breaking(Brightness):
    """Fails at its third call: in the first batch of the second shard."""

    calls = 0

    def score(self, images, prompts):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the machine went down")
        return super().score(images, prompts)


def test_finished_shards_are_kept_and_only_the_rest_is_drawn(tiny_janus, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = rows_of(build(make_module(tiny_janus, whole), whole))
    module = make_module(tiny_janus, tmp_path, reward=Breaking())
    with pytest.raises(RuntimeError, match="the machine went down"):
        build(module, tmp_path)
    with pytest.raises(ValueError, match=r"expected a finished pair set in .*, got one that was"):
        PairSet(tmp_path / "pairs")
    shard = next((tmp_path / "pairs/data").glob("*.parquet"))
    before = (shard.stat().st_mtime_ns, shard.read_bytes())
    found = rows_of(build(module, tmp_path))
    assert (shard.stat().st_mtime_ns, shard.read_bytes()) == before
    assert module.reward.calls == 3 + 2
    places = ["facts"]  # the prompts' file is another one
    pd.testing.assert_frame_equal(found.drop(columns=places), expected.drop(columns=places))
    assert module._read_drawn() == 4 * GROUP


def test_a_finished_set_is_not_drawn_again(tiny_janus, tmp_path):
    module = make_module(tiny_janus, tmp_path)
    rows = rows_of(build(module, tmp_path))
    module.draw = None
    assert len(build(module, tmp_path)) == len(rows)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"guidance": 2.0}, "sampling"),
        ({"temperature": 0.5}, "sampling"),
        ({"seed": 1}, "sampling"),
        ({"reward": Fixed([0.1, 0.4, 0.3, 0.2])}, "reward"),
    ],
)
def test_a_set_that_was_begun_otherwise_is_refused(tiny_janus, tmp_path, arguments, name):
    build(make_module(tiny_janus, tmp_path), tmp_path)
    other = make_module(tiny_janus, tmp_path, **arguments)
    with pytest.raises(ValueError, match=f"was begun with {name} "):
        build(other, tmp_path)
    with torch.no_grad():
        next(other.policy.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="was begun with policy "):
        build(other, tmp_path)


def test_other_facts_make_another_set(tiny_janus, tmp_path):
    """A reward may judge by them."""
    module, prompts = make_module(tiny_janus, tmp_path), [Prompt(text) for text in TEXTS]
    arguments = {"files": [], "stream": "pairs"}
    build_pairs(module, prompts, tmp_path / "pairs", SMALL, **arguments)
    prompts[0].facts = {"objects": []}
    with pytest.raises(ValueError, match="was begun with prompts "):
        build_pairs(module, prompts, tmp_path / "pairs", SMALL, **arguments)


class NoScores(Reward):
    def score(self, images, prompts):
        return Scores.single("none", torch.full((len(images),), float("nan")))


def test_a_reward_without_any_verdict_stops_the_drawing(tiny_janus, tmp_path):
    module = make_module(tiny_janus, tmp_path, reward=NoScores())
    with pytest.raises(ValueError, match="reward NoScores: expected scores, got NaN"):
        build(module, tmp_path)


# What a set says of itself ----------------------------------------------------------------------


def test_the_set_says_how_it_was_made(tiny_janus, tmp_path):
    reward = Ensemble({"a": Brightness(), "b": Fixed([0.0] * 4)}, {"a": 1.0, "b": 0.5})
    module = make_module(tiny_janus, tmp_path, reward=reward, seed=5, temperature=0.9)
    build(module, tmp_path)
    made = json.loads((tmp_path / "pairs/pairs.json").read_text())["settings"]
    assert made["version"] == cotgen_pl.__version__
    assert made["policy"] == hash_weights(module.policy)
    assert made["policy_source"] == module.policy.describe()
    fixed = {"class_path": "tests.toys.Fixed", "values": [0.0] * 4}
    assert made["reward"] == {
        "class_path": "cotgen_pl.rewards.ensemble.Ensemble",
        "rewards": {"a": {"class_path": "tests.toys.Brightness"}, "b": fixed},
        "weights": {"a": 1.0, "b": 0.5},
        "standardise": False,
    }
    assert made["prompts"]["number"] == 4
    assert made["files"] == [vars(write_prompts(tmp_path))]
    assert made["sampling"] == {
        "guidance": 3.0,
        "temperature": 0.9,
        "images_per_prompt": GROUP,
        "seed": 5,
        "stream": "pairs of round 0",
    }
    assert made["selection"] == {
        "rule": "best_worst",
        "margin": 0.0,
        "most_missing": 0.5,
        "prompts_per_shard": 2,
        "images_per_batch": GROUP,
    }


def test_other_tools_open_the_set(tiny_janus, tmp_path):
    module = make_module(tiny_janus, tmp_path)
    pairs = build(module, tmp_path)
    table = datasets.load_dataset(
        str(pairs.folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    frame = rows_of(pairs)
    assert len(table) == len(frame) == len(pairs) == 4
    named = {
        f"{name}_{side}" for name in ("jpg", "label", "tokens", "score", "seed") for side in (0, 1)
    }
    assert set(table.column_names) >= named | {"caption"}
    assert set(table["caption"]) == set(frame["caption"]) == set(TEXTS)
    for row in table:
        for side in (0, 1):
            picture = Image.open(io.BytesIO(row[f"jpg_{side}"]))
            image = module.policy.decode(torch.tensor([row[f"tokens_{side}"]]))[0]
            expected = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            assert picture.format == "PNG" and np.array_equal(np.asarray(picture), expected)


# Two processes ----------------------------------------------------------------------------------


def piece(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def run(repository: Path, tiny_janus: Path, prompts: Path, folder: Path, processes: int) -> None:
    """Two rounds through the command line, and the weights of each process at the end."""
    files = [vars(write_prompts(prompts))]
    pairs = {"prompts_per_shard": 2, "images_per_batch": GROUP}
    rounds = "cotgen_pl.callbacks.rounds.IterativeRounds"
    policy = piece("cotgen_pl.policies.janus.JanusPolicy", path=str(tiny_janus), dtype="float64")
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "precision": "64-true",
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "devices": processes,
            "strategy": "ddp" if processes > 1 else "auto",
            "callbacks": [
                piece(rounds, rounds=2, files=files, pairs=pairs),
                piece("cotgen_pl.callbacks.pair_evaluation.PairEvaluation", files=files),
                piece("lightning.pytorch.callbacks.ModelCheckpoint", save_last=True),
                piece("tests.toys.SaveWeights"),
            ],
        },
        "model": piece(
            "cotgen_pl.modules.dpo.DPOModule",
            policy=policy,
            reward=piece("tests.toys.NoisyBrightness"),
            optimizer=piece("torch.optim.SGD", lr=0.5, weight_decay=0.0),
            guidance=2.0,
            images_budget=2 * 6 * GROUP,
            group_size=GROUP,
        ),
        "data": piece("cotgen_pl.data.pairs.PairData", pairs_per_update=2, epochs=2),
    }
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "tools/main.py", "fit", "--config", str(config)],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_draw_and_learn_what_one_does(tiny_janus, repository, tmp_path):
    for processes in (1, 2):
        run(repository, tiny_janus, tmp_path, tmp_path / str(processes), processes)
    one, two = tmp_path / "1", tmp_path / "2"
    first = [rows_of(PairSet(folder / "rounds/0/pairs")) for folder in (one, two)]
    pd.testing.assert_frame_equal(*first)
    later = [rows_of(PairSet(folder / "rounds/1/pairs")) for folder in (one, two)]
    assert list(later[0]["caption"]) == list(later[1]["caption"])
    alone = torch.load(one / "rank0.pt", weights_only=True)
    ranks = [torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, weight in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], weight, rtol=0, atol=1e-6)
    drawn = [int((two / f"drawn/{rank}.txt").read_text()) for rank in range(2)]
    # Of three shards of two prompts in each round, the first process has two.
    assert drawn == [2 * 4 * GROUP, 2 * 2 * GROUP]
    assert (one / "drawn/0.txt").read_text() == f"{2 * 6 * GROUP}\n"
    records = [(folder / "rounds.jsonl").read_text().splitlines() for folder in (one, two)]
    for left, right in zip(*(map(json.loads, lines) for lines in records), strict=True):
        for name in ("images_sampled", "updates", "pairs", "prompts", "images"):
            assert left[name] == right[name]
