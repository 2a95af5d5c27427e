"""A whole study from one command: `python tools/study.py configs/studies/NAME.yaml`.

Checks everything that can be checked before the first run, makes prompt files, starts what is not
finished (`tools/main.py` commands), and tells what is finished, what failed and what is left. It
goes on where it was killed. Then it writes the report, from the run folders alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from cotgen_pl.interfaces import check_positive
from cotgen_pl.modules.sft import SFTModule
from cotgen_pl.planning.footprint import PROMPT_TOKENS
from cotgen_pl.planning.work import (
    OptimizerMemory,
    PlannedWork,
    Speed,
    images_at_once,
    seconds,
)
from cotgen_pl.study.checks import check_claims, check_study, images_of
from cotgen_pl.study.choice import choose_settings, format_choice
from cotgen_pl.study.claims import Claim, judge, read_claims
from cotgen_pl.study.definition import Run, Study, read_study
from cotgen_pl.study.launch import Job, launch, locked
from cotgen_pl.study.progress import read_records, run_state
from cotgen_pl.study.prompts import make_prompts
from cotgen_pl.study.report import check_shown, write_report

if __package__:  # as a module of tools/
    from tools.main import main, run_command
    from tools.plan import GPUS, Unbuilt, plan_policy, plan_work
else:  # as a script, which has its own folder on the path
    from main import main, run_command
    from plan import GPUS, Unbuilt, plan_policy, plan_work

MAIN = Path(__file__).with_name("main.py")
NOT_PLANNED = (
    "GPU hours: drawing, reference and updates of training. Rewards, making pictures of tokens, "
    "the optimizer and evaluations come on top."
)
Settings = Mapping[str, Any]


# Commands ---------------------------------------------------------------------------------------


def arguments_of(study: Study, run: Run, seed: int) -> list[str]:
    """A run's command line behind `tools/main.py`, as it starts."""
    folder = study.run_folder(run.name, seed).as_posix()
    overrides = study.overrides_of(run, seed) | {"trainer.default_root_dir": folder}
    flags = [f"--{name}={_as_text(value)}" for name, value in overrides.items()]
    return [run.command, "--config", run.config, *flags]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_settings(study: Study, run: Run) -> tuple[Any, dict[str, Any]]:
    """A run's configuration with the first of its seeds: as it was read, and as it is saved.

    Raises:
        ValueError: The config is not there, or does not have what an override names.
    """
    if not Path(run.config).is_file():
        raise ValueError(f"run {run.name}: expected a config at {run.config}, got none; correct it")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            read = main(arguments_of(study, run, run.seeds[0]), Unbuilt)
    except (SystemExit, ValueError) as error:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        told = " ".join(lines[-3:]) if isinstance(error, SystemExit) else str(error)
        raise ValueError(
            f"run {run.name}: expected overrides that {run.config} has, got: {told}; correct the "
            "study's file"
        ) from error
    assert isinstance(read, Unbuilt)
    saved = yaml.safe_load(read.reader.dump(read.read, skip_none=False))
    return read.read, saved | {"ckpt_path": None}


def settings_of_seed(study: Study, run: Run, settings: Settings, seed: int) -> dict[str, Any]:
    """What a run's saved configuration holds for a seed."""
    text = json.dumps(settings | {"seed_everything": seed})
    if run.starts_from is not None:  # its policy is that of the same seed
        first, own = (study.run_folder(run.starts_from, s).as_posix() for s in (run.seeds[0], seed))
        text = text.replace(f"{first}/exported", f"{own}/exported")
    read: dict[str, Any] = json.loads(text)
    return read


def find_jobs(study: Study, settings: Mapping[str, Settings]) -> Iterator[Job]:
    """What is not finished. A folder that holds another run is an error."""
    for run, seed in study.seeded_runs():
        folder = study.run_folder(run.name, seed)
        wanted = settings_of_seed(study, run, settings[run.name], seed)
        state = run_state(folder, run.command, wanted)
        if state == "finished":
            continue
        command = [sys.executable, str(MAIN), *arguments_of(study, run, seed)]
        goes_on = run.command == "fit" and state == "unfinished"
        yield Job(
            name=f"{run.name} seed {seed}",
            folder=folder,
            command=[*command, "--ckpt_path=last"] if goes_on else command,
            size=images_drawn(settings[run.name]),
            behind=f"{run.starts_from} seed {seed}" if run.starts_from else None,
            is_finished=partial(_is_finished, folder, run.command),
        )


def _is_finished(folder: Path, command: str) -> bool:
    return run_state(folder, command) == "finished"


def images_drawn(settings: Settings) -> float:
    """By which the time left is shared out: images for training, and a share for evaluation."""
    return 4096.0 + images_of(settings)


# Planning ---------------------------------------------------------------------------------------


def format_plan(study: Study, settings: Mapping[str, Settings], hours: Mapping[str, float]) -> str:
    """A line for each group: runs, images, GPU hours; then the sum."""
    lines = [f"{'group':28s}{'runs':>8s}{'images':>14s}{'GPU hours':>12s}  comparison"]
    counted: set[str] = set()
    total = [0, 0, 0.0]
    groups = {"base": ("base",)} | {
        name: tuple(dict.fromkeys(cell.run for cell in group.cells))
        for name, group in study.groups.items()
    }
    for name, runs in groups.items():
        own = [study.runs[run] for run in runs if run not in counted]
        counted |= set(runs)
        numbers = (
            sum(len(run.seeds) for run in own),
            sum(len(run.seeds) * _images(run, settings) for run in own),
            sum(len(run.seeds) * hours.get(run.name, 0.0) for run in own),
        )
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        kind = study.groups[name].comparison if name in study.groups else ""
        lines.append(_format_row(name, *numbers, bool(hours)) + f"  {kind}")
    lines.append(_format_row("sum", *total, bool(hours)))
    return "\n".join([*lines, *([NOT_PLANNED] if hours else [])])


