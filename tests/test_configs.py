"""Every file in configs/ is read by the command line; experiments run."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from cotgen_pl.conversion.formats import convert_checkpoint
from cotgen_pl.rewards.hps import HPSReward
from tests.conversion.original_blip import write_image_reward, write_tokenizer
from tests.conversion.test_llava_next import build_weights as build_llava_weights
from tests.conversion.test_llava_next import write_original
from tests.rewards.test_hps import write as write_small_hps
from tests.stand_ins import name_weights, write_benchmarks
from tools.build_shapes import BUILT

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))
PIECES = sorted(CONFIGS.glob("*/*.yaml"))
CLASSES = {
    "hps": "cotgen_pl.rewards.hps.HPSReward",
    "image_reward": "cotgen_pl.rewards.image_reward.ImageReward",
    "orm": "cotgen_pl.rewards.orm.ORMReward",
}
ON_SHAPES = [path for path in EXPERIMENTS if "shapes" in path.stem]


@pytest.fixture
def command_line(repository, monkeypatch):
    """tools/main.py's `main`, in the repository's root: prompt files start there."""
    monkeypatch.chdir(repository)
    monkeypatch.syspath_prepend(str(repository / "tools"))
    import main

    return main.main


def read_values(folder: Path, metric: str) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == metric]


def test_finds_the_configs():
    assert len(EXPERIMENTS) >= 10
    assert len(PIECES) >= 10


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_are_read(path, command_line, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    read = yaml.safe_load(capsys.readouterr().out)
    assert read["model"]["init_args"]["policy"]["class_path"].startswith("cotgen_pl.policies.")


@pytest.mark.parametrize("path", EXPERIMENTS + PIECES, ids=lambda path: path.stem)
def test_first_lines_say_what_it_is(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_keep_the_best_out_of_domain_and_the_last(path):
    callbacks = yaml.safe_load(path.read_text())["trainer"]["callbacks"]
    kept = [c["init_args"] for c in callbacks if "ModelCheckpoint" in str(c)]
    assert [k.get("monitor") for k in kept] == [None, "val/ood/mean"]
    assert kept[0]["save_last"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_spell_out_weight_decay(path):
    optimizer = yaml.safe_load(path.read_text())["model"]["init_args"]["optimizer"]
    assert "weight_decay" in optimizer["init_args"]


def without_rounds(path: Path) -> dict:
    """An experiment but for its run folder and what `IterativeRounds` is told."""
    read = yaml.safe_load(path.read_text())
    del read["trainer"]["default_root_dir"]
    callbacks = read["trainer"]["callbacks"]
    read["trainer"]["callbacks"] = [c for c in callbacks if "IterativeRounds" not in str(c)]
    return read


@pytest.mark.parametrize("name", ["dpo_shapes", "dpo_hps", "grpo_shapes"])
def test_two_rounds_differ_from_one_in_rounds_alone(name):
    one, two = (without_rounds(CONFIGS / f"{name}{end}.yaml") for end in ("", "_rounds"))
    if name == "grpo_shapes":  # whose reference can only be refreshed where there is one
        assert one["model"]["init_args"].pop("kl_coef") == 0
        assert two["model"]["init_args"].pop("kl_coef") > 0
    assert two == one


@pytest.mark.parametrize("world", ["shapes", "hps"])
def test_best_of_n_learns_from_the_pairs_of_dpo(world):
    dpo, best_of_n = (
        yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        for name in (f"dpo_{world}", f"sft_best_of_n_{world}")
    )
    assert best_of_n["data"] == dpo["data"]
    assert best_of_n["trainer"]["callbacks"][0] == dpo["trainer"]["callbacks"][0]
    settings = best_of_n["model"]["init_args"]
    assert settings.items() <= dpo["model"]["init_args"].items()
    assert {"reward", "images_budget", "group_size"} <= settings.keys()


@pytest.mark.parametrize("name", ["mid", "narrow_more"])
def test_a_scorer_that_does_not_ship_is_refused_until_it_is_built(name, tmp_path, monkeypatch):
    piece = (CONFIGS / "rewards" / f"shapes_{name}.yaml").read_text()
    path = yaml.safe_load(piece)["init_args"]["path"]
    assert "python tools/build_shapes.py scorers" in piece
    assert path == str(BUILT / "seed_0" / name)  # where the command puts it
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"got {path}, which does not exist; .* head of its piece"
    ):
        HPSReward(path)


@pytest.fixture
def smoke_run(command_line, repository, tmp_path):
    """Does what the smoke command of a config in the manual does, in a folder that it returns."""

    def run(name: str, *more: str, **replaced: Path) -> Path:
        commands = (repository / "docs/configuration.md").read_text().splitlines()
        (command,) = (c for c in commands if f"{name}.yaml --trainer.max_steps 2" in c)
        arguments = command.partition(" --trainer.default_root_dir")[0].split()[2:]
        for part, path in replaced.items():
            arguments += [f"--model.init_args.{part}.init_args.path", str(path)]
        command_line([*arguments, *more, "--trainer.default_root_dir", str(tmp_path / "run")])
        return tmp_path / "run"

    return run


@pytest.fixture
def small_hps(tmp_path):
    (tmp_path / "hps").mkdir()
    return write_small_hps(tmp_path / "hps")


def read_rounds(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_janus_pro_trains_with_only_the_weights_replaced(smoke_run, tiny_janus, small_hps):
    folder = smoke_run("grpo_hps", policy=tiny_janus, reward=small_hps)
    assert [path.name for path in folder.glob("*.yaml")] == ["config.yaml"]  # pieces are in it
    assert len(read_values(folder, "train/rewards/hps/mean")) == 2
    assert read_values(folder, "perf/images_sampled") == [64, 128]
    assert len(read_values(folder, "val/ood/mean")) == 2
    assert (folder / "exported" / "model.safetensors").exists()


def test_janus_pro_learns_from_its_own_pairs_with_only_the_weights_replaced(
    smoke_run, tiny_janus, small_hps
):
    folder = smoke_run("dpo_hps", policy=tiny_janus, reward=small_hps)
    assert read_values(folder, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert read_values(folder, "perf/images_sampled") == [256, 256]
    assert len(read_values(folder, "val/pairs/accuracies")) == 2
    assert len(read_values(folder, "val/ood/mean")) == 2
    assert (folder / "exported" / "model.safetensors").exists()


def test_janus_pro_learns_the_chosen_pictures_with_only_the_weights_replaced(
    smoke_run, tiny_janus, small_hps
):
    folder = smoke_run("sft_best_of_n_hps", policy=tiny_janus, reward=small_hps)
    assert read_values(folder, "perf/images_sampled") == [256, 256]
    assert len(read_values(folder, "val/ood/mean")) == 2
    assert (folder / "exported/model.safetensors").exists()


def test_janus_pro_takes_two_rounds_with_only_the_weights_replaced(
    smoke_run, tiny_janus, small_hps
):
    folder = smoke_run("dpo_hps_rounds", policy=tiny_janus, reward=small_hps)
    first, second = read_rounds(folder)
    assert (first["images_sampled"], second["images_sampled"]) == (80, 160)
    assert first["policy"] != second["policy"]
    # Each round begins at its own reference: no pair is preferred yet.
    assert read_values(folder, "train/loss") == pytest.approx([math.log(2)] * 2, abs=1e-4)
    assert (folder / "exported" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Small random weights in each judge's original format, converted as a user would."""
    folder = tmp_path_factory.mktemp("judges")
    (folder / "blip").mkdir()
    write_image_reward(folder / "blip")
    convert_checkpoint(
        "image_reward",
        folder / "blip",
        folder / "image_reward",
        tokenizer=write_tokenizer(folder / "bert"),
    )
    write_original(folder / "llava", build_llava_weights())
    convert_checkpoint("llava_next", folder / "llava", folder / "orm")
    return folder


