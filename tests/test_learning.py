"""The main jobs learn what their reward asks for."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_configs import read_values


def train(repository: Path, folder: Path, config: str) -> tuple[list[float], list[float]]:
    """Run a config as it is; scores in domain and out of domain, from start to end."""
    command = [sys.executable, "tools/main.py", "fit", "--config", f"configs/{config}.yaml"]
    command += ["--trainer.default_root_dir", str(folder)]
    subprocess.run(command, cwd=repository, check=True)
    return read_values(folder, "val/id/mean"), read_values(folder, "val/ood/mean")


@pytest.mark.slow
def test_grpo_on_the_shapes_world_gains_in_domain_and_loses_nothing_out_of_it(repository, tmp_path):
    in_domain, out_of_domain = train(repository, tmp_path / "run", "grpo_shapes")
    assert 0.45 <= in_domain[0] <= 0.65
    assert 0.45 <= out_of_domain[0] <= 0.65
    assert abs(in_domain[0] - out_of_domain[0]) <= 0.05
    assert in_domain[-1] >= in_domain[0] + 0.15
    assert out_of_domain[-1] >= out_of_domain[0]


@pytest.mark.slow
def test_dpo_on_the_shapes_world_gains_in_domain_and_prefers_the_better(repository, tmp_path):
    in_domain, _ = train(repository, tmp_path / "run", "dpo_shapes")
    assert in_domain[-1] >= in_domain[0] + 0.05
    accuracies = read_values(tmp_path / "run", "val/pairs/accuracies")
    assert sum(accuracies[-3:]) / 3 > 0.7