def _images(run: Run, settings: Mapping[str, Settings]) -> int:
    return images_of(settings[run.name]) if run.command == "fit" else 0


def _format_row(name: str, runs: float, images: float, hours: float, planned: bool) -> str:
    cell = f"{hours:12.0f}" if planned else f"{'-':>12s}"
    return f"{name:28s}{runs:8.0f}{images:14,.0f}{cell}"


# One command ------------------------------------------------------------------------------------


def run_study(arguments: Sequence[str] | None = None) -> int:
    """Read a command line and do what it says; returns how many runs failed."""
    own = _parser().parse_args(arguments)
    check_positive(jobs=own.jobs, threads=own.threads)
    study = read_study(own.config, quick=own.quick, only=own.only)
    claims = read_claims(study.claims) if study.claims else []
    whole = read_study(own.config)  # a mistake in what waits is a mistake now
    check_shown(whole)
    check_claims(whole, claims)
    if own.report:
        write_whole_report(own.config, claims)
        return 0
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # a seed for each run read
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    read = {run.name: read_settings(study, run) for run in study.runs.values()}
    settings = {name: saved for name, (_, saved) in read.items()}
    check_study(study, settings, claims, deviates=not own.quick)
    configs = {name: config for name, (config, _) in read.items()}
    print(format_plan(study, settings, plan_study(study, configs)), flush=True)
    if own.plan:
        return 0
    with locked(study.folder) as lock:
        for counts in make_prompts(study):
            print(
                f"prompts {counts.name}: {counts.kept} of {counts.read}, without {counts.leaks} "
                f"that are held out and {counts.duplicates} that came before",
                flush=True,
            )
        jobs = list(find_jobs(study, settings))
        number = sum(len(run.seeds) for run in study.runs.values())
        print(f"{number - len(jobs)} of {number} runs are finished", flush=True)
        outcome = launch(jobs, own.jobs, lock, partial(print, flush=True), own.threads)
    if "choose" in study.settings and not outcome.failed:
        print(format_choice(choose_settings(study.settings["choose"], read_records(study))))
    for name, why in outcome.failed.items():
        print(f"failed: {name}: {why}")
    write_whole_report(own.config, claims)
    return len(outcome.failed)


def write_whole_report(config: str, claims: Sequence[Claim]) -> None:
    """Report on the whole study, whatever part of it was asked for: the rest is named as missing.

    A study that shows nothing, such as one that tunes, has none.
    """
    study = read_study(config)
    if study.tables or study.figures:
        records = read_records(study)
        found = [judge(claim, records) for claim in claims]
        print(f"report: {write_report(records, found, study.folder / 'report')}", flush=True)


def plan_hours(config: Any, gpu: str) -> float:
    """Hours of one GPU for a run's training: drawing, the reference, updates.

    Not counted are rewards, pictures made of tokens, the optimizer and evaluations.
    """
    policy, device = plan_policy(config, PROMPT_TOKENS), GPUS[gpu]
    settings = config.model.init_args
    tunes = issubclass(resolve_name(config.model.class_path), SFTModule)
    work = plan_chosen(config) if tunes else plan_work(config, policy, 1, None)
    spent = seconds(policy, work, Speed(device.bandwidth, device.flops))
    learnt = settings.images_budget
    if not work.draws:  # drawn before, in groups: of each a pair is learnt, or the chosen one
        learnt = (1 if tunes else 2) * learnt // settings.group_size * config.data.init_args.epochs
    learning = (spent["reference and replay"] + spent["update"]) * learnt / work.learnt
    return (spent["rollout"] * settings.images_budget / work.drawn + learning) / 3600


def plan_chosen(config: Any) -> PlannedWork:
    """What an update of best-of-N fine-tuning asks, as far as its seconds go."""
    settings = config.model.init_args
    callbacks = [callback.init_args for callback in config.trainer.callbacks or []]
    chosen = config.data.init_args.pairs_per_update
    return PlannedWork(
        drawn=images_at_once(callbacks)["paired"],
        draws=0,
        learnt=chosen,
        micro_batch=chosen,
        guided=settings.guidance != 1,
        logprobs="conditional",
        twin=False,
        replays=0,
        optimizer=NO_OPTIMIZER,
    )


NO_OPTIMIZER = OptimizerMemory(0, 0)  # its memory is not planned here, nor are its seconds


def plan_study(study: Study, configs: Mapping[str, Any]) -> dict[str, float]:
    """GPU hours of a run by its name, where the study says what GPU is planned with."""
    plan = study.settings.get("plan")
    if not plan:
        return {}
    if plan.get("gpu") not in GPUS:
        raise ValueError(f"plan: expected a gpu among {', '.join(GPUS)}, got {plan.get('gpu')!r}")
    fits = [run for run in study.runs.values() if run.command == "fit"]
    return {run.name: plan_hours(configs[run.name], plan["gpu"]) for run in fits}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a study, or go on with it.", allow_abbrev=False
    )
    parser.add_argument("config", help="a study, like configs/studies/shapes.yaml")
    parser.add_argument("--plan", action="store_true", help="check, tell what would run, and end")
    parser.add_argument("--report", action="store_true", help="start nothing, report what there is")
    parser.add_argument("--quick", action="store_true", help="one seed, the main comparison alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--only", nargs="+", default=[], help="names of groups; the others wait")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs are ended, too
    sys.path.append(str(Path.cwd()))  # where a user's own classes lie; else only tools/ is there
    sys.exit(1 if run_command(run_study) else 0)