@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("dpo", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("config", "weights", "parts"),
    [
        ("image_reward", "image_reward", ["image_reward"]),
        ("unified_reward", "orm", ["unified_reward"]),
        ("orm", "orm", ["orm"]),
        ("ensemble", None, ["hps", "image_reward", "orm"]),
    ],
)
def test_janus_pro_learns_from_each_judge(
    smoke_run, tiny_janus, small_hps, judges, algorithm, config, weights, parts
):
    places = {"hps": small_hps, "image_reward": judges / "image_reward", "orm": judges / "orm"}
    more = ["--trainer.callbacks", "null"]
    if algorithm == "dpo":  # whose callbacks draw the pairs
        more = []
    if weights is None:
        inside = "--model.init_args.reward.init_args.rewards"
        rewards = {
            name: {"class_path": CLASSES[name], "init_args": {"path": str(place)}}
            for name, place in places.items()
        }
        more += [inside, json.dumps(rewards)]
        folder = smoke_run(f"{algorithm}_{config}", *more, policy=tiny_janus)
    else:
        reward = judges / weights
        more += ["--model.init_args.reward.init_args.dtype", "float32"]
        if config == "unified_reward":  # random weights write no mark; their chances give one
            more += ["--model.init_args.reward.init_args.expected", "true"]
        folder = smoke_run(f"{algorithm}_{config}", *more, policy=tiny_janus, reward=reward)
    assert len(read_values(folder, "train/loss")) == 2
    if algorithm == "grpo":
        for part in parts:
            assert len(read_values(folder, f"train/rewards/{part}/mean")) == 2
            assert len(read_values(folder, f"perf/reward/{part}_s")) == 2


