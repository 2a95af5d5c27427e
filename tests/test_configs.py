"""Every file in configs/ is read by the command line; experiments run."""

import csv
from pathlib import Path

import pytest
import yaml

from tests.rewards.test_hps import write as write_small_hps

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))
PIECES = sorted(CONFIGS.glob("*/*.yaml"))
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
    assert len(EXPERIMENTS) >= 4
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


def test_janus_pro_trains_with_only_the_weights_replaced(command_line, tiny_janus, tmp_path):
    (tmp_path / "hps").mkdir()
    weights = write_small_hps(tmp_path / "hps")
    command_line(
        [
            *("fit", "--config", "configs/grpo_hps.yaml", "--trainer.max_steps", "2"),
            *("--trainer.default_root_dir", str(tmp_path / "run")),
            *("--model.init_args.policy.init_args.path", str(tiny_janus)),
            *("--model.init_args.reward.init_args.path", str(weights)),
        ]
    )
    assert len(read_values(tmp_path / "run", "train/rewards/hps/mean")) == 2
    assert read_values(tmp_path / "run", "perf/images_sampled") == [64, 128]
    assert len(read_values(tmp_path / "run", "val/ood/mean")) == 2
    assert (tmp_path / "run" / "exported" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", ON_SHAPES, ids=lambda path: path.stem)
def test_experiments_on_the_shapes_world_run(path, command_line, tmp_path):
    command_line(
        [
            *("fit", "--config", str(path), "--trainer.max_steps", "2"),
            *("--trainer.default_root_dir", str(tmp_path)),
        ]
    )
    assert len(read_values(tmp_path, "val/id/mean")) == 2
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
