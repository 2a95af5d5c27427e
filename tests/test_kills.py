"""`kill -9` at any moment: the same command again ends as if nothing had been."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import psutil
import pytest
import yaml

from tests.forks import Fork
from tests.test_command_line import assert_same, fit, read_checkpoint, read_metrics, settings_of
from tests.test_resumed_rounds import records_of
from tests.test_resumed_rounds import settings_of as settings_of_rounds

KILLS = 20  # at random moments: half of them of one process, half of two
LONGEST_S = 90.0  # until the processes of a killed one are gone
STRATEGIES = ("ddp", "configs/strategies/fsdp.yaml")  # of two processes, in turn

STAGES = {  # what is called, how often until the kill, whether it was done by then
    "sampling": ("cotgen_pl.policies.janus.JanusPolicy.step", 40, False),
    "scoring": ("tests.toys.NoisyBrightness.score", 3, False),
    "update": ("torch.optim.SGD.step", 4, True),
    "evaluation": ("cotgen_pl.evaluation.verdicts.VerdictStore.append", 3, True),
    "checkpoint": ("cotgen_pl.run_checkpoints._write_to_disk", 4, False),
    "pairs": ("cotgen_pl.pairs.sets.PairSetWriter.write", 5, True),
}


def settings_for(stage: str, tiny_janus: Path, folder: Path) -> dict[str, Any]:
    """Three rollouts of two updates, each saved; or two rounds of pairs."""
    if stage == "pairs":
        return settings_of_rounds(tiny_janus, folder)
    settings = settings_of(tiny_janus, folder)
    settings["model"]["init_args"]["images_budget"] = 24
    for callback in settings["trainer"]["callbacks"][-2:]:
        callback["init_args"]["every_n_train_steps"] = 2
    return settings


def kill_at(patch: pytest.MonkeyPatch, target: str, calls: int, *, done: bool) -> None:
    """Have this process killed in one of the calls of a function, before or behind its work."""
    place, name = target.rsplit(".", 1)
    owner = resolve_name(place)
    work, called = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        if len(called) < calls:
            return work(*args, **kwargs)
        if done:
            work(*args, **kwargs)
        elif name == "_write_to_disk":  # the half of a file
            args[0].write_bytes(args[1][: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(owner, name, dying)


@pytest.fixture(scope="module")
def whole(tiny_janus, tmp_path_factory) -> Callable[[str], tuple[dict[str, Any], Path, float]]:
    """For a stage: settings, the folder of a run that nothing interrupted, and its seconds."""
    known: dict[str, Any] = {}

    def give(stage: str) -> tuple[dict[str, Any], Path, float]:
        kind = "pairs" if stage == "pairs" else "rollouts"
        if kind not in known:
            folder, started = tmp_path_factory.mktemp(kind), time.monotonic()
            settings = settings_for(stage, tiny_janus, folder)
            known[kind] = settings, fit(settings, folder / "run"), time.monotonic() - started
        return known[kind]

    return give


@pytest.fixture
def again(monkeypatch):
    """What a launcher tells a command that it starts again: then the command goes on by itself."""
    return lambda: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def assert_same_run(folder: Path, whole: Path) -> None:
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)
    if (whole / "rounds.jsonl").exists():
        assert records_of(folder) == records_of(whole)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_in_a_stage_goes_on_bit_for_bit(whole, again, tmp_path, stage):
    settings, unharmed, _ = whole(stage)
    target, calls, done = STAGES[stage]
    folder = tmp_path / "run"

    def train_and_die():
        kill_at(pytest.MonkeyPatch(), target, calls, done=done)
        fit(settings, folder)

    fork = Fork(train_and_die, tmp_path / "output")
    assert fork.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()[-2000:]
    assert read_checkpoint(folder)["progress"] != read_checkpoint(unharmed)["progress"]
    again()
    fit(settings, folder)
    assert_same_run(folder, unharmed)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS // 2))
def test_one_process_killed_at_a_random_moment_goes_on_bit_for_bit(whole, again, tmp_path, number):
    """Rollouts and rounds in turn, and once more while it goes on."""
    settings, unharmed, seconds = whole("pairs" if number % 2 else "rollouts")
    folder, moments = tmp_path / "run", random.Random(number)
    for _ in range(2):
        fork = Fork(lambda: fit(settings, folder), tmp_path / "output")
        time.sleep(moments.uniform(0, seconds))
        fork.kill()
        fork.wait()
        again()
    fit(settings, folder)
    assert_same_run(folder, unharmed)


# Two processes ----------------------------------------------------------------------------------


class Two:
    """The command line on two processes.

    Args:
        repository: Root of the checkout.
        config: What they run.
        folder: Of the run.
        strategy: A name of Lightning's, or a file.
        restarts: What the launcher says of it.
    """

    def __init__(
        self, repository: Path, config: Path, folder: Path, strategy: str, restarts: int = 0
    ) -> None:
        command = [sys.executable, "tools/main.py", "fit", "--config", str(config)]
        command += ["--trainer.devices", "2", "--trainer.strategy", strategy]
        command += ["--trainer.default_root_dir", str(folder)]
        around = {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        around["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
        self.output = folder.with_suffix(".log")
        with self.output.open("w") as output:
            self.main = psutil.Popen(
                command, cwd=repository, env=os.environ | around, stdout=output, stderr=output
            )
        self.folder = folder

    def wait_for_training(self) -> None:
        while not (self.folder / "metrics.csv").exists():
            assert self.main.poll() is None, self.output.read_text()[-3000:]
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """The first rank, and the second."""
        scripts = {child: " ".join(child.cmdline()) for child in self.main.children()}
        return [self.main, *(child for child, line in scripts.items() if "main.py fit" in line)]

    def wait(self) -> int:
        code: int = self.main.wait(LONGEST_S)
        return code


@pytest.fixture(scope="module")
def whole_two(tiny_janus, repository, tmp_path_factory):
    """For a strategy: the config, the folder of an unharmed run, and its training's seconds."""
    known: dict[str, tuple[Path, Path, float]] = {}

    def give(strategy: str) -> tuple[Path, Path, float]:
        if strategy not in known:
            folder = tmp_path_factory.mktemp("two")
            settings, config = settings_of(tiny_janus, folder), folder / "run.yaml"
            settings["model"]["init_args"] |= {"images_budget": 64, "images_per_update": 8}
            config.write_text(yaml.safe_dump(settings))
            run = Two(repository, config, folder / "run", strategy)
            run.wait_for_training()
            started = time.monotonic()
            assert run.wait() == 0, run.output.read_text()[-3000:]
            known[strategy] = config, folder / "run", time.monotonic() - started
        return known[strategy]

    return give


