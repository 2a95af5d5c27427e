"""Jobs that are started, fail, wait for each other and are never run twice at once."""

import subprocess
import sys

import pytest

from cotgen_pl.study.launch import Job, launch, locked


def job(folder, name, code="pass", behind=None, is_finished=lambda: True) -> Job:
    command = [sys.executable, "-S", "-c", code]
    return Job(name, folder / name, command, 1.0, behind, is_finished)


def run(folder, jobs):
    told = []
    with locked(folder) as lock:
        return launch(jobs, 2, lock, told.append, threads=1), told


def test_a_failing_job_stops_only_those_behind_it(tmp_path):
    jobs = [
        job(tmp_path, "bad", "import sys; sys.exit('no')"),
        job(tmp_path, "after", behind="bad"),
        job(tmp_path, "good"),
        job(tmp_path, "later", behind="good"),
    ]
    outcome, told = run(tmp_path, jobs)
    assert sorted(outcome.finished) == ["good", "later"]
    assert "exit code 1" in outcome.failed["bad"]
    assert "not started" in outcome.failed["after"]
    assert (tmp_path / "bad/log.txt").read_text().strip() == "no"
    assert len(told) == 4


def test_a_job_that_leaves_nothing_has_failed(tmp_path):
    outcome, _ = run(tmp_path, [job(tmp_path, "empty", is_finished=lambda: False)])
    assert "ended without finishing" in outcome.failed["empty"]


def test_jobs_have_the_threads_they_are_given(tmp_path):
    run(tmp_path, [job(tmp_path, "one", "import os; print(os.environ['OMP_NUM_THREADS'])")])
    assert (tmp_path / "one/log.txt").read_text() == "1\n"


def test_what_outlived_its_study_keeps_the_folder(tmp_path):
    with locked(tmp_path) as lock:
        command = [sys.executable, "-S", "-c", "input()"]
        left = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(ValueError, match="or a run that outlived"), locked(tmp_path):
        pass
    left.communicate(b"\n")
    with locked(tmp_path):
        pass
