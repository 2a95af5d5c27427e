"""Runs the commands of a study, some at a time, until all are finished or have failed.

What is finished is for `cotgen_pl.study.progress` to say; nothing is noted down here. A lock that
the commands hold too keeps a second study, or one that was killed alone, from running them twice.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2  # between two looks at the commands that run
# glibc returns memory to the system after every picture that is decoded, and asks for it again:
# kept, decoding takes 0.7 of the time (16 tokens, 128 pictures, one thread).
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "10000000000"}


@dataclass(frozen=True)
class Job:
    """A run with one seed, to be started."""

    name: str
    """As it is called in messages."""
    folder: Path
    command: Sequence[str]
    size: float
    """How long it takes, in any unit: images that it draws."""
    behind: str | None = None
    """The job that must have finished before."""
    is_finished: Callable[[], bool] = lambda: True


@dataclass
class Outcome:
    """What became of the jobs, by name."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Why, and where it is told at length."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Any
    started: float


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold a study's folder; gives the lock, for commands to hold as well.

    Raises:
        ValueError: Another study, or a run that outlived its study, works in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"expected nobody else to run the study in {folder}, got a study, or a run that "
                "outlived its own; wait until it is done, or end it"
            ) from error
        yield file.fileno()


def launch(
    jobs: Sequence[Job], at_once: int, lock: int, tell: Callable[[str], Any], threads: int | None
) -> Outcome:
    """Run all jobs, in order, some at a time; one that fails stops only those behind it.

    Args:
        jobs: What is not finished, each behind the one that it waits for.
        at_once: How many run at the same time.
        lock: Of `locked`.
        tell: Takes a line on each job that ends.
        threads: Of each job; None leaves it to torch.
    """
    outcome, waiting, running = Outcome(), list(jobs), list[_Running]()
    clock = _Clock(sum(job.size for job in jobs), at_once)
    environment = os.environ | KEPT_MEMORY
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    try:
        while waiting or running:
            waiting = _drop_orphans(waiting, outcome, tell)
            for job in _startable(waiting, running, outcome, at_once - len(running)):
                running.append(_start(job, environment, lock))
                waiting.remove(job)
            ended = [one for one in running if one.process.poll() is not None]
            for one in ended:
                running.remove(one)
                _note(one, outcome, clock, tell, len(jobs))
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            one.process.terminate()
            one.process.wait()
            one.log.close()
    return outcome


def _startable(
    waiting: Sequence[Job], running: Sequence[_Running], outcome: Outcome, free: int
) -> list[Job]:
    """The next jobs whose start is there."""
    unfinished = {one.job.name for one in running} | {job.name for job in waiting}
    return [job for job in waiting if job.behind not in unfinished][:free]


def _drop_orphans(waiting: list[Job], outcome: Outcome, tell: Callable[[str], Any]) -> list[Job]:
    """The jobs but for those behind one that failed."""
    orphans = [job for job in waiting if job.behind in outcome.failed]
    for job in orphans:
        outcome.failed[job.name] = f"not started: it begins where {job.behind} ends, which failed"
        tell(f"{job.name}: {outcome.failed[job.name]}")
    return [job for job in waiting if job not in orphans]


def _start(job: Job, environment: Mapping[str, str], lock: int) -> _Running:
    job.folder.mkdir(parents=True, exist_ok=True)
    log = (job.folder / "log.txt").open("ab")
    process = subprocess.Popen(
        job.command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        pass_fds=(lock,),
    )
    return _Running(job, process, log, time.monotonic())


def _note(
    one: _Running, outcome: Outcome, clock: _Clock, tell: Callable[[str], Any], number: int
) -> None:
    """Put down how a job ended, and tell what is left."""
    one.log.close()
    job, spent = one.job, time.monotonic() - one.started
    if one.process.returncode == 0 and job.is_finished():
        outcome.finished.append(job.name)
        said = f"finished in {spent:.0f} s"
    else:
        code = one.process.returncode
        why = f"exit code {code}" if code else "ended without finishing"
        outcome.failed[job.name] = f"{why}, see {job.folder / 'log.txt'}"
        said = f"FAILED: {outcome.failed[job.name]}"
    clock.count(job.size, spent)
    done = len(outcome.finished) + len(outcome.failed)
    tell(f"[{done}/{number}] {job.name}: {said}; {clock.left()}")


class _Clock:
    """Time left, by the seconds per unit of the jobs that have ended."""

    def __init__(self, size: float, at_once: int) -> None:
        self.left_over, self.at_once = size, at_once
        self.size, self.spent = 0.0, 0.0

    def count(self, size: float, seconds: float) -> None:
        self.left_over -= size
        self.size, self.spent = self.size + size, self.spent + seconds

    def left(self) -> str:
        if self.left_over <= 0:
            return "nothing left but what runs"
        minutes = self.left_over * self.spent / self.size / self.at_once / 60
        return f"about {minutes:.0f} minutes left" if minutes >= 1 else "less than a minute left"