def assert_same_but_for_rounding(folder: Path, unharmed: Path) -> None:
    """Bit for bit, but for scores of an evaluation that was killed.

    What is left of it is shared out anew: other batches of float32 round otherwise.
    """
    assert_same(read_checkpoint(folder), read_checkpoint(unharmed))
    found, expected = read_metrics(folder), read_metrics(unharmed)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for (step, metric, value), (_, _, other) in zip(found, expected, strict=True):
        if metric.startswith("val/"):
            assert float(value) == pytest.approx(float(other), abs=1e-6), (step, metric)
        else:
            assert value == other, (step, metric)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS // 2))
def test_one_or_both_of_two_killed_at_a_random_moment_go_on_bit_for_bit(
    whole_two, repository, tmp_path, number
):
    strategy = STRATEGIES[number % 2]
    config, unharmed, seconds = whole_two(strategy)
    moments, folder = random.Random(100 + number), tmp_path / "run"
    run = Two(repository, config, folder, strategy)
    run.wait_for_training()
    ranks = run.processes()
    assert len(ranks) == 2
    time.sleep(moments.uniform(0, seconds))
    victims = [ranks, ranks[:1], ranks[1:]][number % 3]
    for victim in victims:
        if victim.is_running():
            victim.kill()
    _, left = psutil.wait_procs(ranks, LONGEST_S)
    for process in left:
        process.kill()
    assert not left, "a process waits for one that is dead"
    again = Two(repository, config, folder, strategy, restarts=1)
    assert again.main.wait(200) == 0, again.output.read_text()[-3000:]
    assert_same_but_for_rounding(folder, unharmed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_of_which_one_is_told_to_stop_save_and_go_on(whole_two, repository, tmp_path, rank):
    """As a launcher does that tells one process, or all at different moments."""
    config, unharmed, _ = whole_two("ddp")
    folder = tmp_path / "run"
    run = Two(repository, config, folder, "ddp")
    run.wait_for_training()
    ranks = run.processes()
    ranks[rank].send_signal(signal.SIGTERM)
    psutil.wait_procs(ranks, LONGEST_S)
    assert run.wait() != 0
    assert "stopped as asked; go on with --ckpt_path last" in run.output.read_text()
    assert read_checkpoint(folder)["progress"]["rollouts"] < 8
    again = Two(repository, config, folder, "ddp", restarts=1)
    assert again.main.wait(200) == 0, again.output.read_text()[-3000:]
    assert_same_but_for_rounding(folder, unharmed)
