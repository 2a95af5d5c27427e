"""The main job learns what its reward asks for."""

import subprocess
import sys

import pytest

from tests.test_configs import read_values


@pytest.mark.slow
def test_grpo_on_the_shapes_world_gains_in_domain_and_loses_nothing_out_of_it(repository, tmp_path):
    command = [sys.executable, "tools/main.py", "fit", "--config", "configs/grpo_shapes.yaml"]
    command += ["--trainer.default_root_dir", str(tmp_path / "run")]
    subprocess.run(command, cwd=repository, check=True)
    in_domain = read_values(tmp_path / "run", "val/id/mean")
    out_of_domain = read_values(tmp_path / "run", "val/ood/mean")
    assert 0.45 <= in_domain[0] <= 0.65
    assert 0.45 <= out_of_domain[0] <= 0.65
    assert in_domain[-1] >= in_domain[0] + 0.05
    assert out_of_domain[-1] >= out_of_domain[0]
