"""A run that hangs ends, and says where."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cotgen_pl.callbacks.watchdog import EXIT_CODE, Watchdog
from tests.forks import Fork
from tests.test_command_line import piece, settings_of
from tests.toys import Brightness, fit, make_grpo

SHORT = 0.02  # minutes: 1.2 s


class Hanging(Brightness):
    """Never answers the third time, on the second process where there are two."""

    calls = 0

    def score(self, images, prompts):
        self.calls += 1
        if self.calls == 3 and os.environ.get("LOCAL_RANK", "1") == "1":
            self.wait_for_ever()
        return super().score(images, prompts)

    def wait_for_ever(self):
        while True:
            time.sleep(0.1)


def test_a_run_that_hangs_ends_with_its_traces(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, Hanging(), images_budget=40)
    fork = Fork(lambda: fit(module, tmp_path, Watchdog(SHORT)), tmp_path / "output")
    assert fork.wait() == EXIT_CODE
    trace = (tmp_path / "watchdog/0.txt").read_text()
    assert trace.startswith("no sign of life of any process for 1.2 s\n")
    assert "in wait_for_ever" in trace and "in training_step" in trace and "Thread" in trace


def test_a_run_that_goes_on_is_left_alone(tiny_janus, tmp_path):
    """Through three waits that are as long as the limit together."""

    class Slow(Brightness):
        def score(self, images, prompts):
            time.sleep(0.5)
            return super().score(images, prompts)

    module = make_grpo(tiny_janus, Slow(), images_budget=24)
    fork = Fork(lambda: fit(module, tmp_path, Watchdog(SHORT)), tmp_path / "output")
    assert fork.wait() == 0, (tmp_path / "output").read_text()
    assert not (tmp_path / "watchdog").exists()


def test_a_failed_run_is_not_watched_any_more(tiny_janus, tmp_path):
    watchdog = Watchdog()
    module = make_grpo(tiny_janus, images_budget=40)
    module.collect = None
    with pytest.raises(TypeError):
        fit(module, tmp_path, watchdog)
    assert watchdog._over.is_set()


def test_no_time_at_all_is_refused():
    with pytest.raises(ValueError, match="expected minutes above 0, got 0"):
        Watchdog(0)


@pytest.mark.slow
def test_all_of_two_processes_say_where_they_stand(tiny_janus, repository, tmp_path):
    settings = settings_of(tiny_janus, tmp_path)
    settings["model"]["init_args"]["reward"] = piece(f"{__name__}.Hanging")
    watchdog = piece("cotgen_pl.callbacks.watchdog.Watchdog", minutes=0.2)
    folder, config = tmp_path / "run", tmp_path / "run.yaml"
    trainer = {"callbacks": [watchdog], "devices": 2, "strategy": "ddp"}
    config.write_text(yaml.safe_dump(settings | {"trainer": settings["trainer"] | trainer}))
    done = subprocess.run(
        [sys.executable, "tools/main.py", "fit", "--config", str(config)],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode != 0
    assert "no process has shown a sign of life for 12 s" in done.stderr
    traces = [Path(folder / f"watchdog/{rank}.txt").read_text() for rank in range(2)]
    assert "in wait_for_ever" in traces[1] and "in wait_for_ever" not in traces[0]
    assert re.search(r"in (all_reduce|all_gather\w*|broadcast|_sync_ddp|reduce)", traces[0])
