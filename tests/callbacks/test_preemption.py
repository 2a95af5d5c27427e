"""Runs that are told to stop: they save what they have done, end, and go on from there."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cotgen_pl.callbacks.preemption import StopSignals
from tests.test_command_line import (
    assert_same,
    fit,
    piece,
    read_checkpoint,
    read_metrics,
    settings_of,
)
from tests.test_resumed_rounds import settings_of as settings_of_rounds

SLURM = {"JOB_ID": "17", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}


class SignalAt(Callback):
    """Sends this process a signal in the middle of a rollout's update, or of a stream's drawing."""

    def __init__(self, rollout: int = 0, stream: str = "", number: int = 15) -> None:
        self.rollout, self.stream, self.number = rollout, stream, number

    def setup(self, trainer, pl_module, stage):
        if self.stream:
            pl_module.before_drawing.insert(0, self.send)

    def send(self, stream: str) -> None:
        if stream == self.stream:
            os.kill(os.getpid(), self.number)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.rollouts + 1 == self.rollout:
            os.kill(os.getpid(), self.number)


def told_at(settings: dict[str, Any], **when: Any) -> dict[str, Any]:
    callbacks = [*settings["trainer"]["callbacks"], piece(f"{__name__}.SignalAt", **when)]
    return settings | {"trainer": settings["trainer"] | {"callbacks": callbacks}}


@pytest.fixture(scope="module")
def run(tiny_janus, tmp_path_factory):
    """The settings, and the folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("preemption")
    settings = settings_of(tiny_janus, folder)
    return settings, fit(settings, folder / "run")


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """SLURM's environment; gives the file that its stand-in writes what it was asked to."""
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    asked, command = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return asked


def test_a_run_that_is_told_to_stop_saves_the_update_and_goes_on_from_it(run, tmp_path):
    """In the middle of the third rollout's first update, with the last checkpoint of the second."""
    settings, whole = run
    folder, handlers = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(told_at(settings, rollout=3), folder)
    assert signal.getsignal(signal.SIGTERM) == handlers
    assert read_checkpoint(folder)["progress"]["rollouts"] == 3
    assert {step for step, *_ in read_metrics(folder)} == {"0", "1", "2", "3"}
    fit(settings, folder, "--ckpt_path", "last")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)


def test_the_last_update_ends_the_run_by_itself(run, tmp_path):
    settings, whole = run
    folder = fit(told_at(settings, rollout=6), tmp_path / "run")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert (folder / "exported/model.safetensors").exists()


def test_a_slurm_job_whose_time_is_up_is_queued_again_and_goes_on(
    run, tmp_path, slurm, monkeypatch
):
    settings, whole = run
    folder = tmp_path / "run"
    with pytest.raises(SIGTERMException):
        fit(told_at(settings, rollout=3, number=int(signal.SIGUSR1)), folder)
    assert slurm.read_text() == "requeue 17\n"
    assert read_checkpoint(folder)["progress"]["rollouts"] == 3
    with pytest.raises(ValueError, match="holds a run already"):
        fit(settings, folder)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    fit(settings, folder)
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)
    assert slurm.read_text() == "requeue 17\n"


def test_a_slurm_job_that_is_cancelled_is_not_queued_again(run, tmp_path, slurm):
    with pytest.raises(SIGTERMException):
        fit(told_at(run[0], rollout=2), tmp_path / "run")
    assert not slurm.exists()


def test_what_slurm_answers_is_told(run, tmp_path, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    command = tmp_path / "bin" / "scontrol"
    command.write_text('#!/bin/sh\necho "no job $2" >&2; exit 1\n')
    message = r"saved, and not put back into the queue \(no job 5_2\n\); submit it"
    with pytest.warns(UserWarning, match=message), pytest.raises(SIGTERMException):
        fit(told_at(run[0], rollout=1, number=int(signal.SIGUSR1)), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run")["progress"]["rollouts"] == 1


def test_a_command_that_torchrun_starts_again_goes_on(run, tmp_path, monkeypatch):
    """And begins, where it was killed before it had saved its start."""
    settings, whole = run
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    folder = fit(settings, tmp_path / "run", "--trainer.max_steps", "4")
    fit(settings, folder)
    assert read_checkpoint(folder)["progress"] == read_checkpoint(whole)["progress"]


@pytest.mark.slow
def test_pairs_that_are_being_drawn_are_not_waited_for(tiny_janus, tmp_path):
    settings = settings_of_rounds(tiny_janus, tmp_path)
    folder = tmp_path / "run"
    with pytest.raises(SIGTERMException):
        fit(told_at(settings, stream="pairs of round 1"), folder)
    assert read_checkpoint(folder)["progress"]["rollouts"] == 6
    whole = fit(settings, tmp_path / "whole")
    fit(settings, folder, "--ckpt_path", "last")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))


def test_a_run_whose_start_is_scored_is_not_waited_for(run, tmp_path):
    """Lightning's own handler would have processes broadcast there, at places of their own."""
    settings, whole = run
    folder = tmp_path / "run"
    with pytest.raises(SIGTERMException):
        fit(told_at(settings, stream="evaluation"), folder)
    assert read_checkpoint(folder)["progress"]["rollouts"] == 0
    fit(settings, folder, "--ckpt_path", "last")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))


def test_handlers_only_note_a_signal():
    signals = StopSignals()
    signals.note(signal.SIGTERM, None)
    assert signals.received == signal.SIGTERM
