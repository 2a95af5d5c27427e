"""How far a study is, told by what its run folders hold and by nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from cotgen_pl.study.agreement import find_difference
from cotgen_pl.study.definition import Study
from cotgen_pl.study.folders import Records, read_record

State = Literal["absent", "unfinished", "finished"]

SAVED_AS = {"fit": "config.yaml", "validate": "evaluation/validate.yaml"}
PLACE = ("trainer", "default_root_dir")


def run_state(folder: Path, command: str, settings: Mapping[str, Any] | None = None) -> State:
    """How far a run is.

    Training is finished when ended.json is there, which it writes last; scoring, when every
    suite's verdicts are. A run is only as finished as its verdicts: where one is missing, it is
    not.

    Args:
        folder: The run's.
        command: `fit` or `validate`.
        settings: What config.yaml must hold, but for the folder; None asks nothing of it.

    Raises:
        ValueError: The folder holds a run of other settings.
    """
    saved = read_saved(folder, command)
    if saved is None:
        return "unfinished" if (folder / "checkpoints/last.ckpt").is_file() else "absent"
    if settings is not None:
        check_settings(folder / SAVED_AS[command], saved, settings)
    names = [f"{suite}.json" for suite in suites_of(saved)]
    scored = all((folder / "evaluation" / name).is_file() for name in names)
    ended = command == "validate" or (folder / "ended.json").is_file()
    return "finished" if scored and ended else "unfinished"


def read_saved(folder: Path, command: str) -> dict[str, Any] | None:
    """The configuration that a run left; None before it has."""
    path = folder / SAVED_AS[command]
    if not path.is_file():
        return None
    saved: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return saved


def suites_of(settings: Mapping[str, Any]) -> list[str]:
    """Names of the suites that a configuration evaluates."""
    return [suite["name"] for suite in _suites(settings)]


def domains_of(settings: Mapping[str, Any]) -> list[str]:
    """Domains of the suites that a configuration evaluates."""
    return list(dict.fromkeys(suite["domain"] for suite in _suites(settings)))


def _suites(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    callbacks = settings["trainer"]["callbacks"] or []
    suites = [callback.get("init_args", {}).get("suites", []) for callback in callbacks]
    return [suite for some in suites for suite in some]


def check_settings(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first difference of a saved configuration."""
    held, planned = _flat(saved), _flat(wanted)
    differing = [
        name
        for name in [*planned, *held]
        if name != ".".join(PLACE) and held.get(name) != planned.get(name)
    ]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path}: expected the run that the study names, got one of another {name} (expected "
            f"{planned.get(name)!r}, got {held.get(name)!r}); name another folder for the study, "
            f"or remove {path.parent}"
        )


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Values by their dotted names."""
    if isinstance(settings, Mapping) and settings:
        entries = settings.items()
    elif isinstance(settings, list) and settings:
        entries = {str(place): entry for place, entry in enumerate(settings)}.items()
    else:
        return {name: settings}
    flat: dict[str, Any] = {}
    for key, value in entries:
        flat |= _flat(value, f"{name}.{key}".removeprefix("."))
    return flat


def read_records(study: Study) -> Records:
    """The records of all finished runs of a study that were made with what its file says."""
    places = {(run.name, seed): run for run, seed in study.seeded_runs()}
    records, refused = {}, {}
    for (name, seed), run in places.items():
        folder = study.run_folder(name, seed)
        if run_state(folder, run.command) == "finished":
            saved = read_saved(folder, run.command)
            assert saved is not None
            difference = find_difference(study, run, seed, saved)
            if difference is None:
                records[name, seed] = read_record(folder, name, seed)
            else:
                refused[name, seed] = difference
    missing = tuple(place for place in places if place not in records)
    return Records(study, records, missing, refused)