@pytest.mark.parametrize("name", ["image_reward", "unified_reward", "orm", "ensemble"])
@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_judges_differ_from_hps_in_the_reward_alone(algorithm, name):
    hps, own = (
        yaml.safe_load((CONFIGS / f"{algorithm}_{reward}.yaml").read_text())
        for reward in ("hps", name)
    )
    assert own["model"]["init_args"].pop("reward") == f"rewards/{name}.yaml"
    del hps["model"]["init_args"]["reward"]
    assert own["trainer"].pop("default_root_dir") == f"runs/{algorithm}_{name}"
    del hps["trainer"]["default_root_dir"]
    if (algorithm, name) == ("grpo", "ensemble"):
        assert own["model"]["init_args"].pop("combine_rewards") == "normalise_then_sum"
    assert own == hps


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_janus_pro_learns_from_the_benchmark_itself(
    smoke_run, tiny_janus, tmp_path, monkeypatch, algorithm
):
    small = write_benchmarks(tmp_path)
    shutil.copytree(CONFIGS, tmp_path / "configs")
    for path in (f"{algorithm}_metric.yaml", "evaluation/benchmarks.yaml"):
        read = yaml.safe_load((CONFIGS / path).read_text())
        name_weights(read, small)
        (tmp_path / "configs" / path).write_text(yaml.safe_dump(read, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cotgen_pl.rewards.detectors.SHORT_SIDE", 32)
    monkeypatch.setattr("cotgen_pl.rewards.depth.SIDE", 64)
    folder = smoke_run(f"{algorithm}_metric", policy=tiny_janus)
    assert len(read_values(folder, "train/loss")) == 2
    for name in ("val/id/mean", "val/ood/mean", "val/id/t2i_compbench/color[template]"):
        assert len(read_values(folder, name)) == 2
    if algorithm == "grpo":
        assert len(read_values(folder, "train/rewards/compbench/mean")) == 2
    names = {path.name for path in (folder / "evaluation").iterdir()}
    assert names == {
        f"{n}.{kind}" for n in ("t2i_compbench", "geneval") for kind in ("csv", "json")
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", ON_SHAPES, ids=lambda path: path.stem)
def test_experiments_on_the_shapes_world_run(path, smoke_run):
    folder = smoke_run(path.stem)
    assert len(read_values(folder, "train/loss")) == 2
    assert len(read_values(folder, "val/id/mean")) >= 2
    assert len(list((folder / "samples").glob("*.png"))) == 2
    if "rounds" in path.stem:
        assert len(read_rounds(folder)) == 2
